"""The GPUs that are known by number: hardware.yaml."""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import yaml


UNKNOWN_MFU = 0.4  # where nobody has measured it
CPU = "cpu"  # the name of "this machine", whose numbers are measured


@dataclass(frozen=True)
class Device:
    """One GPU, or a machine's CPU; the fields are described in hardware.yaml."""

    name: str
    memory_mib: int
    tflops: float
    watts: float
    source: str
    pattern: str = ""
    has_bf16: bool = True
    gb_s: float = 0.0
    link: str = ""
    link_gb_s: float = 0.0
    mfu: float = UNKNOWN_MFU
    mfu_source: str = "assumed; nobody has published one"


@functools.cache
def devices() -> dict[str, Device]:
    """The known GPUs by what --gpu calls them."""
    table = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    return {key: Device(**fields) for key, fields in table.items()}


def device_named(name: str) -> Device | None:
    """The GPU that CUDA calls by this name, e.g. "NVIDIA H100 80GB HBM3"; None if it is not known."""
    return next((device for device in devices().values() if re.search(rf"\b({device.pattern})\b", name)), None)
