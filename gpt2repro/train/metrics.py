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
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2repro.train.early_stopping import best_first


ROW_KINDS = ("loss", "val_loss", "hellaswag_acc", "samples")  # the key that identifies the kind of a row
BLOCK_BYTES = 2**20
CLOCK_KEYS = ("tokens_per_second", "data_wait", "hours", "hours_left")  # timings differ between identical runs


class Metrics:
    """The writer of a metrics.jsonl.

    A resumed run repeats the steps after its checkpoint; rows of theirs that were already logged are skipped. After a
    rollback the repeated steps differ, so they are logged again. A last row that a crash cut short is dropped.
    """

    def __init__(self, path: Path):
        self.path = path
        self.logged: set[tuple[str, int]] = set()  # (kind, step) of the rows that a resumed run must not repeat
        self.size = _complete_bytes(path) if path.exists() else 0
        self.unwritten = b""  # queued rows

    def resume(self, step: int) -> None:
        """The next steps are those after `step`; find out which rows of theirs were logged before."""
        self.logged = set()
        if not self.path.exists():
            return
        next_step = math.inf
        for row in _rows_newest_first(self.path):
            if "loss" in row:
                training_went_back = row["step"] >= next_step  # from here on all is undone
                if row["step"] <= step or training_went_back:
                    break
                next_step = row["step"]
            if row["step"] >= step:
                self.logged.add((_kind(row), row["step"]))

    def roll_back(self, step: int) -> None:
        """Steps after `step` will be logged again."""
        self.logged = {(kind, logged) for kind, logged in self.logged if logged <= step}

    def add(self, row: dict[str, Any]) -> bool:
        """Queue a row unless one of its kind was logged for this step before the run was resumed.

        Returns:
            Whether it was queued.
        """
        if (_kind(row), row["step"]) in self.logged:
            return False
        self.unwritten += json.dumps(row).encode() + b"\n"
        return True

    def write(self) -> None:
        """Append the queued rows.

        Raises:
            OSError: writing failed, e.g. because the disk is full. The rows stay queued.
        """
        with self.path.open("ab") as file:
            end = file.tell()
            if end > self.size:  # a row that a crash or a full disk cut short
                file.truncate(self.size)
            elif 0 < end < self.size:  # somebody shortened the file, perhaps within a row
                file.write(b"\n")
                self.size = end + 1
            file.write(self.unwritten)
        self.size += len(self.unwritten)
        self.unwritten = b""


def without_clock(row: dict[str, Any]) -> dict[str, Any]:
    """What is equal in identical runs."""
    return {key: value for key, value in row.items() if key not in CLOCK_KEYS}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. Of a step that was repeated, after a rollback or with another recipe, only the
    newest; a row cut short, and a line that is no row, is dropped."""
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
    """The rows, oldest first, without lines that are none: damaged, or written by something else."""
    with path.open("rb") as file:
        while lines := file.readlines(BLOCK_BYTES):
            yield from _parsed(lines)


def _rows_newest_first(path: Path) -> Iterator[dict[str, Any]]:
    """As `_rows`, reading from the end; a long log is not read to its beginning."""
    unfinished = b""  # the end of a line that begins in an earlier block
    for block in _blocks_from_end(path):
        first_newline = block.find(b"\n")
        lines = (block[first_newline + 1 :] + unfinished).splitlines(keepends=True)
        if first_newline < 0:
            unfinished = block + unfinished
            continue
        yield from reversed(_parsed(lines))
        unfinished = block[: first_newline + 1]
    yield from _parsed([unfinished])


def _complete_bytes(path: Path) -> int:
    """The size of a file without the beginning of a line at its end."""
    end = path.stat().st_size
    for block in _blocks_from_end(path):
        last_newline = block.rfind(b"\n")
        if last_newline >= 0:
            return end - len(block) + last_newline + 1
        end -= len(block)
    return 0


def _blocks_from_end(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            begin = max(0, end - BLOCK_BYTES)
            file.seek(begin)
            yield file.read(end - begin)
            end = begin


def _parsed(lines: list[bytes]) -> list[dict[str, Any]]:
    """The rows among some lines; a last one without its newline was cut short."""
    whole_lines = [line for line in lines if line.endswith(b"\n")]
    try:
        values = json.loads(b"[" + b",".join(whole_lines) + b"]")  # at once, so that the rows share their keys' memory
    except (ValueError, RecursionError):  # some are not JSON, or not UTF-8
        values = [_value(line) for line in whole_lines]
    return [value for value in values if _is_row(value)]


def _value(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_row(row: object) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return False
    return any(kind in row for kind in ROW_KINDS)
