"""Where the work runs: on this machine, on Ray or under Slurm, by datatrove's executors.

The deduplication runs its stages on any of them; the tokenization (workers.py) uses processes of its own, Ray's tasks
or Slurm's job arrays. Completed tasks are skipped, and the result does not depend on where they ran.
"""

import contextlib
import ctypes
import importlib.util
import logging
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from gpt2repro.errors import UserError, first_line, refuse
from gpt2repro.files import CHECKOUT, write_text
from gpt2repro.prepare.request import Execution


PR_SET_PDEATHSIG = 1  # linux/prctl.h
SLURM_JOBS = "slurm_jobs"  # in a folder of logs: the names of jobs that may be in Slurm's queue
POLL_SECONDS = 5.0  # between looks at the queue


@dataclass(frozen=True)
class Stage:
    """Tasks that can run side by side once the stage before is complete.

    pipeline: datatrove's steps, which every task runs with its rank (0 ... tasks - 1) and world size (tasks).
    """

    name: str
    tasks: int
    pipeline: list


def check_executor(execution: Execution) -> None:
    """Raise UserError for what the executor lacks, a line each."""
    needed = {"local": [], "ray": ["ray"], "slurm": ["datatrove", "orjson"]}[execution.executor]
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    problems = []
    if missing:
        problems.append(
            f'--executor {execution.executor} needs {" and ".join(missing)}; pip install "gpt2repro[cluster]"'
        )
    if execution.executor == "slurm":
        if execution.slurm_partition is None:
            problems.append("--executor slurm needs --slurm_partition NAME; `sinfo` lists them")
        commands = [command for command in ("sbatch", "squeue") if shutil.which(command) is None]
        if commands:
            problems.append(
                f"--executor slurm: {' and '.join(commands)} not found; start it where Slurm's commands are installed"
            )
    refuse(problems)


def run_stages(stages: list[Stage], output_dir: Path, execution: Execution) -> None:
    """Run the stages in order.

    Raises:
        UserError: a task failed, or Slurm refused a job.
    """
    logs = output_dir / "logs"
    wait_for_jobs(logs)  # of an earlier command, whatever runs the rest
    if execution.executor == "slurm":
        for stage, executor in zip(stages, run_on_slurm(stages, logs, execution)):
            _refuse_incomplete(stage, executor, "Slurm's logs may say why")
    else:
        with _stderr_to(logs / "console.log"):
            _run_and_wait(stages, logs, execution)


def _refuse_incomplete(stage: Stage, executor, reason: str) -> None:
    incomplete = executor.get_incomplete_ranks()
    if incomplete:
        raise UserError(
            f"deduplication: {len(incomplete)} of {stage.tasks} tasks of {stage.name} are not completed ({reason}); "
            f"see {executor.logging_dir.path}, fix the cause and repeat the command, which resumes there"
        )


@contextlib.contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Append what this process and its children write to stderr to a file: datatrove logs many pages."""
    path.parent.mkdir(exist_ok=True)
    console = os.dup(2)
    with path.open("a") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(console, 2)
        os.close(console)


# ---- this machine and Ray ----


def start_ray():
    """The module `ray`, connected to the cluster of RAY_ADDRESS or to one that it starts on this machine."""
    import ray

    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            remedy = "check RAY_ADDRESS, and set RAY_AUTH_MODE as on the cluster: `ray start` takes token by itself"
            raise UserError(f"{first_line(error)}; {remedy}") from error
    return ray


def _run_and_wait(stages: list[Stage], logs: Path, execution: Execution) -> None:
    import multiprocess
    from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor

    # Imported once, by the process that the workers are forked from.
    multiprocess.set_forkserver_preload(
        ["__main__", "gpt2repro.prepare.deduplication", "datatrove.pipeline.dedup", "spacy"]
    )
    _end_forks_with_this_process()
    if execution.executor == "ray":
        start_ray()
    kind = RayPipelineExecutor if execution.executor == "ray" else LocalPipelineExecutor
    for number, stage in enumerate(stages, start=1):
        print(f"deduplication {number}/{len(stages)}: {stage.name}, {stage.tasks} tasks", flush=True)
        workers = min(execution.num_workers, stage.tasks)
        run = kind(stage.pipeline, tasks=stage.tasks, workers=workers, logging_dir=str(logs / stage.name))
        reason = "Ray does not say why"
        try:
            run.run()
        except Exception as error:  # whatever a task ran into: a damaged file, a full disk
            reason = first_line(error)
        _refuse_incomplete(stage, run, reason)


def _end_forks_with_this_process() -> None:
    """datatrove forks a server for its queues, which would outlive this process if that is killed. Linux only."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        os.register_at_fork(after_in_child=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL))


