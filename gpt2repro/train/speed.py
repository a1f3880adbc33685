"""What throughput and MFU are measured by: peak FLOP/s of devices, and peak memory."""

import torch

from gpt2repro.plan.hardware import device_named


def peak_flops(device: torch.device, mixed_precision: str) -> float | None:
    """The device's peak FLOP/s for 16-bit matrix products; None if it is unknown or training is not in 16 bits."""
    if device.type != "cuda" or mixed_precision not in ("bf16", "fp16"):
        return None
    name = torch.cuda.get_device_name(device)
    is_slice_of_gpu = "MIG" in name
    known = device_named(name)
    if known is None or is_slice_of_gpu or (mixed_precision == "bf16" and not known.has_bf16):
        return None
    return known.tflops * 1e12


def peak_memory_bytes(device: torch.device) -> int | None:
    """Peak memory of torch's allocator on a GPU; None on other devices."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
