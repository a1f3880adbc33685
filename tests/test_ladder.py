"""benchmarks/ladder.py: its rungs compute the same steps, and its table and picture say when one does not."""

import dataclasses
import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from support import ROOT

import modeling_gpt2repro


@pytest.fixture(scope="module")
def ladder():
    spec = importlib.util.spec_from_file_location("ladder", ROOT / "benchmarks" / "ladder.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["ladder"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def measure(ladder, monkeypatch):
    """A tiny model's rung, in this process and not compiled."""
    loss_function = modeling_gpt2repro.linear_cross_entropy
    args = SimpleNamespace(device="cpu", tiny=True, batch_size=2, sequence_length=64, steps=4)

    def measure(switches):
        monkeypatch.setattr(modeling_gpt2repro, "linear_cross_entropy", loss_function)
        AcceleratorState._reset_state(reset_partial_state=True)
        return ladder.measure(dataclasses.replace(switches, compile=False), args)

    yield measure
    torch.set_float32_matmul_precision("highest")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_every_switch_leaves_the_loss_as_it_is(ladder, measure):
    first = measure(ladder.Switches())
    last = measure(dataclasses.replace(ladder.switches_of(len(ladder.RUNGS) - 3), mixed_precision="no"))
    assert (
        last["switches"]["fused_loss"] and last["switches"]["fused_adamw"] and last["switches"]["attention"] == "sdpa"
    )
    assert last["switches"]["vocab_size"] == 50_304 and first["switches"]["vocab_size"] == 50_257
    assert last["loss"] == pytest.approx(first["loss"], abs=1e-4)
    assert first["loss"] < 10.7  # four steps of learning: ln 50257 is 10.82
    in_bf16 = measure(dataclasses.replace(ladder.Switches(), mixed_precision="bf16"))
    assert 1e-7 < abs(in_bf16["loss"] - first["loss"]) < ladder.TOLERANCE


def test_a_rung_that_buys_speed_with_correctness_is_marked(ladder):
    rung = {"tokens_per_second": 100.0, "flops_per_token": 1e9, "peak_memory_bytes": 2**30, "loss": 9.0}
    rows = [
        rung | {"name": "float32", "milliseconds": 1000.0, "lecture_ms": 1000},
        rung | {"name": "TF32", "milliseconds": 250.0, "lecture_ms": 333, "loss": 9.01},
        rung | {"name": "fused loss", "milliseconds": 200.0, "lecture_ms": None, "loss": 9.5},
    ]
    report = {
        "settings": {"tiny": True, "batch_size": 2, "sequence_length": 64, "steps": 4},
        "device": "CPU",
        "versions": {"torch": "2"},
        "date": "2026-11-26",
        "peak_flops": 1e12,
        "tolerance_nats": ladder.TOLERANCE,
        "rungs": rows,
    }
    _, _, _, _, first, second, third = ladder.as_table(report).splitlines()
    assert first.startswith("| float32 | 1,000.0 | 100 | 10.0% | 1,024 |  | 1,000 |  | 9.0000 |")
    assert second.startswith("| TF32 | 250.0 | 100 | 10.0% | 1,024 | 4.00 | 333 | 3.00 | 9.0100 |")
    assert third.endswith("| 1.25 |  |  | 9.5000 **departs** |")
    assert ladder.picture(report).startswith(b"\x89PNG")
