"""Clipping, the optimizers and the update ratio on the device `cuda` without a GPU, with FakeTensorMode.

It shows that they mix no tensor of the GPU with one that was made on the CPU, and that all is float32; not that a CUDA
kernel exists, is right or is fast, and no numbers. The rest of a step cannot be driven so: with fake tensors on a GPU,
a CPU build of torch refuses autograd, indexing, dropout and the choice of an attention kernel ("PyTorch is not linked
with support for cuda devices"). tests/test_gpu.py is for a GPU.
"""

import pytest
import torch
from tiny_models import tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode

from gpt2repro.recipe import Recipe
from gpt2repro.train.optimizers import build_optimizers, set_lr
from gpt2repro.train.telemetry import _norm


CUDA = torch.device("cuda", 0)


def update(optimizer: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """One update of a model. Returns its weights with the optimizers' state; the norms of gradient and update."""
    model = tiny_model()
    with FakeTensorMode(), torch.no_grad():
        for module in model.modules():  # Module.to, which swaps tensors in place, cannot take fake ones
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty(weight.shape, device=CUDA)))
        model.tie_weights()
        optimizers = build_optimizers(model, Recipe(optimizer=optimizer))
        set_lr(optimizers, 1e-3)
        weights = list(model.parameters())
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        grad_norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        before = [weight.detach().clone() for weight in weights]
        for each in optimizers:
            each.step()
        torch._foreach_sub_(before, [weight.detach() for weight in weights])
        state = [tensor for each in optimizers for of_weight in each.state.values() for tensor in of_weight.values()]
        return [*weights, *state], [grad_norm, _norm(before)]


@pytest.mark.parametrize(("optimizer", "least"), [("adamw", 3), ("muon", 1)])
def test_an_update_stays_on_the_gpu_in_float32(optimizer, least):
    tensors, norms = update(optimizer)
    assert {(tensor.device, tensor.dtype) for tensor in [*tensors, *norms]} == {(CUDA, torch.float32)}
    assert all(norm.dim() == 0 for norm in norms)
    assert len(tensors) > (1 + least) * len(list(tiny_model().parameters())) - 1


def test_a_tensor_on_the_wrong_device_is_found(monkeypatch):
    """A momentum that is made on the CPU."""
    monkeypatch.setattr(torch, "zeros_like", lambda tensor, **options: torch.zeros(tensor.shape))
    with pytest.raises(RuntimeError, match="at least two devices, cpu and cuda:0"):
        update("muon")
