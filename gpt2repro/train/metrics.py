"""metrics.jsonl, the log of a run: one JSON object per row, appended and never rewritten.

Every row has `step` and `tokens` (seen after that step), and the keys of one kind:

    loss        training, every log_every steps: loss (mean since the row before, nats per token), lr, grad_norm (before
                clipping), clipped (share of the steps), bad_steps (updates skipped so far), loss_zscore, update_ratio,
                tokens_per_second, data_wait (share of the time), mfu, peak_memory_bytes, hours, hours_left, dollars
    val_loss    validation: val_loss, and val_loss_NAME for each source of a mixture
    hellaswag_acc   HellaSwag: hellaswag_acc, hellaswag_acc_norm, their standard errors, hellaswag_items
    samples     continuations of the recipe's prompts
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2repro.train.early_stopping import best_first


ROW_KINDS = ("loss", "val_loss", "hellaswag_acc", "samples")  # the key that identifies the kind of a row
CLOCK_KEYS = ("tokens_per_second", "data_wait", "hours", "hours_left")  # timings differ between identical runs


class Metrics:
    """The writer of a metrics.jsonl.

    A resumed run repeats the steps after its checkpoint; rows of theirs that were already logged are skipped. After a
    rollback the repeated steps differ, so they are logged again. A last row that a crash cut short is dropped.
    """

    def __init__(self, path: Path):
        self.path = path
        self.last_step = dict.fromkeys(ROW_KINDS, -1)
        self.size = 0  # bytes of complete rows
        self.unwritten = b""  # queued rows
        if path.exists():
            self.size = path.read_bytes().rfind(b"\n") + 1
            for row in _rows(path):  # after a rollback the last row is not the latest step
                self.last_step[_kind(row)] = row["step"]

    def roll_back(self, step: int) -> None:
        """Steps after `step` will be logged again."""
        self.last_step = {kind: min(last, step) for kind, last in self.last_step.items()}

    def add(self, row: dict[str, Any]) -> bool:
        """Queue a row unless one of its kind was logged for this step; returns whether it was queued."""
        kind = _kind(row)
        if row["step"] <= self.last_step[kind]:
            return False
        self.last_step[kind] = row["step"]
        self.unwritten += json.dumps(row).encode() + b"\n"
        return True

    def write(self) -> None:
        """Append the queued rows.

        Raises:
            OSError: writing failed, e.g. because the disk is full. The rows stay queued.
        """
        with self.path.open("ab") as file:
            file.truncate(self.size)  # drop a row that a crash or a full disk cut short
            file.write(self.unwritten)
        self.size += len(self.unwritten)
        self.unwritten = b""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. Of a step that was repeated, after a rollback or with another recipe, only the
    newest; a row cut short is dropped."""
    newest: dict[tuple[str, int], dict[str, Any]] = {}
    last_step = 0
    for row in _rows(path):
        kind, step = _kind(row), row["step"]
        if kind == "loss" and step <= last_step:  # training went back: what was evaluated from here on is undone
            newest = {key: old for key, old in newest.items() if "loss" in old or old["step"] < step}
        if kind == "loss":
            last_step = step
        newest[kind, step] = row
    return list(newest.values())


def exported_step(rows: list[dict[str, Any]], record: dict[str, Any]) -> int:
    """The step whose weights a run exports: the last, or with `patience` the one with the best validation loss."""
    val_losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    if not record.get("patience") or not val_losses:
        return rows[-1]["step"]
    return best_first(val_losses)[0]


def _kind(row: dict[str, Any]) -> str:
    for kind in ROW_KINDS:
        if kind in row:
            return kind
    raise KeyError(f"a row has none of the keys {ROW_KINDS}, by which its kind is known: {list(row)}")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    text = path.read_text()
    whole_rows = text[: text.rfind("\n") + 1]
    return map(json.loads, whole_rows.splitlines())
