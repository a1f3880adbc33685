"""The processes of a run, and what they have to agree on."""

import os
from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from gpt2repro.errors import SharedError, UserError


def world_size() -> int:
    """Processes of this run, as known before the Accelerator exists."""
    return int(os.environ.get("WORLD_SIZE", 1))


def on_main(function: Callable[[], Any]) -> Any:
    """What `function` returns on the main process of Accelerate, on all; what it sends must be picklable.

    Raises:
        SharedError: on all, where it raised a UserError.
    """
    result, problem = None, None
    if PartialState().is_main_process:
        try:
            result = function()
        except UserError as error:
            problem = str(error)
    result, problem = broadcast_object_list([result, problem])
    if problem:
        raise SharedError(problem)
    return result
