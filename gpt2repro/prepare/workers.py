"""All parts of the corpus, prepared by this process, by several, or by the tasks of a Ray or Slurm cluster.

The same command resumes whatever was interrupted, and the result is the same byte for byte for any number of processes
and interruptions, here or on a cluster: plan.py decides what is made, and only finished parts count.
"""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from gpt2repro.errors import UserError, first_line
from gpt2repro.files import delete, write_text
from gpt2repro.prepare.executors import Stage, run_on_slurm, start_ray, wait_for_jobs
from gpt2repro.prepare.parts import Counts, Job, finished_parts, prepare_part
from gpt2repro.prepare.plan import PartRecord, Quota, plan
from gpt2repro.prepare.readers import Piece
from gpt2repro.prepare.request import Execution
from gpt2repro.prepare.retries import with_retries
from gpt2repro.processes import end_with_parent


KEPT = "finished parts are kept: repeat the command"
STAGE = "tokenization"  # the name of Slurm's jobs, and of the folder of their logs


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

    def set_finished(self, number: int, record: PartRecord) -> None:
        self.set(number, Counts(record.total("documents"), record.total("tokens"), record.total("bytes")))

    def total(self) -> Counts:
        return Counts(*self.counts.sum(axis=0).tolist())


def prepare_parts(
    parts: Sequence[tuple[Piece, ...]],
    job: Job,
    quota: Quota,
    execution: Execution,
    progress: Callable[[Counts], None],
) -> list[PartRecord]:
    """Make all parts that are missing; returns the records of the parts that are used, in order.

    Args:
        progress: called about twice a second with the counts of all parts; on a cluster these are of finished parts.
    Raises:
        UserError: as prepare_part; finished parts are kept.
    """
    job.directory.parts.mkdir(exist_ok=True)
    wait_for_jobs(job.directory.logs)  # of an earlier command, whatever runs the rest
    for unfinished in job.directory.parts.glob("*.tmp"):
        unfinished.unlink()
    records = finished_parts(job)
    context = multiprocessing.get_context("spawn")  # a forked process could inherit locks that are never released
    shared = context.RawArray("q", len(parts) * len(Counts._fields))
    scoreboard = Scoreboard(shared)
    for number, record in records.items():
        scoreboard.set_finished(number, record)

    def show() -> None:
        progress(scoreboard.total())

    def next_tasks() -> list[Task]:
        todo = plan(len(parts), records, quota).todo
        return [Task(number, parts[number], part_quota) for number, part_quota in todo]

    def finish(task: Task, record: PartRecord) -> None:
        records[task.number] = record
        scoreboard.set_finished(task.number, record)

    if execution.executor == "slurm":
        _run_on_slurm(job, execution, next_tasks, finish, show)
    elif execution.executor == "ray":
        with _ray_tasks(job) as submit:
            _run_side_by_side(submit, execution.num_workers, next_tasks, finish, show)
    elif execution.num_workers == 1:
        while tasks := next_tasks():
            finish(tasks[0], _prepare_with_retries(tasks[0], job, scoreboard, show))
    else:
        with _worker_processes(execution.num_workers, context, job, shared) as submit:
            _run_side_by_side(submit, execution.num_workers, next_tasks, finish, show)
    show()
    used = plan(len(parts), records, quota).used
    return [records[number] for number in range(used)]


def _run_side_by_side(
    submit: Callable[[Task], Future],
    num_workers: int,
    next_tasks: Callable[[], list[Task]],
    finish: Callable[[Task, PartRecord], None],
    show: Callable[[], None],
) -> None:
    """Keep so many tasks running, the most urgent first, until none is left."""
    running: dict[Future, Task] = {}
    while tasks := next_tasks():
        for task in tasks:
            if len(running) < num_workers and all(task.number != other.number for other in running.values()):
                running[submit(task)] = task
        done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
        show()
        for future in done:
            finish(running.pop(future), future.result())


