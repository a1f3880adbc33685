"""Trackers get the numbers of metrics.jsonl; a resumed run is one run there."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from transformers import GPT2Config

from gpt2repro.errors import UserError
from gpt2repro.recipe import Recipe
from gpt2repro.train.metrics import read_metrics
from gpt2repro.train.telemetry import Telemetry
from gpt2repro.train.tracker import start_tracker, track


ROWS = [{"step": step, "tokens": step * 10, "loss": 5.0 - step, "samples": ["text"]} for step in (1, 2, 3, 4)]


class Kept(GeneralTracker):
    """An in-memory tracker in place of wandb, which already has two steps."""

    name, requires_logging_directory = "wandb", False
    tracker = SimpleNamespace(offline=False, step=3)

    def __init__(self):
        super().__init__()
        self.rows = []

    def log(self, values, step):
        if step == 13:
            raise ConnectionResetError("Connection lost")
        self.rows.append((step, values))


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "run").mkdir()
    return lambda report_to: Recipe(output_dir=str(tmp_path / "run"), report_to=report_to)


@pytest.fixture
def start():
    """Start a recipe's tracker as every process of a run does."""

    def start(recipe: Recipe, tracker=None) -> Accelerator:
        accelerator = Accelerator(cpu=True, log_with=tracker or recipe.report_to, project_dir=recipe.output_dir)
        start_tracker(recipe, "run-1a2b3c4d", accelerator)
        return accelerator

    return start


def write_metrics(path, rows):
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_tracker_gets_the_rows_that_it_lacks(recipe, start, tmp_path):
    write_metrics(tmp_path / "run", ROWS)
    kept = Kept()
    start(recipe("wandb"), kept)
    assert kept.rows == [(3, {"loss": 2.0}), (4, {"loss": 1.0})]


def test_a_tracker_that_fails_does_not_end_the_run(recipe, start, capsys):
    kept, recipe = Kept(), recipe("wandb")
    model = torch.nn.Linear(1, 1)
    model.config = GPT2Config()
    telemetry = Telemetry(recipe, start(recipe, kept), model)
    for step in (12, 13, 14):
        telemetry.log(step, val_loss=1.0)
    telemetry.close()
    assert [step for step, _ in kept.rows] == [12]
    assert [row["step"] for row in read_metrics(telemetry.metrics.path)] == [12, 13, 14]
    printed = "".join(capsys.readouterr())
    assert "report_to=wandb failed (Connection lost); metrics.jsonl continues without it" in printed


def test_tensorboard_resumes(recipe, start, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    for part in (ROWS[:2], ROWS[2:]):
        accelerator = start(recipe("tensorboard"))
        for row in part:
            track(accelerator, row)
        accelerator.end_training()
    stored = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "run")).Reload()
    assert [(event.step, event.value) for event in stored.Scalars("gpt2repro", "loss")] == [
        (row["step"], row["loss"]) for row in ROWS
    ]
    (settings,) = (tmp_path / "run").rglob("hparams.yml")
    assert yaml.safe_load(settings.read_text())["learning_rate"] == Recipe.learning_rate


def test_trackio_resumes_after_a_kill(recipe, start, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    accelerator = start(recipe("trackio"))
    track(accelerator, ROWS[0])
    accelerator.end_training()
    write_metrics(tmp_path / "run", ROWS[:3])  # two more rows were on disk when the process was killed
    accelerator = start(recipe("trackio"))
    track(accelerator, ROWS[3])
    accelerator.end_training()
    assert SQLiteStorage.get_runs("gpt2repro") == ["run-1a2b3c4d"]
    stored = SQLiteStorage.get_logs("gpt2repro", "run-1a2b3c4d")
    assert [(row["step"], row["loss"]) for row in stored] == [(row["step"], row["loss"]) for row in ROWS]
    assert SQLiteStorage.get_run_config("gpt2repro", "run-1a2b3c4d")["learning_rate"] == Recipe.learning_rate


def test_wandb_keeps_offline_runs_with_the_run(recipe, start, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    wandb.teardown()  # it reads the environment once
    monkeypatch.setenv("WANDB_MODE", "offline")
    accelerator = start(recipe("wandb"))
    run = accelerator.trackers[0].tracker
    assert (run.id, run.name, run.config["learning_rate"]) == ("run-1a2b3c4d", "run", Recipe.learning_rate)
    accelerator.end_training()
    assert [*(tmp_path / "run" / "wandb").glob("offline-run-*-run-1a2b3c4d/run-run-1a2b3c4d.wandb")]


def test_wandb_without_a_login_is_one_line(recipe, start, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    wandb.teardown()
    for name, value in {"HOME": tmp_path, "NETRC": tmp_path / "netrc", "WANDB_MODE": "online"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match="report_to=wandb does not start .*; log in with `wandb login`, or set"):
        start(recipe("wandb"))
