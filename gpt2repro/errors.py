"""How a user's mistake ends: one line on stderr, exit code 2, no traceback. Standard library
only, as every script starts here."""

import argparse
import contextlib
import difflib
import errno
import gc
import json
import os
import re
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn


FREE_SPACE = "free some space and repeat the command: it resumes from the newest checkpoint"
SAVE_MEMORY = "use a smaller batch, or hide the GPU with CUDA_VISIBLE_DEVICES=-1"
MAKE_WRITABLE = "make it writable, or choose another directory, and repeat the command"
CHECK_PERMISSIONS = "check its permissions, and those of the folders above it"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
OUTPUTS = (1, 2)  # file descriptors of stdout and stderr
GRACE_SECONDS = 10.0  # for which another rank lets rank 0 speak first; ranks start seconds apart on a busy machine


class UserError(Exception):
    """A mistake that the user can fix. The message gives the value, the rule and the remedy, one line per mistake."""


class SharedError(UserError):
    """A UserError that every rank raises after the main process has broadcast it; only the main process prints it."""


def refuse(problems: list[str]) -> None:
    """Raise a UserError with all problems, if there are any."""
    if problems:
        raise UserError("\n".join(problems))


def problems_of(check: Callable[..., object], *arguments: Any) -> list[str]:
    """The lines of the UserError that `check(*arguments)` raises, to be reported with others; empty: it raises none."""
    try:
        check(*arguments)
    except UserError as error:
        return str(error).splitlines()
    return []


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its type if there is none; messages of libraries can fill a page."""
    server_message = getattr(error, "server_message", None)  # HfHubHTTPError puts the Hub's own words at the end
    if server_message:
        return f"the Hub says {error.response.status_code}: {server_message.splitlines()[0]}"  # type: ignore[attr-defined]
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error))  # torch writes in bold
    lines = (text.strip() or type(error).__name__).splitlines()
    shown = lines[:2] if lines[0].endswith(":") else lines[:1]
    return " ".join(line.strip() for line in shown)


def first_sentences(error: Exception, count: int) -> str:
    """The first sentences of an exception's message, without the last one's full stop."""
    sentences = re.split(r"\.\s+", first_line(error))
    return ". ".join(sentences[:count]).removesuffix(".")


def os_error_number(error: Exception) -> int | None:
    """The errno of a failed system call; None for any other error. safetensors and tokenizers write in Rust, whose I/O
    errors are not OSErrors but carry "(os error N)"."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    in_rust = re.search(r"\(os error (\d+)\)", str(error))
    return int(in_rust[1]) if in_rust else None


@contextlib.contextmanager
def report_write_errors(what: object) -> Iterator[None]:
    """Turn a full disk (or any other failure to write `what`) into one line; nothing that was trained is lost."""
    try:
        yield
    except BrokenPipeError:  # of what is printed meanwhile: no file raises it
        raise
    except Exception as error:
        if not isinstance(error, OSError) and os_error_number(error) is None:
            raise
        raise UserError(f"cannot write {what} ({first_line(error)}); {write_remedy(error)}") from error


def write_remedy(error: Exception) -> str:
    """What to do about a failure to write."""
    number = os_error_number(error)
    if number in NOT_WRITABLE:
        return MAKE_WRITABLE
    return FREE_SPACE if number in FULL else "correct that and repeat the command"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors and whose description keeps its line breaks."""

    def __init__(self, description: str):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        if flag := re.match(r"argument (--\w+): expected (at least )?one argument", message):
            message += f" (one that begins with - is given as {flag[1]}=VALUE)"
        if unknown := re.match(r"unrecognized arguments: (--[^\s=]+)", message):
            flags = {flag.replace("-", "_"): flag for flag in self._option_string_actions}
            nearest = difflib.get_close_matches(unknown[1].replace("-", "_"), flags, n=1)
            message += f"; did you mean {flags[nearest[0]]}?" if nearest else ""
        raise UserError(f"{message}; `python {self.prog} --help` lists the flags")


def check_before_imports(check: Callable[[list[str]], object]) -> None:
    """Run `check(argv)` as `run_script` would, before a script imports what takes seconds. From here until `run_script`
    no garbage is collected: what is imported is none, and looking for it takes a quarter of the time."""
    run_script(check)
    gc.disable()


def run_script(main: Callable[[list[str]], object], save_memory: str = SAVE_MEMORY) -> None:
    """Run `main(argv)` as a script. A UserError is printed, by one process if all have it, and exits with code 2; so
    are a GPU or a memory that is too small and a file that the user may not touch. Any other exception is printed as a
    line with the file that keeps its traceback, and exits with code 1; `python -X dev` shows it instead. See also
    `quiet_broken_pipe`.

    Args:
        save_memory: the remedy when torch finds no memory.
    """
    gc.freeze()  # what is imported stays, and is never looked at again, which would stop a training step for long
    gc.enable()
    with quiet_broken_pipe():
        _run(main, save_memory)


@contextlib.contextmanager
def quiet_broken_pipe() -> Iterator[None]:
    """End as Unix tools do once nobody reads what is printed, as with `| head`: quietly, with the exit code of SIGPIPE.
    The signal itself would also end a process with which a server has closed a connection."""
    try:
        try:
            yield
        finally:
            _flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        _discard(*OUTPUTS)
        sys.exit(128 + signal.SIGPIPE)


def _flush() -> None:
    """Write what was printed, before Python does so as it exits, when no error can be caught."""
    try:
        print(end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard(1)
        _exit_with(UserError(f"what was printed cannot be written ({first_line(error)}); make room for it"))


def _discard(*descriptors: int) -> None:
    """Discard what Python, libraries and workers still want to print."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)


