"""Models of sizes that the planner's formulas are tested with."""

import dataclasses

import torch

from gpt2repro.plan.sizes import Sizes
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM


TINY = Sizes(vocab_size=128, n_positions=64, n_embd=32, n_layer=2, n_head=2, n_inner=96)


def build(sizes: Sizes, device: str = "cpu") -> GPT2ReproForCausalLM:
    fields = dataclasses.asdict(sizes)
    del fields["has_dropout"]
    with torch.device(device):
        return GPT2ReproForCausalLM(GPT2ReproConfig(**fields))
