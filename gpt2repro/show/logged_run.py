"""What a run has logged, as pictures and pages show it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gpt2repro.evaluation.verdict import Verdict, judge


@dataclass(frozen=True)
class LoggedRun:
    """A run that has begun; it may still be training.

    name: of its folder, for labels.
    record: the content of recipe.yaml.
    rows: those of metrics.jsonl, as `read_metrics` returns them.
    """

    name: str
    record: dict[str, Any]
    rows: list[dict[str, Any]]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """A metric over tokens: those of each row that has it, and its values."""
        points = [(row["tokens"], row[key]) for row in self.rows if row.get(key) is not None]
        return [tokens for tokens, _ in points], [value for _, value in points]

    @cached_property
    def verdict(self) -> Verdict:
        return judge(self.record, self.rows)
