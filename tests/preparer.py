"""prepare_data.py as a command that starts in milliseconds and can be killed; helpers to read its output."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from fork_server import ForkServer
from support import wait_until


MODULES = [
    "prepare_data",
    "preparer_faults",
    # What a command imports only when it needs it. The first imports torch, which takes seconds.
    "transformers.models.auto.tokenization_auto",
    "fsspec.implementations.http",
    "pyarrow.parquet",
]


class Preparer(ForkServer):
    """`with Preparer(folder, environment) as preparer`; `folder` receives the commands' output."""

    def __init__(self, folder: Path, environment: dict | None = None):
        super().__init__(MODULES, environment or {})
        self.folder, self.commands = folder, 0

    def start(self, *argv, before: Sequence[Callable] = ()) -> "Command":
        """Start a command; `before` as in ForkServer.start, usually from preparer_faults."""
        self.commands += 1
        output = self.folder / f"{self.commands}.txt"
        return Command(self, super().start(["prepare_data.py", *argv], output, output, before), output)

    def run(self, *argv, before: Sequence[Callable] = ()) -> "Command":
        """Start a command and wait for it."""
        command = self.start(*argv, before=before)
        command.wait()
        return command


class Command:
    """A command in a process group of its own."""

    def __init__(self, preparer: Preparer, pid: int, output: Path):
        self.preparer, self.pid, self.output = preparer, pid, output
        self.status: int | None = None

    def wait(self) -> int:
        """Its exit status; the negative signal number if it was killed."""
        self.status = self.preparer.wait(self.pid)
        return self.status

    def kill(self, signal_number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, signal_number)

    def wait_until(self, condition: Callable):
        """Wait until `condition` returns something true, which it must before the command ends; return that."""

        def value_while_alive():
            value = condition()
            if not value and not alive(self.pid):
                pytest.fail(f"the command has ended: {self.lines}")
            return value

        return wait_until(value_while_alive, lambda: self.lines)

    @property
    def lines(self) -> list[str]:
        """What it printed, without the progress bar."""
        printed = self.output.read_text().replace("\r", "\n").splitlines() if self.output.exists() else []
        noise = ("process: ", "processes: ")
        return [line for line in printed if line and not any(words in line for words in noise)]

    @property
    def messages(self) -> list[str]:
        """Its lines without the estimate of the space that it needs."""
        return [line for line in self.lines if not line.startswith("needs about ")]

    def workers(self) -> list[int]:
        """The process ids of its worker processes."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
                if parent == self.pid and b"spawn_main" in (stat.parent / "cmdline").read_bytes():
                    found.append(int(stat.parent.name))
            except OSError:  # the process has ended
                continue
        return found

    def wait_for_workers(self, count: int) -> list[int]:
        """The process ids of its workers, once there are so many."""

        def all_workers():
            found = self.workers()
            return found if len(found) == count else None

        return self.wait_until(all_workers)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- what a prepared directory holds ----


def manifest_of(directory: Path) -> dict:
    return json.loads((directory / "manifest.json").read_text())


def tokens_of(directory: Path, split: str) -> np.ndarray:
    shards = manifest_of(directory)["splits"][split]["shards"]
    return np.concatenate([np.load(directory / shard["file"]) for shard in shards] or [np.empty(0, np.uint16)])


def documents_of(directory: Path, split: str) -> list[str]:
    """The texts of a split."""
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer" / "tokenizer.json"))
    tokens = tokens_of(directory, split)
    starts = np.flatnonzero(tokens == manifest_of(directory)["tokenizer"]["eot_id"])
    return [backend.decode(part[1:].tolist(), skip_special_tokens=False) for part in np.split(tokens, starts)[1:]]