def _nobody_reads() -> bool:
    """Whether stdout or stderr is a pipe whose other end is closed."""
    poll = select.poll()
    for descriptor in OUTPUTS:
        poll.register(descriptor, 0)  # 0: of errors and hang-ups alone
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _run(main: Callable[[list[str]], object], save_memory: str) -> None:
    try:
        main(sys.argv[1:])
    except UserError as error:
        _exit_with(error)
    except PermissionError as error:
        _exit_with(UserError(f"{first_line(error)}; {CHECK_PERMISSIONS}"))
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            raise
        # torch's, of a GPU and of the CPU; this module does not import torch
        if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't" in str(error):
            _exit_with(UserError(f"{first_sentences(error, 3)}; {save_memory}"))
        if os_error_number(error) == errno.ENAMETOOLONG:
            _exit_with(UserError(f"{first_line(error)}; choose a shorter name"))
        if sys.flags.dev_mode:
            raise
        _exit_with(UserError(_unexpected(error)), code=1)
    except KeyboardInterrupt:
        sys.exit(130)


def _unexpected(error: Exception) -> str:
    """The line about an exception that nothing here foresees, a fault of ours or of a library."""
    with tempfile.NamedTemporaryFile("w", prefix="gpt2repro_", suffix=".log", delete=False) as log:
        traceback.print_exception(error, file=log)
    return f"unexpected {type(error).__name__}: {first_line(error)}; the traceback is in {log.name}, please report it"


def _exit_with(error: UserError, code: int = 2) -> NoReturn:
    _close_progress_bars()
    _tell_launcher(error)
    _print_error(error, rank=int(os.environ.get("RANK", "0")))
    sys.exit(code)


def _print_error(error: UserError, rank: int) -> None:
    """Print the error's lines. Other ranks first wait for rank 0, which usually has the same error: a launcher ends all
    processes as soon as one has ended, so rank 0 would be killed before it has spoken, and when it has, they are.
    """
    if rank != 0 and not _concerns_this_rank_alone(error):
        time.sleep(GRACE_SECONDS)
    if rank != 0 and isinstance(error, SharedError):
        return
    suffix = "" if rank == 0 else f" (rank {rank})"
    for line in str(error).splitlines():
        print(f"error: {_readable(line)}{suffix}", file=sys.stderr, flush=True)


def _readable(line: str) -> str:
    """A line without the middle of a value that would fill the screen; the remedy stands at its end."""
    return line if len(line) <= 2000 else f"{line[:1000]} ... {line[-500:]}"


def _tell_launcher(error: UserError) -> None:
    """Write the error where torchrun looks for the reason of a failure, and prints it at the end of its own report.

    Source: torch/distributed/elastic/multiprocessing/errors/error_handler.py, ErrorHandler.record_exception.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    text = "\n".join(f"error: {line}" for line in str(error).splitlines())
    report = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
    with contextlib.suppress(OSError):  # a report is not worth another error
        Path(path).write_text(json.dumps(report))


def _close_progress_bars() -> None:
    """End the line of each progress bar, so that the error begins on a line of its own."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is not None:
        for bar in list(tqdm.tqdm._instances):
            bar.close()


def _concerns_this_rank_alone(error: UserError) -> bool:
    """Before the process group exists, ranks usually make the same mistake; after that, an error that was not broadcast
    is this rank's own. torch is not imported for the question: without it there is no process group."""
    torch_distributed = sys.modules.get("torch.distributed")
    has_process_group = torch_distributed is not None and torch_distributed.is_initialized()
    return has_process_group and not isinstance(error, SharedError)
