"""What tests change in the process of a preparation before prepare_data.py runs, one function each: sizes that make a
small corpus stand for a large one, and faults at a stated moment. Preparer gives them to its commands."""

import os
import resource
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import datasets
import huggingface_hub.utils._http as hub_http

from gpt2repro.prepare import executors, readers, retries
from gpt2repro.prepare.readers import Piece


# ---- sizes ----


def small_parts(part_bytes: int) -> None:
    """Cut the corpus into parts of so much text."""
    readers.PART_BYTES = part_bytes


def one_part_per_file() -> None:
    """Make every .jsonl file one part, whatever its size."""
    readers.PART_BYTES = 1
    readers.cut_file = lambda path, column, boundary=None: [Piece("json lines", str(path), 2, column=column, start=0)]


# ---- disks ----


def file_size_limit(max_bytes: int) -> None:
    """EFBIG: no file may grow beyond max_bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))


def unlimited_free_space() -> None:
    """Let the check of free space before the start pass."""
    shutil.disk_usage = lambda path: SimpleNamespace(free=2**50)


# ---- kills ----


def sigkill_before_change(number: int, directory: str, finished: bool) -> None:
    """SIGKILL right before the directory changes for the `number`-th time.

    Changes are files opened for writing, and files and folders made, renamed or removed; counted are those after
    (`finished`) or before manifest.json exists.
    """
    changes = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal changes
        if event == "open":
            path, _, flags = arguments
            is_change = str(path).startswith(directory) and flags & (os.O_WRONLY | os.O_RDWR)
        else:
            is_change = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        if is_change and os.path.exists(f"{directory}/manifest.json") == finished:
            changes += 1
            if changes == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


# ---- Slurm ----


def frequent_looks_at_the_queue() -> None:
    executors.POLL_SECONDS = 0.2


# ---- the Hub ----


def impatient_hub_client(part_bytes: int) -> None:
    """Wait milliseconds where the clients of the Hub wait seconds before another attempt, and attempt less often."""
    clock = vars(time) | {"sleep": lambda seconds: time.sleep(seconds / 1000)}
    hub_http.time = SimpleNamespace(**clock)
    datasets.config.STREAMING_READ_MAX_RETRIES = 2
    for name in ("READ_RETRY", "READ_SERVER_UNAVAILABLE_RETRY", "OPEN_RETRY"):
        setattr(datasets.config, f"STREAMING_{name}_INTERVAL", 0.01)
    retries.FIRST_DELAY = 0.01
    retries.ATTEMPTS = 3
    small_parts(part_bytes)


def log_in(token: str) -> None:
    """Use another access token than the server's environment has."""
    os.environ["HF_TOKEN"] = token
