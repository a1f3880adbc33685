"""How a user's mistake ends: which processes print it, and with which remedy."""

import errno
import gc
import importlib
import io
import sys
from types import SimpleNamespace

import pytest
import torch
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


def test_no_garbage_is_collected_between_the_check_and_main(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "--flag"])
    called = []
    check_before_imports(called.append)
    assert called == [["--flag"]] and not gc.isenabled()
    run_script(lambda argv: called.append(gc.isenabled()))
    assert called[1] and gc.isenabled()
    gc.unfreeze()
