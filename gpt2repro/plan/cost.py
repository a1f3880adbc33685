"""Seconds of a step on many GPUs, what the links between them add, and hours, dollars and kWh of a run."""

from dataclasses import dataclass

from gpt2repro.plan.hardware import Device
from gpt2repro.plan.memory import Setup
from gpt2repro.plan.sizes import Sizes


# What NCCL reaches of a link's rate: about 370 of 450 GB/s on an H100's NVLink (NVIDIA/nccl-tests issue 212).
LINK_EFFICIENCY = 0.8
BACKWARD = 2 / 3  # of a step's time: two of its three matrix products per weight


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step.

    tokens_per_second: of one GPU, while it computes.
    link_bytes: that each GPU sends over the link inside its machine; network_bytes: over its network adapter.
    communication: seconds that both take.
    exposed: seconds of it that no computation hides.
    """

    tokens_per_second: float
    compute: float
    link_bytes: float
    network_bytes: float
    communication: float
    exposed: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


def step_time(sizes: Sizes, setup: Setup, device: Device, gpus_per_machine: int, network_gbit: float) -> Step:
    """The time of a step.

    Args:
        network_gbit: rate of the network adapter of each GPU, Gbit/s one way; machines have one adapter a GPU, as
            NVIDIA's DGX have, and NCCL uses them all at once.
    """
    rate = device.mfu * device.tflops * 1e12 / sizes.flops_per_token(setup.sequence_length, setup.lora_rank)
    if setup.gradient_checkpointing:  # the blocks' forward pass is computed twice
        rate *= 3 / 4
    of_micro_batch = setup.tokens / rate
    compute = of_micro_batch * setup.accumulation
    link_bytes, network_bytes = traffic(sizes, setup, gpus_per_machine)
    on_link = link_bytes / (device.link_gb_s * 1e9 * LINK_EFFICIENCY) if link_bytes else 0.0
    on_network = network_bytes / (network_gbit / 8 * 1e9 * LINK_EFFICIENCY) if network_bytes else 0.0
    communication = max(on_link, on_network)  # both are pipelined
    # DDP averages gradients during the last micro-batch's backward pass. FSDP2 gathers throughout.
    hidden_behind = compute if setup.is_sharded else of_micro_batch * BACKWARD
    return Step(rate, compute, link_bytes, network_bytes, communication, max(0.0, communication - hidden_behind))


def traffic(sizes: Sizes, setup: Setup, gpus_per_machine: int) -> tuple[float, float]:
    """Bytes that a GPU sends in a step: over the link inside its machine, and over its network adapter.

    A ring all-reduce of M bytes over n GPUs sends 2 * M * (n - 1) / n from each; a gather or a reduce-scatter half of
    that. Across machines each adapter carries its share, 1 / gpus_per_machine, of a ring through all machines.
    FSDP2 gathers the blocks twice a micro-batch, for forward and backward, and reduces gradients once a step.
    """
    n, size = setup.num_gpus, 4.0 * sizes.parameters
    if n == 1:
        return 0.0, 0.0
    local = min(n, gpus_per_machine)
    machines = -(-n // gpus_per_machine)

    def sent(passes: float, bytes_: float, members: int) -> float:
        return passes * bytes_ * (members - 1) / members

    share = size / local  # of the weights on a network adapter
    gathers = 2 * setup.accumulation
    if setup.strategy == "ddp":
        return sent(2, size, n if machines == 1 else local), sent(2, share, machines)
    if setup.strategy == "fsdp2":
        return sent(gathers + 1, size, local), sent(gathers + 1, share, machines)
    return sent(gathers + 1, size, local), sent(2, share, machines)


@dataclass(frozen=True)
class Bill:
    hours: float
    dollars: float | None
    kwh: float


def bill(
    step: Step, steps: int, validation_tokens: float, num_gpus: int, device: Device, dollars_per_hour: float | None
) -> Bill:
    """What a run takes. Validations are forward passes, a third of a step's work.

    Args:
        validation_tokens: of all validations together.
        dollars_per_hour: of all machines together.
    Returns:
        kWh are those of the GPUs at their full power, without the machines around them and cooling.
    """
    validating = validation_tokens / (3 * step.tokens_per_second * num_gpus)
    hours = (steps * step.seconds + validating) / 3600
    dollars = None if dollars_per_hour is None else hours * dollars_per_hour
    return Bill(hours, dollars, hours * num_gpus * device.watts / 1000)
