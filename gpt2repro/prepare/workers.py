"""All parts of the corpus, prepared by this process or by several at a time.

The same command resumes whatever was interrupted, and the result is the same byte for byte for any number of processes
and interruptions: plan.py decides what is made, and only finished parts count.
"""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from gpt2repro.errors import UserError
from gpt2repro.prepare.parts import Counts, Job, finished_parts, prepare_part
from gpt2repro.prepare.plan import PartRecord, Quota, plan
from gpt2repro.prepare.readers import Piece
from gpt2repro.prepare.retries import with_retries
from gpt2repro.processes import end_with_parent


@dataclass(frozen=True)
class Task:
    """A part to make."""

    number: int
    pieces: tuple[Piece, ...]
    quota: Quota


class Scoreboard:
    """Counts of each part, in memory that all processes share. Without a lock, because its holder may be killed; each
    row is written by one process only."""

    def __init__(self, shared):
        self.counts = np.frombuffer(shared, np.int64).reshape(-1, len(Counts._fields))

    def set(self, number: int, counts: Counts) -> None:
        self.counts[number] = counts

    def total(self) -> Counts:
        return Counts(*self.counts.sum(axis=0).tolist())


def prepare_parts(
    parts: Sequence[tuple[Piece, ...]],
    job: Job,
    quota: Quota,
    num_workers: int,
    progress: Callable[[Counts], None],
) -> list[PartRecord]:
    """Make all parts that are missing; returns the records of the parts that are used, in order.

    Args:
        progress: called about twice a second with the counts of all parts.
    Raises:
        UserError: as prepare_part; finished parts are kept.
    """
    job.directory.parts.mkdir(exist_ok=True)
    for unfinished in job.directory.parts.glob("*.tmp"):
        unfinished.unlink()
    records = finished_parts(job)
    context = multiprocessing.get_context("spawn")  # a forked process could inherit locks that are never released
    shared = context.RawArray("q", len(parts) * len(Counts._fields))
    scoreboard = Scoreboard(shared)
    for number, record in records.items():
        counts = Counts(record.total("documents"), record.total("tokens"), record.total("bytes"))
        scoreboard.set(number, counts)

    def show() -> None:
        progress(scoreboard.total())

    def next_tasks() -> list[Task]:
        todo = plan(len(parts), records, quota).todo
        return [Task(number, parts[number], part_quota) for number, part_quota in todo]

    if num_workers == 1:
        while tasks := next_tasks():
            records[tasks[0].number] = _prepare_with_retries(tasks[0], job, scoreboard, show)
    else:
        executor = ProcessPoolExecutor(num_workers, context, _start_worker, (job, shared))
        with _stopping(executor):
            _run_workers(executor, num_workers, next_tasks, records, show)
    used = plan(len(parts), records, quota).used
    return [records[number] for number in range(used)]


def _run_workers(
    executor: ProcessPoolExecutor,
    num_workers: int,
    next_tasks: Callable[[], list[Task]],
    records: dict[int, PartRecord],
    show: Callable[[], None],
) -> None:
    """Keep the workers busy with the most urgent tasks until none is left; fills `records`."""
    running: dict[Future, int] = {}  # -> number of the part
    try:
        while tasks := next_tasks():
            for task in tasks:
                if len(running) < num_workers and task.number not in running.values():
                    with _without_interrupts():
                        running[executor.submit(_work, task)] = task.number
            done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            show()
            for future in done:
                records[running.pop(future)] = future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process was killed, perhaps because memory ran out; finished parts are kept: repeat the command, with "
            "fewer --num_workers"
        ) from error


def _prepare_with_retries(
    task: Task, job: Job, scoreboard: Scoreboard, show: Callable[[], None] = lambda: None
) -> PartRecord:
    """prepare_part, from its start again if a remote source fails."""

    def progress(counts: Counts) -> None:
        scoreboard.set(task.number, counts)
        show()

    def attempt() -> PartRecord:
        scoreboard.set(task.number, Counts(0, 0, 0))
        return prepare_part(task.number, task.pieces, job, task.quota, progress)

    return with_retries(attempt)


# ---- worker processes ----

_worker_state: list[tuple[Job, Scoreboard]] = []  # of a worker process; an executor's initializer can return nothing


def _start_worker(job: Job, shared) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:  # a killed command may be started again at once, and the directory is then another's
        end_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_state.append((job, Scoreboard(shared)))


def _work(task: Task) -> PartRecord:
    job, scoreboard = _worker_state[0]
    return _prepare_with_retries(task, job, scoreboard)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Hold back Ctrl-C until the end; processes started here never receive it, as the main process handles it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _stopping(executor: ProcessPoolExecutor) -> Iterator[None]:
    """Terminate the processes at the end, even in the middle of a part; the next run removes what they leave."""
    try:
        yield
    finally:
        processes = list((executor._processes or {}).values())
        executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
