"""What several test modules share. Without torch, so that processes that only prepare data start fast: tiny models are
in tiny_models.py."""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import prepare_data
from gpt2repro.errors import UserError
from gpt2repro.files import file_sha256
from gpt2repro.train.metrics import read_metrics


ROOT = Path(__file__).resolve().parents[1]
DAMAGED_JSON = {
    "empty": b"",
    "null": b"null",
    "list": b"[1]",
    "cut": b'{"a": ',
    "binary": b"\xff\xfe\0\0",
    "deep": b"[" * 9999,
}
PATIENCE = 300  # seconds until a test gives up waiting; generous, because a busy machine is no failure


def wait_until(condition: Callable[[], Any], explain: Callable[[], Any] = lambda: "it did not happen") -> Any:
    """Wait until `condition` returns something true, and return that.

    Args:
        explain: what the failure says after PATIENCE.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, explain()
        time.sleep(0.002)


# ---- preparing data ----


def write_jsonl(path: Path, rows: Iterable[str | dict]) -> Path:
    """Write documents, given as their texts or as whole rows, one per line."""
    documents = [{"text": row} if isinstance(row, str) else row for row in rows]
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def prepare(*args: object) -> None:
    """prepare_data.py in this process."""
    prepare_data.main([str(arg) for arg in args])


def refusal(*args: object) -> str:
    """The message with which prepare_data.py refuses these arguments."""
    with pytest.raises(UserError) as caught:
        prepare(*args)
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, by its path in there."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# ---- reading what a run wrote ----


def metric_rows(output_dir: Path, key: str) -> list[dict]:
    """The rows of a run's metrics.jsonl that have a key."""
    return [row for row in read_metrics(output_dir / "metrics.jsonl") if key in row]


def measured(output_dir: Path, key: str) -> list:
    """Every value of a metric, in the order of the steps."""
    return [row[key] for row in metric_rows(output_dir, key)]


def write_state(checkpoint: Path, state: dict) -> None:
    """Give the folder of a checkpoint this state, intact; its other files are empty."""
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    for name in ("config.json", "model.safetensors", "optimizer.safetensors"):
        (checkpoint / name).touch()
    hashes = {path.name: file_sha256(path) for path in checkpoint.iterdir() if path.name != "hashes.json"}
    (checkpoint / "hashes.json").write_text(json.dumps(hashes))
