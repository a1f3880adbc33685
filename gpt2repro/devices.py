"""What device the launch command asked for."""

import os

import psutil
import torch


def cpu_asked() -> bool:
    """Whether this run is to stay on the CPU: `use_cpu: true` in the accelerate config, or every GPU hidden.

    Accelerator(cpu=cpu_asked()) lets the processes of multi_cpu.yaml find each other: accelerate tells only
    single-process runs that they are to use the CPU, and otherwise takes each process for a run of its own.
    """
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return asked or os.environ.get("CUDA_VISIBLE_DEVICES", "all").startswith("-1")


def missing_gpu() -> list[str]:
    """One line where the launch command asks for a GPU and torch finds none; accelerate would use the CPU silently."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "") != ""  # gpu_ids in the accelerate config
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if cpu_asked() or not (named or several) or torch.accelerator.is_available():
        return []
    return [
        "the launch command asks for a GPU, but torch finds none; use accelerate_configs/cpu.yaml or multi_cpu.yaml, "
        "or install a torch build for this machine's GPU"
    ]


def use_all_cores(num_processes: int) -> None:
    """Undo OMP_NUM_THREADS=1, which `accelerate launch` sets by default, for a run that turns out to be on the CPU."""
    if os.environ.get("OMP_NUM_THREADS") == "1" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        torch.set_num_threads(max(1, (psutil.cpu_count(logical=False) or 1) // num_processes))
