"""scripts/slurm_train.sbatch with stand-ins for Slurm's commands and the trainer, on two "nodes" of this machine."""

import os
import runpy
import signal
import subprocess
import sys
from unittest import mock

import psutil
import pytest
from support import PATIENCE, ROOT, wait_until


SBATCH = ROOT / "scripts" / "slurm_train.sbatch"
SRUN = """#!/usr/bin/env bash
# Runs two tasks and exits with the highest of their exit codes, as srun does. The test signals what runs below.
shift  # --wait=60
for node in 0 1; do SLURM_NODEID=$node "$@" & done
code=0
for task in $(jobs -p); do wait "$task"; status=$?; ((status > code)) && code=$status; done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) printf '127.0.0.1\\nnode-1\\n' ;;
    requeue) echo "$2" >> requeued ;;
esac
"""


@pytest.fixture
def job(tmp_path):
    """Start the script as a Slurm job would, with slurm_trainer.py as the trainer."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    port = 23000 + os.getpid() % 5000  # which the script derives from the job id
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(port - 20000),
        "SLURM_JOB_NODELIST": "node-[0-1]",
        "SLURM_NNODES": "2",
        "GPUS_PER_NODE": "1",
        "CONFIG": str(ROOT / "accelerate_configs" / "multi_cpu.yaml"),
        "PYTHON": sys.executable,
        "SCRIPT": str(ROOT / "tests" / "slurm_trainer.py"),
        "OMP_NUM_THREADS": "1",
    }
    started = []

    def start(*flags):
        with (tmp_path / "log").open("a") as log:
            process = subprocess.Popen(
                ["bash", SBATCH, *flags], cwd=tmp_path, env=os.environ | environment, stdout=log, stderr=log
            )
        started.append(psutil.Process(process.pid))
        return process

    yield start
    for process in started:
        if process.is_running():
            for running in (*process.children(recursive=True), process):
                running.kill()


def requeued(tmp_path):
    return (tmp_path / "requeued").read_text().split() if (tmp_path / "requeued").exists() else []


@pytest.mark.slow
def test_the_signal_before_the_time_limit_stops_the_trainer_and_requeues_the_job(job, tmp_path):
    process = job("wait", "--max_steps", "5")
    ready = [tmp_path / f"ready-{rank}-of-2" for rank in range(2)]
    wait_until(lambda: all(path.exists() and path.read_text() for path in ready) or process.poll() is not None)
    log = tmp_path / "log"
    assert [path.read_text() for path in ready] == ["wait --max_steps 5"] * 2, log.read_text()
    script = psutil.Process(process.pid)
    step = [task for srun in script.children() for task in srun.children(recursive=True)]
    assert len(step) >= 4  # two launchers, two trainers
    for task in step:  # Slurm signals each process of the step, neither srun nor the script
        task.send_signal(signal.SIGUSR1)
    assert process.wait(PATIENCE) == 75, log.read_text()
    assert len(requeued(tmp_path)) == 1 and "requeued as job" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("end, code", [("finish", 0), ("crash", 3)])
def test_a_job_that_finishes_or_crashes_is_not_requeued(job, tmp_path, end, code):
    process = job(end)
    assert process.wait(PATIENCE) == code, (tmp_path / "log").read_text()
    assert requeued(tmp_path) == []


def test_the_launcher_leaves_the_processes_time_to_save(monkeypatch):
    """torchrun sends SIGKILL 30 seconds after the signal that it forwards, unless told otherwise."""
    monkeypatch.setattr("accelerate.commands.launch.launch_command", lambda arguments: None)
    monkeypatch.setattr(sys, "argv", ["launch.py", "train_accelerate.py"])
    with mock.patch.dict(os.environ):
        runpy.run_path(str(ROOT / "scripts" / "launch.py"), run_name="__main__")
        assert int(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) >= 600


@pytest.mark.slow
def test_slurm_is_asked_for_what_the_script_relies_on():
    asked = [line.split("#")[1] for line in SBATCH.read_text().splitlines() if line.startswith("#SBATCH")]
    options = dict(line.removeprefix("SBATCH --").strip().partition("=")[::2] for line in asked)
    assert options["signal"] == "USR1@300"  # to the steps; B: would send it to the script alone
    assert options["ntasks-per-node"] == "1" and options["open-mode"] == "append" and "requeue" in options
    subprocess.run(["bash", "-n", SBATCH], check=True)
