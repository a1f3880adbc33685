"""How a user's mistake ends: one line, exit code 2, no traceback."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

import torch.distributed
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError


MAKE_SPACE = "make space and repeat the command: it goes on from the newest checkpoint"


class UserError(Exception):
    """A mistake that the user can mend. The message says the value, the rule and the remedy, one line a mistake."""


class SharedError(UserError):
    """A mistake that all processes raise, having heard of it from the main one, which prints it."""


def first_line(error: Exception) -> str:
    """What an exception says, without the rest of a page; its type where it says nothing."""
    if isinstance(error, HfHubHTTPError) and error.server_message:  # the Hub's own words come last on its page
        return f"the Hub says {error.response.status_code}: {error.server_message.splitlines()[0]}"
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


@contextlib.contextmanager
def explained(problem: str, remedy: str) -> Iterator[None]:
    """Turn what transformers raises for the user's mistakes, often a page long, into one line."""
    try:
        yield
    except (
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        RuntimeError,
        SafetensorError,
        StrictDataclassError,
    ) as error:
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403, 404):
            remedy = "check the name, log in with `hf auth login`, and if the model is gated ask for access on its page"
            error = cause
        raise UserError(f"{problem} ({first_line(error)}); {remedy}") from error


@contextlib.contextmanager
def written(what: object) -> Iterator[None]:
    """Turn what a full disk raises while a run writes `what` into one line; nothing that is trained is lost."""
    try:
        yield
    except Exception as error:
        # tokenizers raises nothing more precise than Exception
        if not isinstance(error, OSError | SafetensorError) and "os error" not in str(error):
            raise
        raise UserError(f"{what} could not be written ({first_line(error)}); {MAKE_SPACE}") from error


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are UserErrors; its description is shown as it is written."""

    def __init__(self, description: str):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `python {self.prog} --help` lists the flags")


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run `main(argv)` as a script: a UserError is printed, by one process only, and exits with code 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        # What is wrong before the processes know each other is wrong in all of them; later it may be one's own.
        if rank == "0" or (torch.distributed.is_initialized() and not isinstance(error, SharedError)):
            for line in str(error).splitlines():
                print(f"error: {line}" + (f" (process {rank})" if rank != "0" else ""), file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
