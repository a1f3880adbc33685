"""prepare_data.py as a command that starts in milliseconds and can be killed; helpers to read its output."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from fork_server import ForkServer


IMPORTS = """
import json
import datasets, fsspec, pyarrow.parquet
from transformers import AutoTokenizer, PreTrainedTokenizerFast
import prepare_data
from gpt2repro.prepare import corpora, readers, retries
"""


class Preparer(ForkServer):
    """`with Preparer(folder, environment) as preparer`; `folder` receives the commands' output."""

    def __init__(self, folder: Path, environment: dict | None = None):
        super().__init__(IMPORTS, environment or {})
        self.folder, self.commands = folder, 0

    def start(self, *argv, before: str = "") -> "Command":
        """Start a command.

        Args:
            before: Python code that its process runs first; corpora, readers and retries are imported.
        """
        self.commands += 1
        output = self.folder / f"{self.commands}.txt"
        return Command(self, super().start(["prepare_data.py", *argv], output, output, before), output)

    def run(self, *argv, before: str = "") -> "Command":
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
        try:
            self.status = self.preparer.wait(self.pid)
        except AssertionError:
            os.killpg(self.pid, signal.SIGKILL)
            raise
        return self.status

    def kill(self, signal_number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, signal_number)

    def until(self, condition):
        """Wait for a condition that holds before the command ends; returns its value."""
        return until(lambda: condition() or (not alive(self.pid) and pytest.fail(f"the command ended: {self.lines}")))

    @property
    def lines(self) -> list[str]:
        """What it printed, without the progress bar."""
        printed = self.output.read_text().replace("\r", "\n").splitlines() if self.output.exists() else []
        return [line for line in printed if line and "process: " not in line and "processes: " not in line]

    def children(self) -> list[int]:
        """Its worker processes."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
                if parent == self.pid and b"spawn_main" in (stat.parent / "cmdline").read_bytes():
                    found.append(int(stat.parent.name))
            except OSError:  # the process has ended
                continue
        return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition, seconds: float = 60):
    """Wait for a condition; returns its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.002)
    return value


# ---- what a prepared directory holds ----


def contents(directory: Path) -> dict[str, bytes]:
    """All files."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


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
