"""One-line errors for what transformers, huggingface_hub and safetensors raise when a model cannot be opened."""

import contextlib
import pickle
import re
import shlex
from collections.abc import Iterator

from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError

from gpt2repro.errors import UserError, first_line


LIBRARY_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    AttributeError,
    ImportError,  # of a quantization's package; it names the pip install
    RuntimeError,
    TypeError,
    pickle.UnpicklingError,
    SafetensorError,
    StrictDataclassError,
)
ACCESS_DENIED = (401, 403, 404)  # HTTP; the Hub answers 404 for a private repository, too
LOG_IN = "check the name, log in with `hf auth login`, and if the model is gated, ask for access on its page"


@contextlib.contextmanager
def explained(problem: str, remedy: str) -> Iterator[None]:
    """Turn a library's exception, often a page long, into the line "problem (reason); remedy".

    Raises:
        UserError: the body raised one of LIBRARY_ERRORS.
    """
    try:
        yield
    except LIBRARY_ERRORS as error:
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code in ACCESS_DENIED:
            raise UserError(f"{problem} ({first_line(cause)}); {LOG_IN}") from error
        code = named_code(error)
        if code:
            raise UserError(f"{problem}: its weights are a pickle that {code}") from error
        raise UserError(f"{problem} ({first_line(error)}); {remedy}") from error


def python_command(code: str) -> str:
    """A command that runs one line of Python, to paste into a shell."""
    return shlex.join(["python", "-c", code])


def named_code(error: Exception) -> str | None:
    """What a pickle holds beside data, and the remedy, if that is why torch.load has refused it; torch's own message
    advises to execute it."""
    forbidden = re.search(r"GLOBAL (\S+)", str(error))
    if forbidden is None:
        return None
    remedy = "save it again with tensors, numbers and strings only"
    return f"holds {forbidden[1]}, which is not data and was not executed; {remedy}"
