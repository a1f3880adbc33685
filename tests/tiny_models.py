"""Tiny models for the tests, and what compares them with transformers' own GPT-2."""

import torch

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM


SIZES = {"vocab_size": 64, "unpadded_vocab_size": 60, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
PROJECTIONS = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
VOCABULARY = ("wte.weight", "lm_head.weight")


def tiny_model(**fields) -> GPT2ReproForCausalLM:
    """A freshly initialized model, the same for the same fields.

    Args:
        fields: of GPT2ReproConfig, instead of SIZES.
    """
    torch.manual_seed(0)
    special_tokens = {"bos_token_id": None, "eos_token_id": None}
    return GPT2ReproForCausalLM(GPT2ReproConfig(**SIZES | special_tokens | fields))


def as_gpt2_tensors(tensors: dict[str, torch.Tensor], vocab_size: int) -> dict[str, torch.Tensor]:
    """Weights or gradients in GPT-2's layout: projections (in, out), no padding rows beyond vocab_size."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith(PROJECTIONS):
            tensor = tensor.T
        if name.endswith(VOCABULARY):
            tensor = tensor[:vocab_size]
        result[name] = tensor.detach().clone()
    return result


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}
