"""Executors of the deduplication: datatrove's, on this machine, on Ray or under Slurm.

All of them skip tasks that are already completed, and the result does not depend on which one ran.
"""

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt2repro.errors import UserError, first_line
from gpt2repro.files import CHECKOUT
from gpt2repro.prepare.request import Execution


PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Stage:
    """Tasks that can run side by side once the stage before is complete.

    pipeline: datatrove's steps, which every task runs with its rank (0 ... tasks - 1) and world size (tasks).
    """

    name: str
    tasks: int
    pipeline: list


def run_stages(stages: list[Stage], output_dir: Path, execution: Execution) -> bool:
    """Run the stages in order; False if their Slurm jobs are submitted but not done.

    Raises:
        UserError: a task failed, or Slurm refused a job.
    """
    with _stderr_to(output_dir / "logs" / "console.log"):
        if execution.executor == "slurm":
            return _run_on_slurm(stages, output_dir, execution)
        _run_and_wait(stages, output_dir, execution)
        return True


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


def _run_and_wait(stages: list[Stage], output_dir: Path, execution: Execution) -> None:
    import multiprocess
    from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor

    # Imported once, by the process that the workers are forked from.
    multiprocess.set_forkserver_preload(
        ["__main__", "gpt2repro.prepare.deduplication", "datatrove.pipeline.dedup", "spacy"]
    )
    _end_forks_with_this_process()
    if execution.executor == "ray":
        import ray

        ray.init(ignore_reinit_error=True, log_to_driver=False)
    kind = RayPipelineExecutor if execution.executor == "ray" else LocalPipelineExecutor
    for number, stage in enumerate(stages, start=1):
        print(f"deduplication {number}/{len(stages)}: {stage.name}, {stage.tasks} tasks", flush=True)
        logs = output_dir / "logs" / stage.name
        workers = min(execution.num_workers, stage.tasks)
        run = kind(stage.pipeline, tasks=stage.tasks, workers=workers, logging_dir=str(logs))
        reason = "Ray does not say why"
        try:
            run.run()
        except Exception as error:  # whatever a task ran into: a damaged file, a full disk
            reason = first_line(error)
        incomplete = run.get_incomplete_ranks()
        if incomplete:
            raise UserError(
                f"deduplication: {len(incomplete)} of {stage.tasks} tasks of {stage.name} are not completed "
                f"({reason}); see {logs}/logs, fix the cause and repeat the command, which resumes there"
            )


def _end_forks_with_this_process() -> None:
    """datatrove forks a server for its queues, which would outlive this process if that is killed. Linux only."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        os.register_at_fork(after_in_child=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL))


# ---- Slurm ----


def _run_on_slurm(stages: list[Stage], output_dir: Path, execution: Execution) -> bool:
    """Whether all stages are complete; if not, submits the rest, unless their jobs are in the queue."""
    executors = _slurm_executors(stages, output_dir, execution)
    if not any(executor.get_incomplete_ranks() for executor in executors):
        return True
    if execution.slurm_partition is None:
        raise UserError("executor slurm needs --slurm_partition")
    missing = [command for command in ("sbatch", "squeue") if shutil.which(command) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} not found: executor slurm must be started where Slurm's commands are")

    jobs_file = output_dir / "logs" / "slurm_jobs"
    jobs = jobs_file.read_text() if jobs_file.exists() else ""
    if jobs and _in_the_queue(jobs):
        state = f"are in the queue: wait for them, or cancel them with `scancel {jobs.replace(',', ' ')}`"
    else:
        jobs = _submit(executors, output_dir)
        jobs_file.write_text(jobs)
        state = "are submitted"
    print(f"deduplication: Slurm jobs {jobs} {state}; when they are done, repeat this command")
    return False


def _in_the_queue(jobs: str) -> bool:
    listed = subprocess.run(["squeue", "--noheader", f"--jobs={jobs}"], capture_output=True)
    return bool(listed.stdout.strip())


def _submit(executors: list, output_dir: Path) -> str:
    """Submit the stages that are not complete; returns their job ids, separated by commas."""
    try:
        executors[-1].run()  # submits those it depends on first
    except subprocess.CalledProcessError as error:
        raise UserError(f"Slurm refused a job ({first_line(error)}); see {output_dir}/logs/console.log") from error
    return ",".join(str(executor.job_id) for executor in executors if executor.job_id != -1)  # -1: already complete


def _slurm_executors(stages: list[Stage], output_dir: Path, execution: Execution) -> list:
    """datatrove's executor of each stage, dependent on the one before."""
    from datatrove.executor import SlurmPipelineExecutor

    paths = {"PATH": Path(sys.executable).parent, "PYTHONPATH": CHECKOUT}
    environment = " ".join(f"{name}={shlex.quote(str(path))}:${name}" for name, path in paths.items())
    executors: list = []
    for stage in stages:
        executor = SlurmPipelineExecutor(
            stage.pipeline,
            tasks=stage.tasks,
            workers=execution.num_workers,
            partition=execution.slurm_partition,
            time=execution.slurm_time,
            qos=None,
            job_name=f"dedup_{stage.name}",
            env_command=f"export {environment}",
            logging_dir=str(output_dir / "logs" / stage.name),
            depends=executors[-1] if executors else None,
        )
        executors.append(executor)
    return executors