def _prepare_with_retries(
    task: Task, job: Job, scoreboard: Scoreboard | None = None, show: Callable[[], None] = lambda: None
) -> PartRecord:
    """prepare_part, from its start again if a remote source fails."""

    def progress(counts: Counts) -> None:
        if scoreboard is not None:
            scoreboard.set(task.number, counts)
        show()

    def attempt() -> PartRecord:
        progress(Counts(0, 0, 0))
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
def _worker_processes(num_workers: int, context, job: Job, shared) -> Iterator[Callable[[Task], Future]]:
    """Processes of this machine, terminated at the end even in the middle of a part; the next run removes what they
    leave."""
    executor = ProcessPoolExecutor(num_workers, context, _start_worker, (job, shared))

    def submit(task: Task) -> Future:
        with _without_interrupts():
            return executor.submit(_work, task)

    try:
        yield submit
    except BrokenProcessPool as error:
        raise UserError(
            f"a process was killed, perhaps because memory ran out; {KEPT}, with fewer --num_workers"
        ) from error
    finally:
        processes = list((executor._processes or {}).values())
        executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


# ---- Ray ----


@contextlib.contextmanager
def _ray_tasks(job: Job) -> Iterator[Callable[[Task], Future]]:
    """Tasks of one CPU each on the cluster. Ray itself repeats those whose machine or process dies, and ends all of
    them with this process."""
    ray = start_ray()
    work, shared_job, folder = ray.remote(_work_in), ray.put(job), os.getcwd()
    try:
        yield lambda task: work.remote(folder, task, shared_job).future()
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise UserError(f"Ray lost a task ({first_line(error)}); {KEPT}") from error


def _work_in(folder: str, task: Task, job: Job) -> PartRecord:
    """Make a part in a process that was started elsewhere: paths may be relative to the folder of the command."""
    os.chdir(folder)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return _prepare_with_retries(task, job)


# ---- Slurm ----


def _run_on_slurm(
    job: Job,
    execution: Execution,
    next_tasks: Callable[[], list[Task]],
    finish: Callable[[Task, PartRecord], None],
    show: Callable[[], None],
) -> None:
    """Submit all tasks as a job array, wait for it, and do so again while the plan has more: of the parts that were
    made under a wrong guess, at most. With a limit it is unknown how many parts there will be, so that an array has as
    many tasks as run at a time."""
    logs = job.directory.logs
    while tasks := next_tasks():
        if tasks[0].quota.is_limited:
            tasks = tasks[: execution.num_workers]
        delete(logs / STAGE)  # its tasks were others
        stage = Stage(STAGE, len(tasks), [partial(_work_of_rank, tasks=tasks, job=job)])
        missing = dict(enumerate(tasks))
        run_on_slurm([stage], logs, execution, partial(_collect, missing, job, finish, show))
        if missing:
            reasons = [path.read_text() for rank in missing if (path := _reason(job, rank)).exists()]
            reason = reasons[0] if reasons else "a job was cancelled, killed or out of time or memory"
            raise UserError(f"{len(missing)} of {len(tasks)} Slurm tasks failed: {reason}; see {logs / STAGE}; {KEPT}")


def _collect(
    missing: dict[int, Task], job: Job, finish: Callable[[Task, PartRecord], None], show: Callable[[], None]
) -> None:
    """Finish the tasks whose parts are made by now; `missing` keeps the others, by rank."""
    for rank, task in list(missing.items()):
        record = PartRecord.read(job.directory.record(task.number))
        if record is not None and record.quota == task.quota:
            del missing[rank]
            finish(task, record)
    show()


def _work_of_rank(data, rank: int, world_size: int, tasks: list[Task], job: Job) -> None:
    """The step of datatrove's pipeline; what went wrong is left in a file for the command that waits."""
    try:
        _work_in(".", tasks[rank], job)
    except Exception as error:
        write_text(_reason(job, rank), first_line(error))
        raise


def _reason(job: Job, rank: int) -> Path:
    return job.directory.logs / STAGE / f"failure_{rank:05d}.txt"
