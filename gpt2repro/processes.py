"""The processes of a run and their devices: what the launch command asked for, and what the ranks have to agree on.

torch and accelerate are imported where they are used: the processes that prepare data need neither.
"""

import ctypes
import os
import platform
import sys
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from gpt2repro.errors import SharedError, UserError


if TYPE_CHECKING:
    import torch


def world_size() -> int:
    """The number of processes of this run, known before the Accelerator exists."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_world_size() -> int:
    """The number of processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def on_main(function: Callable[[], Any]) -> Any:
    """Call `function` on the main process and broadcast what it returns, which must be picklable, to all ranks.

    Raises:
        SharedError: on every rank, if it raised a UserError.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

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


def note(text: str) -> None:
    """Print a line for the user on stderr, once: on rank 0, whether or not the process group exists yet."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr, flush=True)


def note_missing_processes() -> None:
    """Say so if `accelerate launch --cpu --num_processes N` started one process instead of N.

    Of N it then passes on only the address at which the processes would have met.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        note(
            "`accelerate launch` started one process: with --cpu it ignores --num_processes; for several, pass "
            "--config_file accelerate_configs/multi_cpu.yaml --num_processes N instead of --cpu"
        )


def cpu_asked() -> bool:
    """Whether this run must stay on the CPU: `use_cpu: true` in the accelerate config, or every GPU hidden.

    Accelerator(cpu=cpu_asked()) lets the processes of multi_cpu.yaml find each other: accelerate passes the setting
    on to single-process runs only, and otherwise takes each process for a run of its own.
    """
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return asked or os.environ.get("CUDA_VISIBLE_DEVICES", "all").startswith("-1")


def device_name(device: "torch.device") -> str:
    """A name for people: the GPU's product name, or the CPU's architecture and threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return device.type


def missing_gpu() -> list[str]:
    """One line if the launch command asks for a GPU and torch finds none, when accelerate would fall back to the CPU
    silently; or if it starts more processes than this machine has GPUs."""
    import torch

    if cpu_asked():
        return []
    local_processes = local_world_size()
    gpus = torch.accelerator.device_count()
    if 0 < gpus < local_processes:
        return [
            f"the launch command starts {local_processes} processes on this machine, but it has {gpus} GPU(s); pass "
            f"--num_processes {gpus}"
        ]

    # A config for GPUs is recognised by its 16-bit precision, or by several processes.
    from_config = "ACCELERATE_USE_CPU" in os.environ
    half_precision = from_config and os.environ.get("ACCELERATE_MIXED_PRECISION") in ("bf16", "fp16", "fp8")
    wants_gpu = half_precision or world_size() > 1
    if not wants_gpu or gpus:
        return []
    return [
        "the launch command asks for a GPU, but torch finds none; use accelerate_configs/cpu.yaml or multi_cpu.yaml "
        "(with torchrun: set ACCELERATE_USE_CPU=true), or install a torch build for this machine's GPU"
    ]


def use_all_cores() -> None:
    """Share all cores among the processes of a CPU run: `accelerate launch` sets OMP_NUM_THREADS=1 unless the config
    says `use_cpu: true`."""
    import torch

    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    sized_by_accelerate = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if launched and not sized_by_accelerate and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_world_size()))


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees for its next allocations, with glibc's malloc.

    glibc returns large blocks to the system, so every training step on a CPU would have its gigabytes of activations
    mapped and zeroed anew, page by page.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4  # malloc.h's M_TRIM_THRESHOLD and M_MMAP_MAX
    libc.mallopt(trim_threshold, -1)  # never trim the heap
    libc.mallopt(mmap_max, 0)  # allocate nothing outside it


# ---- worker processes ----


def end_with_parent(parent: BaseProcess) -> None:
    """End this process when `parent` ends, even if it is killed; a daemon thread waits for it."""

    def wait_and_end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()
