"""The processes of a run and their devices: what the launch command asked for, and what the ranks have to agree on."""

import os
import platform
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from gpt2repro.errors import SharedError, UserError


def world_size() -> int:
    """Processes of this run, as known before the Accelerator exists."""
    return int(os.environ.get("WORLD_SIZE", 1))


def on_main(function: Callable[[], Any]) -> Any:
    """What `function` returns on the main process of Accelerate, on all; what it sends must be picklable.

    Raises:
        SharedError: on all, where it raised a UserError.
    """
    result, problem = None, None
    if PartialState().is_main_process:
        try:
            result = function()
        except UserError as error:
            problem = str(error)
    result, problem = broadcast_object_list([result, problem])
    if problem:
        raise SharedError(problem)
    return result


def cpu_asked() -> bool:
    """Whether this run is to stay on the CPU: `use_cpu: true` in the accelerate config, or every GPU hidden.

    Accelerator(cpu=cpu_asked()) lets the processes of multi_cpu.yaml find each other: accelerate tells only
    single-process runs that they are to use the CPU, and otherwise takes each process for a run of its own.
    """
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return asked or os.environ.get("CUDA_VISIBLE_DEVICES", "all").startswith("-1")


def device_name(device: torch.device) -> str:
    """What a reader calls the machine: the GPU's name, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return device.type


def missing_gpu() -> list[str]:
    """One line where the launch command asks for a GPU and torch finds none; accelerate would use the CPU silently."""
    # A config for GPUs shows in its 16-bit precision, or in several processes.
    half = (
        os.environ.get("ACCELERATE_MIXED_PRECISION") in ("bf16", "fp16", "fp8") and "ACCELERATE_USE_CPU" in os.environ
    )
    several = world_size() > 1
    if cpu_asked() or not (half or several) or torch.accelerator.is_available():
        return []
    return [
        "the launch command asks for a GPU, but torch finds none; use accelerate_configs/cpu.yaml or multi_cpu.yaml, "
        "or install a torch build for this machine's GPU"
    ]


def use_all_cores() -> None:
    """Undo OMP_NUM_THREADS=1, which `accelerate launch` sets for all but `use_cpu: true`, for a run that turns out to
    be on the CPU: its processes share the cores."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    sized_by_accelerate = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if launched and not sized_by_accelerate and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


# ---- processes that this one started ----


def end_with_parent(parent: BaseProcess) -> None:
    """End this process when `parent` ends, even if it is killed; a daemon thread waits for it."""

    def wait_and_end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()
