"""Time and traffic by formula, against published runs and rings worked out by hand."""

import pytest

from gpt2repro.evaluation.published import openai_models
from gpt2repro.plan.cost import LINK_EFFICIENCY, bill, step_time, traffic
from gpt2repro.plan.hardware import device_named, devices
from gpt2repro.plan.memory import Setup
from gpt2repro.plan.sizes import Sizes


GPT2 = Sizes(50304, 1024, 768, 12, 12, 3072)
BYTES = 4 * GPT2.parameters


@pytest.mark.parametrize(
    ("name", "gpu", "global_batch", "seconds", "within"),
    [  # llm.c's scripts/run_gpt2_*.sh on eight GPUs. The first is where the A100's MFU is from; the others are not.
        ("gpt2", "a100", 2**19, 0.300, 0.01),
        ("gpt2-medium", "a100", 2**19, 0.820, 0.05),
        ("gpt2-large", "a100", 2**19, 1.7, 0.1),
        ("gpt2", "h100", 2**19, 0.140, 0.01),
        ("gpt2-xl", "h100", 2**20, 2.8, 0.25),  # larger matrices reach a larger share of the peak
    ],
)
def test_a_step_takes_what_llm_c_published(name, gpu, global_batch, seconds, within):
    openai = openai_models()[name]
    sizes = Sizes(50304, 1024, openai.width, openai.layers, openai.heads, 4 * openai.width)
    setup = Setup(16, 1024, accumulation=global_batch // (16 * 1024 * 8), num_gpus=8)
    step = step_time(sizes, setup, devices()[gpu], gpus_per_machine=8, network_gbit=400)
    assert step.seconds == pytest.approx(seconds, rel=within)


def test_what_each_gpu_sends():
    def sent(strategy, num_gpus, accumulation=1):
        return traffic(GPT2, Setup(8, 1024, accumulation, strategy, num_gpus), gpus_per_machine=8)

    assert sent("ddp", 1) == (0, 0)
    assert sent("ddp", 2) == (BYTES, 0)  # half to the other, and half of the sum
    assert sent("ddp", 8, accumulation=4) == sent("ddp", 8) == (2 * BYTES * 7 / 8, 0)
    assert sent("ddp", 16) == (2 * BYTES * 7 / 8, 2 * BYTES / 8 / 2)  # each adapter's eighth, of two machines
    assert sent("fsdp2", 8, accumulation=4) == ((2 * 4 + 1) * BYTES * 7 / 8, 0)
    assert sent("fsdp2", 16)[1] == 3 * BYTES / 8 / 2
    assert sent("hsdp", 16) == (3 * BYTES * 7 / 8, 2 * BYTES / 8 / 2)


def test_what_computation_does_not_hide_is_added():
    pcie, fast = devices()["l4"], devices()["h100"]
    hidden = step_time(GPT2, Setup(64, 1024, num_gpus=8), fast, 8, 400)
    assert hidden.exposed == 0 and hidden.seconds == hidden.compute
    short = step_time(GPT2, Setup(1, 128, num_gpus=8), pcie, 8, 400)
    assert short.communication == pytest.approx(2 * BYTES * 7 / 8 / (32e9 * LINK_EFFICIENCY))
    assert short.exposed == pytest.approx(short.communication - short.compute * 2 / 3)
    slow_network = step_time(GPT2, Setup(64, 1024, num_gpus=16), fast, 8, network_gbit=1)
    assert slow_network.communication == pytest.approx(BYTES / 8 / (1e9 / 8 * LINK_EFFICIENCY))


def test_the_bill_counts_steps_and_validations():
    h100 = devices()["h100"]
    step = step_time(GPT2, Setup(64, 1024, num_gpus=8), h100, 8, 400)
    without = bill(step, 1000, 0, 8, h100, None)
    assert without.hours == pytest.approx(1000 * step.seconds / 3600) and without.dollars is None
    validated = bill(step, 1000, 3 * 1000 * 2**19, 8, h100, 20.0)  # forward passes of thrice as many tokens as training
    assert validated.hours == pytest.approx(2 * without.hours)
    assert validated.dollars == pytest.approx(20 * validated.hours)
    assert validated.kwh == pytest.approx(8 * 0.7 * validated.hours)


def test_recomputing_costs_a_third_more():
    a100 = devices()["a100"]
    plain, recomputing = (
        step_time(GPT2, Setup(8, 1024, gradient_checkpointing=recompute), a100, 8, 400) for recompute in (False, True)
    )
    assert recomputing.seconds == pytest.approx(plain.seconds * 4 / 3)


def test_every_gpu_is_found_by_a_name_and_has_a_source():
    for key, device in devices().items():
        assert device.source and device.memory_mib > 8_000 and device.tflops > 40 and 0 < device.mfu < 1, key
    found = {name: device_named(name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "NVIDIA A10G")}
    assert [device.name for device in found.values()] == ["NVIDIA H100 SXM", "NVIDIA A100 SXM 40 GB", "NVIDIA A10G"]
    assert device_named("NVIDIA A10") is None and device_named("Some new GPU") is None
