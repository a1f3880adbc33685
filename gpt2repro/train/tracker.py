"""The experiment tracker of a run: tensorboard, wandb or trackio gets a copy of the numbers in metrics.jsonl."""

import dataclasses
import math
import os
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from gpt2repro.errors import UserError, first_line
from gpt2repro.recipe import Recipe
from gpt2repro.run_folder import RunFolder
from gpt2repro.train.metrics import read_metrics


PROJECT = "gpt2repro"
REMEDIES = {
    "tensorboard": "make output_dir writable",
    "wandb": "log in with `wandb login`, or set WANDB_MODE=offline",
    "trackio": "log in with `hf auth login`, or unset TRACKIO_SPACE_ID and TRACKIO_SERVER_URL to log on this machine",
}


def start_tracker(recipe: Recipe, run_id: str | None, accelerator: Accelerator) -> None:
    """Start the recipe's tracker, if any; main process only. A resumed run continues as the same run there.

    Rows of metrics.jsonl that were still in the tracker's queue when the last process was killed are sent again.

    Args:
        run_id: from recipe.yaml; identifies the run to wandb and trackio.
    Raises:
        UserError: it does not start, e.g. for lack of a login.
    """
    if recipe.report_to == "none":
        return
    folder = RunFolder(recipe.output_dir)
    # tensorboard would write its settings to another directory at each start.
    has_settings = recipe.report_to == "tensorboard" and (folder.path / PROJECT).exists()
    init_kwargs = {
        "wandb": {
            "id": run_id,
            "name": folder.name,
            "resume": "allow",
            "dir": os.environ.get("WANDB_DIR", folder.path),
        },
        "trackio": {"name": run_id, "resume": "allow"},
    }
    # Seconds for which wandb buffers its writes. A kill within the first 15, its default, leaves a file without header.
    os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")
    try:
        config = None if has_settings else _flat_settings(recipe)
        accelerator.init_trackers(PROJECT, config=config, init_kwargs=init_kwargs)
        missing_from = _next_step(accelerator.trackers[0])
        rows = read_metrics(folder.metrics) if folder.metrics.exists() else []
        for row in rows:
            if row["step"] >= missing_from:
                track(accelerator, row)
    except Exception as error:  # trackers raise all kinds
        raise UserError(
            f"report_to={recipe.report_to} does not start ({first_line(error)}); {REMEDIES[recipe.report_to]}"
        ) from error


def track(accelerator: Accelerator, row: dict[str, Any]) -> None:
    """Send the numbers in a row of metrics.jsonl to the tracker."""
    values = {key: value for key, value in row.items() if key not in ("step", "tokens")}
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
    if numbers:
        accelerator.log(numbers, step=row["step"])


def _flat_settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a flat dict of numbers and strings, which every tracker can store."""
    settings = dataclasses.asdict(recipe)
    model = settings.pop("model")
    settings.update({f"model.{name}": value for name, value in model.items()})
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in settings.items()}


def _next_step(tracker: GeneralTracker) -> float:
    """The step after the last one that the tracker has stored; infinite if the tracker cannot tell."""
    if tracker.name == "trackio":
        return tracker.tracker._next_step
    if tracker.name == "wandb" and not tracker.tracker.offline:
        return tracker.tracker.step
    return math.inf
