"""What a run reports: metrics, speed, provenance."""

import errno
import io
import json
import os
from types import SimpleNamespace

import pytest
import torch
from support import DAMAGED_JSON
from tqdm import tqdm
from transformers import GPT2Config

from gpt2repro.plan.sizes import flops_per_token
from gpt2repro.recipe import Recipe
from gpt2repro.run_folder import RunFolder
from gpt2repro.train import metrics
from gpt2repro.train.guard import Guard
from gpt2repro.train.metrics import Metrics, read_metrics
from gpt2repro.train.report import provenance
from gpt2repro.train.speed import peak_flops
from gpt2repro.train.telemetry import Telemetry, Unbreakable


@pytest.fixture(params=[2**20, 40, 7], ids=lambda size: f"blocks of {size}")
def path(request, tmp_path, monkeypatch):
    """Of a metrics.jsonl, which is read in blocks that hold all rows, about one, or a part of one."""
    monkeypatch.setattr(metrics, "BLOCK_BYTES", request.param)
    return tmp_path / "metrics.jsonl"


def log(writer: Metrics, *rows: dict) -> list[bool]:
    """Whether each was new."""
    new = [writer.add(row) for row in rows]
    writer.write()
    return new


def losses(path) -> list:
    return [row["loss"] for row in read_metrics(path) if "loss" in row]


def test_a_row_is_appended_once_even_if_it_is_logged_again(path):
    log(Metrics(path), *({"step": step, "loss": float(step)} for step in (1, 2)), {"step": 2, "val_loss": 0.5})
    with path.open("a") as file:
        file.write('{"step": 3, "loss": 3.0}\n{"step": 3, "val_loss": 0.25}\n{"step": 4, "lo')  # a crash cut it short

    resumed = Metrics(path)
    resumed.resume(2)
    assert log(resumed, {"step": 3, "loss": 99.0}, {"step": 3, "val_loss": 99.0}) == [False, False]
    assert log(resumed, {"step": 4, "loss": 4.0}, {"step": 4, "val_loss": 0.125}) == [True, True]
    assert losses(path) == [1, 2, 3, 4]
    assert [row["val_loss"] for row in read_metrics(path) if "val_loss" in row] == [0.5, 0.25, 0.125]


def test_the_repetition_of_a_step_after_a_rollback_counts(path):
    writer = Metrics(path)
    log(writer, {"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": None})
    writer.roll_back(1)
    assert log(writer, {"step": 2, "loss": 2.0}) == [True]
    assert losses(path) == [1.0, 2.0, None]
    assert len(path.read_text().splitlines()) == 4  # no row that was written is lost

    resumed = Metrics(path)
    resumed.resume(1)
    assert log(resumed, {"step": 2, "loss": 99.0}, {"step": 3, "loss": 3.0}) == [False, True]
    assert losses(path) == [1.0, 2.0, 3.0]


NO_ROWS = DAMAGED_JSON | {"NUL": b"\0\0\0", "step is text": b'{"step": "x", "loss": 1}'}


@pytest.mark.parametrize("line", NO_ROWS.values(), ids=NO_ROWS)
def test_lines_that_are_no_rows_are_passed_over(path, line):
    log(Metrics(path), {"step": 1, "loss": 1.0})
    path.write_bytes(line + b"\n" + path.read_bytes() + line + b"\n")
    writer = Metrics(path)
    writer.resume(0)
    assert log(writer, {"step": 1, "loss": 99.0}, {"step": 2, "loss": 2.0}) == [False, True]
    assert losses(path) == [1.0, 2.0]


def test_a_foreign_row_with_a_large_step_silences_nothing(path):
    log(Metrics(path), {"step": 1, "loss": 1.0}, {"step": 10**9, "loss": 0.0})
    writer = Metrics(path)
    writer.resume(1)
    assert log(writer, {"step": 2, "loss": 2.0}) == [True]
    assert {1.0, 2.0} <= set(losses(path))


@pytest.mark.parametrize("kept", [0, 3, 25, 30])
def test_a_file_that_is_shortened_while_it_is_written_is_not_filled_with_zeros(path, kept):
    writer = Metrics(path)
    log(writer, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0})
    os.truncate(path, kept)  # 25 bytes are the first row
    log(writer, {"step": 3, "loss": 3.0})
    log(writer, {"step": 4, "loss": 4.0})
    assert b"\0" not in path.read_bytes()
    assert losses(path) == ([1.0] if kept >= 25 else []) + [3.0, 4.0]


