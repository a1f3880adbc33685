"""How a user's mistake ends: which processes print it, and with which remedy."""

import errno
import gc
import importlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import ROOT
from tqdm import tqdm

from gpt2repro import errors
from gpt2repro.errors import Parser, SharedError, UserError, check_before_imports, report_write_errors, run_script


@pytest.fixture
def printed(monkeypatch, capsys):
    """What a script prints that fails with this error on this rank, before there is a process group."""

    def run(error, rank):
        slept = []
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(errors.time, "sleep", slept.append)

        def main(argv):
            raise error

        with pytest.raises(SystemExit) as exit:
            run_script(main)
        assert exit.value.code == 2
        assert slept == (
            [errors.GRACE_SECONDS] if rank else []
        )  # the launcher kills it meanwhile if rank 0 failed, too
        return capsys.readouterr().err

    return run


def test_an_error_of_one_rank_alone_is_printed_after_rank_0_could_speak(printed):
    assert printed(UserError("one\ntwo"), rank=0) == "error: one\nerror: two\n"
    assert printed(UserError("one"), rank=1) == "error: one (rank 1)\n"
    assert printed(SharedError("one"), rank=0) == "error: one\n"
    assert printed(SharedError("one"), rank=1) == ""


def test_a_value_that_fills_the_screen_is_cut_in_the_middle(printed):
    stderr = printed(UserError(f"value={'x' * 70_000} is too long; shorten it"), rank=0)
    assert len(stderr) < 2000 and stderr.startswith("error: value=xxx") and stderr.endswith("shorten it\n")


def test_a_full_gpu_is_one_line(printed):
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 23.65 GiB of which 211.62 MiB "
        "is free. Process 1 has 20.00 GiB memory in use. See documentation for Memory Management"
    )
    assert printed(error, rank=0) == (
        "error: CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 23.65 GiB of which "
        "211.62 MiB is free; use a smaller batch, or hide the GPU with CUDA_VISIBLE_DEVICES=-1\n"
    )


@pytest.mark.parametrize(
    ("script", "words", "mistakes"),
    [
        ("sample", "./nope --num_samples 0 --temperature 0", ["--num_samples 0", "--temperature 0", "./nope does not"]),
        (
            "scorecard",
            "--weights-only ./nope ./no --text missing --tokens 0 --output no/such/folder",
            ["./nope does not exist", "./no does not exist", "--text missing", "--tokens 0", "--output no/such/folder"],
        ),
        (
            "scorecard",
            "./nope --tasks hellaswag2 --text no --limit 0 --data no",
            ["--limit 0", "--tasks hellaswag2", "./nope does not exist", "--text no", "data directory no"],
        ),
        ("eval_hellaswag", f"./nope --data {__file__}", ["line 1: not JSON", "./nope does not exist"]),
    ],
)
def test_all_mistakes_of_a_command_come_at_once(script, words, mistakes):
    with pytest.raises(UserError) as error:
        importlib.import_module(script).main(words.split())
    lines = str(error.value).splitlines()
    assert len(lines) == len(mistakes) and all(mistake in line for mistake, line in zip(mistakes, lines))


def test_a_full_memory_is_one_line(printed):
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert printed(error.value, rank=0).count("\n") == 1


def test_what_the_user_may_not_touch_is_one_line(printed):
    error = PermissionError(errno.EACCES, "Permission denied", "/theirs")
    assert printed(error, rank=0) == (
        "error: [Errno 13] Permission denied: '/theirs'; check its permissions, and those of the folders above it\n"
    )


@pytest.mark.parametrize("flag, options", [("--separator", {}), ("--separators", {"nargs": "+"})])
def test_a_value_that_begins_with_a_dash(flag, options):
    parser = Parser("")
    parser.add_argument(flag, **options)
    with pytest.raises(UserError, match=f"one that begins with - is given as {flag}=VALUE"):
        parser.parse_args([flag, "---"])
    assert "---" in vars(parser.parse_args([f"{flag}=---"]))[flag[2:]]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--num-samples 3", "; did you mean --num_samples?"),
        ("--samples=3", "; did you mean --num_samples?"),
        ("--x", ""),
    ],
)
def test_an_unknown_flag_is_told_with_the_nearest(given, meant):
    parser = Parser("")
    parser.add_argument("--num_samples", type=int)
    with pytest.raises(UserError) as error:
        parser.parse_args(given.split())
    assert str(error.value).startswith(f"unrecognized arguments: {given}{meant}; `python ")


