"""What throughput and MFU are measured by: peak FLOP/s of devices, FLOPs per token, and peak memory."""

import re

import torch


# Dense bf16 (fp16 for V100) peak in FLOP/s, from NVIDIA's datasheets. The first pattern that matches the name counts.
PEAK_FLOPS = {
    r"B200": 2250e12,
    r"(H200|GH200)(?! NVL)": 989e12,
    r"H100 NVL": 835e12,
    r"H100 PCIe": 756e12,
    r"H100": 989e12,
    r"A100": 312e12,
    r"L40S": 362e12,
    r"RTX 4090(?! Laptop| D)": 165e12,
    r"RTX 3090(?! Ti)": 71e12,
    r"V100-SXM\d": 125e12,
    r"V100-PCIE": 112e12,
}


def peak_flops(device: torch.device, mixed_precision: str) -> float | None:
    """The device's peak FLOP/s for 16-bit matrix products; None if it is unknown or training is not in 16 bits."""
    if device.type != "cuda" or mixed_precision not in ("bf16", "fp16"):
        return None
    name = torch.cuda.get_device_name(device)
    is_slice_of_gpu = "MIG" in name
    lacks_bf16_units = "V100" in name and mixed_precision == "bf16"
    if is_slice_of_gpu or lacks_bf16_units:
        return None
    matching = (peak for pattern, peak in PEAK_FLOPS.items() if re.search(rf"\b({pattern})\b", name))
    return next(matching, None)


def flops_per_token(config, parameters: int, sequence_length: int) -> float:
    """FLOPs of a training step per token: 6 per weight, plus 12 * n_layer * n_embd * T for attention. Position
    embeddings are looked up, not multiplied.

    Source: PaLM paper, appendix B; nanoGPT estimate_mfu.
    """
    weights = parameters - config.n_positions * config.n_embd
    return 6 * weights + 12 * config.n_layer * config.n_embd * sequence_length


def peak_memory_bytes(device: torch.device) -> int | None:
    """Peak memory of torch's allocator on a GPU; None on other devices."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