def test_a_long_log_is_not_read_to_its_beginning(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    log(Metrics(path), *({"step": step, "loss": 1.0} for step in range(1, 20_001)))
    parsed, loads = [], json.loads
    monkeypatch.setattr(metrics, "BLOCK_BYTES", 2**12)
    monkeypatch.setattr(metrics.json, "loads", lambda text: parsed.append(len(text)) or loads(text))
    writer = Metrics(path)
    writer.resume(19_900)
    assert len(writer.logged) == 100 and sum(parsed) < 10_000


def test_a_log_that_cannot_be_written_does_not_end_training():
    """Of a shell: a full disk, or `| head`."""

    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    stream = Unbreakable(Broken())
    print("text", file=stream, flush=True)
    with tqdm(total=3, file=stream, mininterval=0) as bar:
        bar.update()
        bar.write("text", file=stream)


def test_flops_of_gpt2_124m():
    # 6N + 12 * n_layer * n_embd * T, N = 124,439,808 - 1024 * 768 without position embeddings
    assert flops_per_token(GPT2Config(), 124_439_808, 1024) == 6 * 123_653_376 + 12 * 12 * 768 * 1024


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("Tesla V100-PCIE-16GB", 112e12),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
        ("NVIDIA A10", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Some new GPU", None),
    ],
)
def test_peak_is_known_or_null(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "fp16") == peak
    assert peak_flops(torch.device("cuda"), "bf16") == (None if "V100" in name else peak)
    assert peak_flops(torch.device("cuda"), "no") is None
    assert peak_flops(torch.device("cpu"), "bf16") is None


def test_what_was_measured_since_the_last_row_survives_a_stop(tmp_path):
    recipe = Recipe(output_dir=str(tmp_path), log_every=4)
    accelerator = SimpleNamespace(
        is_main_process=True,
        num_processes=1,
        device=torch.device("cpu"),
        mixed_precision="no",
        log=lambda values, step: None,
    )
    model = torch.nn.Linear(2, 2)
    model.config = GPT2Config()
    first = Telemetry(recipe, accelerator, model)
    first.start(0)
    first.hours_before = 2.0
    with first.measuring_update(0):
        model.weight.data *= 2
    first.log_step(1, 5.0, 1e-3, 9.0, Guard(recipe))
    saved = json.loads(json.dumps(first.state_dict()))
    assert saved["hours"] > 2.0  # includes the step, although it has no row yet

    resumed = Telemetry(recipe, accelerator, model)
    resumed.load_state_dict(saved)
    resumed.start(1)
    for step, loss in ((2, 4.0), (3, 3.0), (4, 2.0)):
        resumed.log_step(step, loss, 1e-3, 0.5, Guard(recipe))
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (row["loss"], row["clipped"], row["update_ratio"]) == (3.5, 0.25, first.update_ratio)
    assert row["update_ratio"] > 0 and row["hours"] > saved["hours"]


def test_an_evaluation_after_the_step_to_which_training_went_back_is_undone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [("loss", 10), ("loss", 20), ("val_loss", 20), ("loss", 25), ("val_loss", 25), ("loss", 20), ("loss", 30)]
    path.write_text("".join(json.dumps({"step": step, key: place}) + "\n" for place, (key, step) in enumerate(rows)))
    found = [(row["step"], row.get("loss"), row.get("val_loss")) for row in read_metrics(path)]
    assert found == [(10, 0, None), (20, 5, None), (25, 3, None), (30, 6, None)]


def test_rows_after_a_changed_recipe_are_logged_again(tmp_path):
    recipe = Recipe(output_dir=str(tmp_path))
    folder = RunFolder(tmp_path)
    folder.metrics.write_text("".join(json.dumps({"step": step, "val_loss": 1.0}) + "\n" for step in (2, 4)))
    accelerator = SimpleNamespace(
        is_main_process=True, device=torch.device("cpu"), mixed_precision="no", log=lambda values, step: None
    )
    model = torch.nn.Linear(2, 2)
    model.config = GPT2Config()
    for overrides, expected in (([], [1.0, 1.0]), ([{"step": 2}], [1.0, 3.0])):
        folder.write_record({"data": {}, "overrides": overrides})
        telemetry = Telemetry(recipe, accelerator, model)
        telemetry.start(2)
        telemetry.log(2, val_loss=3.0)
        telemetry.log(4, val_loss=3.0)
        assert [row["val_loss"] for row in read_metrics(folder.metrics)] == expected


@pytest.mark.slow
def test_provenance_is_json():
    record = provenance()
    assert record["torch"] == torch.__version__
    json.dumps(record)
