"""Which of torch's kernels computes attention in training; evaluation and samples, whose shapes vary, use its default.
`eager`, which is none of them, is a setting of the whole model."""

import contextlib
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2repro.errors import UserError, first_line
from gpt2repro.processes import note, on_main
from gpt2repro.recipe import Recipe
from modeling_gpt2repro import GPT2ReproConfig


HOPPER = 9  # major compute capability
KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
DTYPES = {"no": torch.float32, "fp16": torch.float16}  # of queries, by mixed precision; otherwise bfloat16


def preferred_kernel(attention: str, device_type: str, capability: tuple[int, int] | None) -> SDPBackend | None:
    """The kernel that a recipe's `attention` stands for; None: the default of torch or, for `eager`, of the model.

    Args:
        attention: one of the recipe's values.
        capability: CUDA's compute capability; None on other devices.
    """
    is_hopper = device_type == "cuda" and capability is not None and capability[0] == HOPPER
    if attention == "auto":
        return SDPBackend.CUDNN_ATTENTION if is_hopper else None
    return KERNELS.get(attention)


def attention_problems(attention: str, device_type: str, mixed_precision: str) -> list[str]:
    """One line if a kernel was asked for that does not exist for this device or precision."""
    if attention not in KERNELS:
        return []
    devices = ("cuda",) if attention == "cudnn" else ("cuda", "cpu")
    if device_type not in devices:
        runs_on = " or ".join(devices)
        return [f"attention={attention} runs on {runs_on}, but this run on {device_type}; use auto or sdpa"]
    if device_type == "cuda" and mixed_precision == "no":
        return [f"attention={attention} computes in 16 bits, but mixed_precision=no; use bf16, or attention=sdpa"]
    return []


class TrainingAttention:
    """Called, it returns the context in which a training step runs.

    All ranks take the kernel that the main process has tried.

    Raises:
        SharedError: the kernel that was asked for cannot run on this device, or not with these shapes.
    """

    def __init__(self, recipe: Recipe, config: GPT2ReproConfig, accelerator: Accelerator):
        device = accelerator.device
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        self.kernel = preferred_kernel(recipe.attention, device.type, capability)
        if self.kernel is None:
            return
        shape = (
            recipe.sequences_per_micro_batch,
            config.n_head,
            recipe.sequence_length,
            config.n_embd // config.n_head,
        )
        dtype = DTYPES.get(accelerator.mixed_precision, torch.bfloat16)
        kernel = self.kernel

        def runs() -> bool:
            reason = why_not(kernel, device, dtype, shape, config.attn_pdrop)
            if reason is not None and recipe.attention != "auto":
                raise UserError(f"attention={recipe.attention} cannot run here ({reason}); use auto or sdpa")
            if reason is not None:
                note(f"attention: {kernel.name} cannot run here ({reason}); torch's default does")
            return reason is None

        if not on_main(runs):
            self.kernel = None

    def __call__(self) -> AbstractContextManager:
        return contextlib.nullcontext() if self.kernel is None else sdpa_kernel(self.kernel)


def why_not(
    kernel: SDPBackend, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], dropout: float
) -> str | None:
    """Why a kernel cannot compute causal attention forward and backward; None if it can, which is tried.

    Args:
        shape: of queries, keys and values, (B, H, T, hs).
    """
    query, key, value = (torch.zeros(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    try:
        with sdpa_kernel(kernel):
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout)
            mixed.sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        return first_line(error)
    return None
