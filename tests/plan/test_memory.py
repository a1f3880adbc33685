"""Memory by formula, against what the model stores and what was measured on a GPU."""

import dataclasses

import pytest
import torch
from planned_models import TINY, build

from gpt2repro.models.lora import add_lora, new_lora
from gpt2repro.plan.memory import (
    Setup,
    activations_per_token,
    capacity,
    casts,
    largest_micro_batch,
    optimizer_bytes,
    peak_memory,
    trained,
)
from gpt2repro.plan.sizes import Sizes


GPT2 = Sizes(50304, 1024, 768, 12, 12, 3072)
MIB = 2**20


def stored_bytes(layers: int, half: bool, recompute: bool = False, attention: str = "sdpa", lora_rank: int = 0) -> int:
    """Bytes of all tensors that autograd stores in a forward pass of 2 x 64 tokens, weights left out."""
    model = build(dataclasses.replace(TINY, n_layer=layers)).train()
    if lora_rank:
        add_lora(model, new_lora(lora_rank, "base"))
    if recompute:
        model.gradient_checkpointing_enable()
    model.set_attn_implementation(attention)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept, sizes = [], {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.append(tensor)  # so that no other tensor gets its address
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.zeros(2, 64, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        model(input_ids=tokens, shift_labels=tokens)
    return sum(sizes.values())


@pytest.mark.parametrize(("attention", "lora_rank"), [("sdpa", 0), ("eager", 0), ("sdpa", 4)])
@pytest.mark.parametrize("half", [False, True])
def test_a_block_stores_what_the_formula_says(half, attention, lora_rank):
    if lora_rank:
        pytest.importorskip("peft")
    with_three, with_two = (stored_bytes(n, half, attention=attention, lora_rank=lora_rank) for n in (3, 2))
    setup = Setup(2, 64, half=half, eager_attention=attention == "eager", lora_rank=lora_rank)
    of_casts = casts(dataclasses.replace(TINY, n_layer=1), setup)
    assert with_three - with_two == setup.tokens * activations_per_token(TINY, setup) + of_casts


def test_with_lora_only_the_adapters_have_gradients_and_moments():
    pytest.importorskip("peft")
    model, setup = build(TINY), Setup(2, 64, lora_rank=4)
    add_lora(model, new_lora(4, "base"))
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = peak_memory(TINY, setup).parts
    assert trained(TINY, setup) == parameters and kept["optimizer"] == 8 * parameters
    assert kept["weights"] == 4 * (TINY.parameters + parameters)


def test_a_recomputed_block_stores_its_input_only():
    of_block = stored_bytes(3, True, recompute=True) - stored_bytes(2, True, recompute=True)
    assert of_block == 2 * 64 * 4 * TINY.n_embd


def test_the_peak_is_what_an_h200_measured():
    """benchmarks/results/gpu_h200.md"""
    setup = Setup(32, 1024, half=True, compile=True, has_telemetry=False)
    assert peak_memory(GPT2, setup).total == pytest.approx(14_031 * MIB, rel=0.1)


def test_what_is_kept_through_a_step():
    adamw = peak_memory(GPT2, Setup(1, 1024))
    assert adamw.parts["weights"] == 4 * GPT2.parameters and adamw.parts["optimizer"] == 8 * GPT2.parameters
    in_muon = 12 * (768 * 3 * 768 + 768 * 768 + 2 * 768 * 3072)
    assert optimizer_bytes(GPT2, Setup(1, 1024, muon=True)) == 8 * GPT2.parameters - 4 * in_muon
    assert adamw.parts["communication"] == 0
    ddp = peak_memory(GPT2, Setup(1, 1024, num_gpus=8))
    assert ddp.parts["communication"] == 4 * GPT2.parameters  # its buckets


def test_sharding_divides_weights_and_optimizer():
    fsdp2 = peak_memory(GPT2, Setup(8, 1024, strategy="fsdp2", num_gpus=16, shards=16))
    hsdp = peak_memory(GPT2, Setup(8, 1024, strategy="hsdp", num_gpus=16, shards=8))
    for part in ("weights", "optimizer"):
        assert 16 * fsdp2.parts[part] == 8 * hsdp.parts[part] == (4 if part == "weights" else 8) * GPT2.parameters
    assert fsdp2.total < hsdp.total < peak_memory(GPT2, Setup(8, 1024, num_gpus=16)).total


def test_accumulation_holds_all_gradients_before_the_loss():
    once, twice = (peak_memory(GPT2, Setup(16, 1024, accumulation)) for accumulation in (1, 2))
    assert once.moment == twice.moment == "loss"
    assert twice.total - once.total == 4 * GPT2.parameters


def test_a_small_batch_peaks_when_the_optimizer_steps():
    assert peak_memory(GPT2, Setup(1, 64)).moment == "optimizer step"
    assert peak_memory(GPT2, Setup(1, 64, has_telemetry=False)).moment == "end of backward"


@pytest.mark.parametrize("recompute", [False, True])
def test_the_largest_micro_batch_fits_and_the_next_does_not(recompute):
    setup = Setup(1, 1024, gradient_checkpointing=recompute)
    room = capacity(24 * 1024)
    found = largest_micro_batch(GPT2, setup, 480, room)
    assert found.micro_batch_size * found.accumulation == 480
    assert peak_memory(GPT2, found).total <= room
    larger = min(size for size in range(found.micro_batch_size + 1, 481) if 480 % size == 0)
    more = dataclasses.replace(found, micro_batch_size=larger, accumulation=480 // larger)
    assert peak_memory(GPT2, more).total > room
    assert largest_micro_batch(GPT2, setup, 480, 2**30) is None
