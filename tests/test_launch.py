"""scripts/launch.py, and what plain launchers say of a script that fails: exit codes, signals, the last line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.utils.other import get_free_port

from gpt2repro.processes import note_missing_processes
from gpt2repro.train.stopping import SIGNALS, StopRequest


ROOT = Path(__file__).resolve().parents[1]
SAVES = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from gpt2repro.train.stopping import StopRequest
stop = StopRequest(0.0)
rank = os.environ.get("RANK", "0")
open("ready" + rank, "w").close()
while stop.reason is None:
    time.sleep(0.1)
stop.ignore_signals()
time.sleep(4 if rank == "0" else 0)  # the last rank to report is still there when the first has exited
print("saved", rank, flush=True)
sys.exit(75)
"""
FAILS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from gpt2repro.errors import UserError, run_script
def main(argv):
    raise UserError("--x 1: must be 2\\n--y: is missing")
run_script(main)
"""


@pytest.fixture
def launch(tmp_path):
    started = []

    def start(code, processes, *launcher):
        (tmp_path / "script.py").write_text(code)
        flags = ["--config_file", ROOT / "accelerate_configs" / f"{'multi_cpu' if processes > 1 else 'cpu'}.yaml"]
        command = [sys.executable, *launcher, *flags, "--num_processes", processes, "script.py"]
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("processes, number", [(1, signal.SIGTERM), (2, signal.SIGHUP), (2, signal.SIGINT)])
def test_a_signal_to_the_launcher_keeps_exit_code_75_and_every_report(launch, tmp_path, processes, number):
    process = launch(SAVES, processes, ROOT / "scripts" / "launch.py")
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"ready{rank}").exists() for rank in range(processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert sorted(stdout.splitlines()) == [f"saved {rank}" for rank in range(processes)]
    assert "Traceback" not in stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_last_lines_are_the_scripts_own(launch, processes):
    process = launch(FAILS, processes, ROOT / "scripts" / "launch.py")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in stderr
    assert stderr.splitlines()[-2:] == ["error: --x 1: must be 2", "error: --y: is missing"]


@pytest.mark.slow
def test_plain_accelerate_launch_repeats_the_error_at_the_end_of_its_report(launch):
    process = launch(FAILS, 2, "-m", "accelerate.commands.launch")
    _, stderr = process.communicate(timeout=60)
    report = stderr[stderr.index("Root Cause") :]
    assert "error: --x 1: must be 2" in report and "error: --y: is missing" in report


@pytest.mark.slow
def test_a_machine_that_never_comes(launch):
    machine = ("--num_machines", 2, "--machine_rank", 1, "--main_process_ip", "127.0.0.1", "--rdzv_conf", "timeout=1")
    port = get_free_port()
    process = launch(SAVES, 2, ROOT / "scripts" / "launch.py", *machine, "--main_process_port", port)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in stderr
    assert "error: the machines have not found each other" in stderr.splitlines()[-1]


def test_a_closed_terminal_stops_a_run_unless_nohup_is_there():
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for handler, reason in ((signal.SIG_DFL, "SIGHUP"), (signal.SIG_IGN, None)):
            signal.signal(signal.SIGHUP, handler)
            stop = StopRequest(max_hours=0)
            signal.raise_signal(signal.SIGHUP)
            assert stop.reason == reason
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_one_process_instead_of_several_is_said(monkeypatch, capsys):
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    note_missing_processes()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("MASTER_PORT", "29500")
    note_missing_processes()
    assert "with --cpu it ignores --num_processes" in capsys.readouterr().err