# ---- Slurm ----


def run_on_slurm(
    stages: list[Stage], logs: Path, execution: Execution, progress: Callable[[], None] = lambda: None
) -> list:
    """Submit the tasks that are not completed, each stage as a job array that follows the one before, and wait until
    they have left the queue, completed or not.

    Args:
        logs: a folder for each stage; and for the names of the jobs, from before they are submitted.
        progress: called at least once, and after each look at the queue.
    Returns:
        datatrove's executors, which know what is completed.
    Raises:
        UserError: Slurm refused a job.
    """
    executors = _slurm_executors(stages, logs, execution)
    if any(executor.get_incomplete_ranks() for executor in executors):
        logs.mkdir(exist_ok=True)
        write_text(logs / SLURM_JOBS, ",".join(executor.job_name for executor in executors))
        try:
            with _stderr_to(logs / "console.log"):
                executors[-1].run()  # submits those it depends on first
        except subprocess.CalledProcessError as error:
            told = [line for line in (logs / "console.log").read_text().splitlines() if line.startswith("sbatch: ")]
            raise UserError(f"Slurm refused a job ({(told or [first_line(error)])[-1]}); see {logs}") from error
        wait_for_jobs(logs, progress)
    progress()
    return executors


def wait_for_jobs(logs: Path, progress: Callable[[], None] = lambda: None) -> None:
    """Wait for the jobs that this command, or an earlier one that was interrupted, has submitted from here."""
    path = logs / SLURM_JOBS
    if not path.exists():
        return
    if shutil.which("squeue") is None:
        raise UserError(f"Slurm jobs may be working here; repeat the command where squeue is, or delete {path}")
    names = path.read_text()
    look = ["squeue", "--noheader", f"--name={names}"]
    queue = subprocess.run(look, capture_output=True, text=True)
    if queue.returncode:
        reason = queue.stderr.strip().splitlines()[-1]
        raise UserError(f"cannot look for the Slurm jobs {names} ({reason}); repeat the command later")
    if queue.stdout.strip():
        tqdm.write(f"waiting for the Slurm jobs {names}; if this is interrupted, repeat the command")
    while queue.stdout.strip() or queue.returncode:  # later Slurm may stop answering for a while
        time.sleep(POLL_SECONDS)
        progress()
        queue = subprocess.run(look, capture_output=True, text=True)
    path.unlink()


def _slurm_executors(stages: list[Stage], logs: Path, execution: Execution) -> list:
    """datatrove's executor of each stage, dependent on the one before."""
    from datatrove.executor import SlurmPipelineExecutor

    paths = {"PATH": Path(sys.executable).parent, "PYTHONPATH": CHECKOUT}
    environment = " ".join(f"{name}={shlex.quote(str(path))}:${name}" for name, path in paths.items())
    suffix = secrets.token_hex(4)  # by which the queue knows these jobs from those for other directories
    executors: list = []
    for stage in stages:
        executor = SlurmPipelineExecutor(
            stage.pipeline,
            tasks=stage.tasks,
            workers=execution.num_workers,
            partition=execution.slurm_partition,
            time=execution.slurm_time,
            qos=None,
            job_name=f"{stage.name}_{suffix}",
            env_command=f"export {environment}",
            logging_dir=str((logs / stage.name).resolve()),
            depends=executors[-1] if executors else None,
            sbatch_args={"kill-on-invalid-dep": "yes"},  # no job waits for ever for one that failed
            with_srun=False,  # a task is one process; srun would fail while Slurm's controller restarts
        )
        executors.append(executor)
    return executors
