"""A command that benchmarks kill: its whole process tree, or its first process alone, which the others must notice."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import psutil


ROOT = Path(__file__).resolve().parents[1]
MINUTE = 60.0  # seconds


class Killable:
    """A Python command, which can be started repeatedly.

    Args:
        command: the arguments of the interpreter.
        log: where all starts append what they print.
    """

    def __init__(self, command: list, log: Path):
        self.command, self.log = [sys.executable, *map(str, command)], log

    def start(self) -> None:
        self.log_start = self.log.stat().st_size if self.log.exists() else 0
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # sums depend on the number of threads
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=ROOT
            )

    def reaches(self, moment: float) -> bool:
        """Wait `moment` seconds; False: the command ended first."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(moment)
        return self.process.poll() is None

    def kill(self, alone: bool) -> list[psutil.Process]:
        """Kill the first process, and unless `alone` all others too; returns those that have to end by themselves."""
        first = psutil.Process(self.process.pid)
        others = first.children(recursive=True)  # torchrun starts each in its own session
        first.kill()
        self.process.wait()
        if alone:
            return others
        _end(others)
        return []

    def wait(self) -> int:
        return self.process.wait()

    def printed(self) -> str:
        """By the last start."""
        return self.log.read_bytes()[self.log_start :].decode()


def count_outlived(orphans: list[psutil.Process]) -> int:
    """How many processes are still alive after a minute; kills those."""
    alive = psutil.wait_procs(orphans, timeout=MINUTE)[1]
    _end(alive)
    return len(alive)


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes)
