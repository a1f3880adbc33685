"""Forward pass, loss, clipping, optimizers and update ratio on the device `cuda` without a GPU, with FakeTensorMode.

It shows that they mix no tensor of the GPU with one that was made on the CPU, and which are float32; not that a CUDA
kernel exists, is right or is fast, and no numbers. Forward pass and loss, which computes its gradients in its forward
pass, take a CUDA build of torch; a CPU build refuses indexing and the choice of an attention kernel ("PyTorch is not
linked with support for cuda devices"). Neither takes autograd's backward pass. tests/test_gpu.py is for a GPU.
"""

import contextlib

import pytest
import torch
from tiny_models import tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode

from gpt2repro.recipe import Recipe
from gpt2repro.train.optimizers import build_optimizers, set_lr
from gpt2repro.train.telemetry import _norm
from modeling_gpt2repro import linear_cross_entropy


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


@contextlib.contextmanager
def autocast(dtype: torch.dtype):
    """torch.autocast, which turns itself off where it finds no GPU."""
    torch.set_autocast_dtype("cuda", dtype)
    torch.set_autocast_enabled("cuda", dtype != torch.float32)
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.clear_autocast_cache()


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_pass_and_loss_stay_on_the_gpu(dtype):
    """Hidden states, the loss and its gradients: of the hidden states in the autocast dtype, of the head in float32."""
    with FakeTensorMode(), torch.device(CUDA), autocast(dtype):
        model = tiny_model().train()
        tokens = torch.zeros(2, 8, dtype=torch.int64)
        hidden = model.transformer(input_ids=tokens, use_cache=False).last_hidden_state
        real = model.config.unpadded_vocab_size
        loss = linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, tokens.flatten(), real)
        (chunked, _), *_ = loss.grad_fn.next_functions
        grad_hidden, grad_head = chunked.saved_tensors
    made = [(tensor.device, tensor.dtype) for tensor in (loss, grad_head, grad_hidden)]
    assert made == [(CUDA, torch.float32), (CUDA, torch.float32), (CUDA, dtype)]
