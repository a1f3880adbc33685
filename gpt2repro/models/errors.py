"""One-line errors for what transformers, huggingface_hub and safetensors raise when a model cannot be opened."""

import contextlib
from collections.abc import Iterator

from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError

from gpt2repro.errors import UserError, first_line


LIBRARY_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    AttributeError,
    RuntimeError,
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
        raise UserError(f"{problem} ({first_line(error)}); {remedy}") from error