def test_what_nobody_foresaw_is_a_line_and_its_traceback_is_kept(monkeypatch, capsys, tmp_path):
    def main(argv):
        raise KeyError("wte")

    monkeypatch.setattr(errors.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as exit:
        run_script(main)
    (log,) = tmp_path.glob("gpt2repro_*.log")
    assert exit.value.code == 1
    assert capsys.readouterr().err == (
        f"error: unexpected KeyError: 'wte'; the traceback is in {log}, please report it\n"
    )
    assert 'raise KeyError("wte")' in log.read_text()
    monkeypatch.setattr(errors.sys, "flags", SimpleNamespace(dev_mode=True))
    with pytest.raises(KeyError):
        run_script(main)


def test_an_error_begins_on_a_line_of_its_own(printed):
    stderr = io.StringIO()
    with tqdm(total=9, file=stderr):
        assert printed(UserError("one"), rank=0) == "error: one\n"
        assert stderr.getvalue().endswith("\n")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EACCES, "make it writable, or choose another directory"),
        (errno.EROFS, "make it writable, or choose another directory"),
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EISDIR, "correct that"),
    ],
)
def test_the_remedy_fits_the_reason(number, remedy):
    with pytest.raises(UserError, match=remedy) as error, report_write_errors("runs/x"):
        raise OSError(number, "no")
    assert str(error.value).startswith("cannot write runs/x ([Errno ")


def test_a_name_that_is_too_long_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit) as end:
        run_script(lambda argv: (tmp_path / ("a" * 300)).exists())
    assert end.value.code == 2 and "; choose a shorter name" in capsys.readouterr().err


def head(program: str, *flags: str, stderr=subprocess.PIPE) -> subprocess.CompletedProcess:
    """Run a Python program of which one byte is read, as by `| head -c 1`."""
    command = [sys.executable, *flags, "-c", f"from gpt2repro.errors import *\n{program}"]
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    with subprocess.Popen(command, cwd=ROOT, env=buffered, stdout=subprocess.PIPE, stderr=stderr) as process:
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read() if process.stderr else b""
    return subprocess.CompletedProcess(command, process.returncode, stderr=errors.decode())


WITH_CONTEXT = "with quiet_broken_pipe(): main()"
PRINTS = "def main(argv=None):\n    print('.', flush=True)\n    for _ in range(99_999): print('a line')\n"


WITHIN_WRITES = "def write(argv):\n    with report_write_errors('a run'): main()\nrun_script(write)"


@pytest.mark.slow
@pytest.mark.parametrize("start", ["run_script(main)", "check_before_imports(main)", WITH_CONTEXT, WITHIN_WRITES])
def test_a_script_whose_reader_has_read_enough_ends_quietly(start):
    for flags in ([], ["-u"]):
        done = head(PRINTS + start, *flags)
        assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.slow
@pytest.mark.parametrize("end", ["print('the last line')", "raise errors.UserError('one')"])
def test_what_is_unread_may_be_the_last_lines_alone(end):
    """Lines that are written when Python exits, unless somebody flushes them before; or an error."""
    waits = "import time\nfrom gpt2repro import errors\nwhile not errors._nobody_reads(): time.sleep(0.01)\n"
    program = f"def main(argv):\n    print('.', flush=True)\n    exec({waits!r})\n    {end}\nrun_script(main)"
    done = head(f"from gpt2repro import errors\n{program}", stderr=subprocess.STDOUT)
    assert done.returncode == 128 + signal.SIGPIPE


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_an_output_that_is_full_is_one_line():
    command = [sys.executable, "-c", "from gpt2repro.errors import *\nrun_script(lambda argv: print('a line'))"]
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, env=buffered, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: what was printed cannot be written") and done.stderr.count("\n") == 1


def test_a_script_may_have_no_output_at_all(monkeypatch):
    """Python has none if it is started with a closed one, as by `>&-`."""
    monkeypatch.setattr(sys, "argv", ["script"])
    monkeypatch.setattr(sys, "stdout", None)
    called = []
    run_script(called.append)
    assert called == [[]]


def test_a_broken_pipe_of_another_kind_is_a_fault(monkeypatch, capsys, tmp_path):
    def main(argv):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")  # a server that has closed the connection

    monkeypatch.setattr(errors.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as exit:
        run_script(main)
    assert exit.value.code == 1 and "unexpected BrokenPipeError" in capsys.readouterr().err
    with pytest.raises(BrokenPipeError), errors.quiet_broken_pipe():
        main([])


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_benchmarks_end_quietly_too(path):
    main = path.read_text().partition('if __name__ == "__main__":')[2]
    assert not main or "run_script(main)" in main or "with quiet_broken_pipe():" in main


def test_no_garbage_is_collected_between_the_check_and_main(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "--flag"])
    called = []
    check_before_imports(called.append)
    assert called == [["--flag"]] and not gc.isenabled()
    run_script(lambda argv: called.append(gc.isenabled()))
    assert called[1] and gc.isenabled()
    gc.unfreeze()
