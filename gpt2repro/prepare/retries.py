"""Reading other people's data: every failure becomes one line, and remote sources are retried."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator

from gpt2repro.errors import CHECK_PERMISSIONS, UserError, first_line


ATTEMPTS = 6
FIRST_DELAY = 1.0  # seconds before the second attempt; doubles with each further one
HUB_REMEDY = (
    "check the name, --hub_config, --split, --revision and the network (a folder with a copy of the data works too)"
)


class RemoteError(UserError):
    """A remote source could not be read; another attempt may succeed."""


@contextlib.contextmanager
def reading(origin: str, remedy: str = "fix the file, or leave it out") -> Iterator[None]:
    """Turn whatever a reader raises into one line that names the origin; a UserError is one already.

    Raises:
        RemoteError: the origin is a URL.
        UserError: it is anything else.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # network, Hub, format and configuration errors share no base class
        if "://" in origin:
            raise RemoteError(f"cannot read {origin}: {first_line(error)}; {HUB_REMEDY}") from error
        if isinstance(error, PermissionError):
            remedy = CHECK_PERMISSIONS
        raise UserError(f"cannot read {origin}: {first_line(error)}; {remedy}") from error


def with_retries(function: Callable, *args):
    """Call `function`; while a remote source fails, call it again with exponential backoff.

    Raises:
        UserError: the last attempt failed too.
    """
    for attempt in itertools.count(1):
        try:
            return function(*args)
        except RemoteError as error:
            if attempt == ATTEMPTS:
                raise UserError(
                    f"{error}; tried {ATTEMPTS} times. Finished parts are kept: repeat the command"
                ) from error
            time.sleep(FIRST_DELAY * 2 ** (attempt - 1))
