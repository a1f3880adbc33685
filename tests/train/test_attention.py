"""The choice of the attention kernel; which kernels run is asked of torch itself."""

import pytest
import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend

from gpt2repro.errors import UserError
from gpt2repro.recipe import Recipe
from gpt2repro.train import attention
from gpt2repro.train.attention import TrainingAttention, attention_problems, preferred_kernel, why_not
from modeling_gpt2repro import GPT2ReproConfig


CPU = torch.device("cpu")
RECIPE = {"micro_batch_size": 2, "sequence_length": 16}
CONFIG = GPT2ReproConfig(n_layer=1, n_head=2, n_embd=16, n_positions=16)


@pytest.mark.parametrize(
    ("name", "device_type", "capability", "kernel"),
    [
        ("auto", "cuda", (9, 0), SDPBackend.CUDNN_ATTENTION),
        ("auto", "cuda", (8, 0), None),
        ("auto", "cuda", (8, 9), None),
        ("auto", "cuda", (10, 0), None),
        ("auto", "cpu", None, None),
        ("auto", "mps", None, None),
        ("sdpa", "cuda", (9, 0), None),
        ("eager", "cuda", (9, 0), None),
        ("cudnn", "cuda", (8, 0), SDPBackend.CUDNN_ATTENTION),
        ("flash", "cuda", (9, 0), SDPBackend.FLASH_ATTENTION),
    ],
)
def test_kernel_of_a_device(name, device_type, capability, kernel):
    assert preferred_kernel(name, device_type, capability) == kernel


@pytest.mark.parametrize(
    ("name", "device_type", "precision", "problem"),
    [
        ("cudnn", "cpu", "bf16", "attention=cudnn runs on cuda, but this run on cpu"),
        ("flash", "mps", "no", "attention=flash runs on cuda or cpu, but this run on mps"),
        ("flash", "cuda", "no", "attention=flash computes in 16 bits, but mixed_precision=no"),
        ("flash", "cpu", "no", None),
        ("cudnn", "cuda", "bf16", None),
        ("auto", "cpu", "no", None),
    ],
)
def test_kernels_that_a_device_or_precision_lacks_are_refused(name, device_type, precision, problem):
    problems = attention_problems(name, device_type, precision)
    assert [text.split(";")[0] for text in problems] == ([problem] if problem else [])


def test_kernels_are_tried():
    """On a CPU torch has a flash kernel, and none of cuDNN's."""
    shape = (2, 2, 16, 8)
    assert why_not(SDPBackend.FLASH_ATTENTION, CPU, torch.bfloat16, shape, dropout=0.0) is None
    assert "backend" in why_not(SDPBackend.CUDNN_ATTENTION, CPU, torch.bfloat16, shape, dropout=0.0)


def test_a_kernel_that_cannot_run_is_replaced_by_torchs_default_or_is_an_error(monkeypatch, capsys):
    """As on a Hopper whose cuDNN builds no plan: here the kernel is cuDNN's, and the device a CPU."""
    monkeypatch.setattr(attention, "preferred_kernel", lambda *_: SDPBackend.CUDNN_ATTENTION)
    accelerator = Accelerator(cpu=True)
    chosen = TrainingAttention(Recipe(attention="auto", **RECIPE), CONFIG, accelerator)
    assert chosen.kernel is None
    assert "CUDNN_ATTENTION cannot run here" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"attention=cudnn cannot run here \(.*\); use auto or sdpa"):
        TrainingAttention(Recipe(attention="cudnn", **RECIPE), CONFIG, accelerator)


def test_only_the_chosen_kernel_runs_in_its_context():
    chosen = TrainingAttention(Recipe(attention="flash", **RECIPE), CONFIG, Accelerator(cpu=True))
    query = torch.randn(1, 2, 4, 8)
    for context, can_run_math in ((chosen, False), (attention.contextlib.nullcontext, True)):
        with context():
            assert torch.backends.cuda.flash_sdp_enabled()
            assert torch.backends.cuda.math_sdp_enabled() is can_run_math
            torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
