"""Weights laid out for inference on a CPU.

Generating a token needs all weights once, so a small batch can be no faster than memory is read. torch's own product of
a few rows reads at a fraction of that rate; and its float32 product of many rows, MKL's, is half as fast as oneDNN's on
AMD processors. `pack_weights` therefore replaces the projections of a GPT-2 by modules with faster kernels, both of
them torch's:

- `PackedLinear`: weights in oneDNN's blocked layout, as torch.compile uses it for frozen weights.
- `Int8Linear`: weights rounded to int8, activations in bfloat16, as torch.compile runs torchao's weight-only int8.

docs/generation.md has figures.
"""

import torch
from torch import nn
from transformers import GPT2Config, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gpt2repro.errors import UserError
from modeling_gpt2repro import GPT2ReproConfig


INT8_WIDTH = 16  # the kernel takes the inputs of a layer by so many
# Others may read the weight of a projection themselves.
MODEL_TYPES = (GPT2ReproConfig.model_type, GPT2Config.model_type)


class PackedLinear(nn.Module):
    """`x @ weight.T + bias` with the weight in oneDNN's layout, for inference only.

    Args:
        weight: (out_features, in_features) float32 or bfloat16, on the CPU; copied.
        bias: (out_features,) of the same dtype, or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)  # for any number of rows
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features), both in the weight's dtype."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """`x @ weight.T + bias` with the weight rounded to int8, for inference only.

    Each row has a scale of its own, of which its largest entry is 127 times. Products are summed in float32.

    Args:
        weight: (out_features, in_features) bfloat16 or float32; copied.
        bias: (out_features,) bfloat16, or None.
    Raises:
        UserError: in_features does not suit the kernel, which would read beyond the end of each row.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        weight = weight.detach().float()
        if weight.shape[1] % INT8_WIDTH:
            raise UserError(
                f"--dtype int8 is for layers whose width is a multiple of {INT8_WIDTH}, not {weight.shape[1]}; "
                "use --dtype bfloat16"
            )
        largest = weight.abs().amax(dim=1).clamp(min=1e-30)  # a row of zeros stays zeros
        self.register_buffer("scale", (largest / 127).bfloat16())
        self.register_buffer("rounded", (weight / self.scale[:, None]).round().to(torch.int8).contiguous())
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) bfloat16 -> (..., out_features) bfloat16."""
        rows = x.reshape(-1, x.shape[-1])
        product = torch._weight_int8pack_mm(rows, self.rounded, self.scale).view(*x.shape[:-1], -1)
        return product if self.bias is None else product + self.bias


def pack_weights(model: PreTrainedModel, int8: bool = False) -> None:
    """Replace the projections and the head of a GPT-2 on the CPU, in place; any other model stays as it is. Afterwards
    the model can only be run: it can neither be trained nor saved.

    Args:
        model: in float32 or bfloat16; with int8 in bfloat16.
    Raises:
        UserError: int8 weights are not possible for this model, or not where it is.
    """
    is_gpt2 = model.config.model_type in MODEL_TYPES
    on_cpu = model.device.type == "cpu"
    if int8 and not (is_gpt2 and on_cpu):
        what = f"a model on the CPU, not on {model.device.type}" if is_gpt2 else f"GPT-2, not {model.config.model_type}"
        raise UserError(f"--dtype int8 is for {what}; use --dtype bfloat16")
    if not (is_gpt2 and on_cpu and (int8 or _can_pack(model.dtype))):
        return
    linear_class = Int8Linear if int8 else PackedLinear
    for name, module in list(model.named_modules()):
        if type(module) in (nn.Linear, Conv1D):  # not those of quantized models
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight  # (out_features, in_features)
            model.set_submodule(name, linear_class(weight, module.bias))


def _can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch has oneDNN, and oneDNN this dtype on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    in_bfloat16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or in_bfloat16
