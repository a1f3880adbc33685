"""The tracker of a run, tensorboard, wandb or trackio: a copy of the numbers in metrics.jsonl."""

import dataclasses
import math
import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from gpt2repro.errors import UserError, first_line
from gpt2repro.recipe import Recipe
from gpt2repro.train.telemetry import read_metrics, track


PROJECT = "gpt2repro"
REMEDIES = {
    "tensorboard": "make output_dir writable",
    "wandb": "log in with `wandb login`, or set WANDB_MODE=offline",
    "trackio": "log in with `hf auth login`, or unset TRACKIO_SPACE_ID and TRACKIO_SERVER_URL to log on this machine",
}


def start_tracker(recipe: Recipe, run_id: str, accelerator: Accelerator) -> None:
    """Start the recipe's tracker, if it has one, on the main process; a run that goes on is the same run there.

    The tracker is given the rows of metrics.jsonl that it lacks, having held them back when the process was killed.

    Raises:
        UserError: it does not start, for example without a login.
    """
    if recipe.report_to == "none":
        return
    output_dir, metrics = Path(recipe.output_dir), Path(recipe.output_dir) / "metrics.jsonl"
    settings = dataclasses.asdict(recipe)
    settings |= {f"model.{name}": value for name, value in settings.pop("model").items()}
    flat = {name: value if isinstance(value, int | float | str) else str(value) for name, value in settings.items()}
    # tensorboard would get another directory of settings at each start.
    has_settings = recipe.report_to == "tensorboard" and (output_dir / PROJECT).exists()
    wandb_dir = os.environ.get("WANDB_DIR", output_dir)
    init_kwargs = {
        "wandb": {"id": run_id, "name": output_dir.name, "resume": "allow", "dir": wandb_dir},
        "trackio": {"name": run_id, "resume": "allow"},
    }
    # Seconds for which wandb holds back what it writes to disk; a kill within its own 15 leaves a file without a head.
    os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")
    try:
        accelerator.init_trackers(PROJECT, config=None if has_settings else flat, init_kwargs=init_kwargs)
        missing_from = _next_step(accelerator.trackers[0])
        for row in read_metrics(metrics) if metrics.exists() else []:
            if row["step"] >= missing_from:
                track(accelerator, row)
    except Exception as error:  # its kind is up to the tracker
        raise UserError(
            f"report_to={recipe.report_to} does not start ({first_line(error)}); {REMEDIES[recipe.report_to]}"
        ) from error


def _next_step(tracker: GeneralTracker) -> float:
    """The step after the last that a tracker has stored; infinite where it does not tell."""
    if tracker.name == "trackio":
        return tracker.tracker._next_step
    if tracker.name == "wandb" and not tracker.tracker.offline:
        return tracker.tracker.step
    return math.inf
