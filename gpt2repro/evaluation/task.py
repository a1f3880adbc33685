"""What a task of a scorecard is; tasks.py has those that there are.

A task measures a model unit by unit (`Task.measure`), as columns of numbers. Every score (`Metric`) is a ratio of two
columns' sums, which is what gives it an interval (bootstrap.py) and lets two models be compared on the same units.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2repro.evaluation.bootstrap import Ratio


if TYPE_CHECKING:  # they take seconds to import, and reading a scorecard needs neither
    from accelerate import Accelerator

    from gpt2repro.evaluation.perplexity import WindowSettings


Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Metric:
    """A score, a ratio of the sums of two columns.

    key: its name in scorecard.json.
    unit: share, perplexity, nats or bits.
    headline: it is spoken of in the sentences; the others stand in the table only.
    needs_same_vocabulary: it is normalised by tokens, so that only models with the same vocabulary can be compared.
    caveat: why figures published for this metric are not of this data; None: they are.
    """

    key: str
    title: str
    numerator: str
    denominator: str
    unit: str
    higher_is_better: bool
    headline: bool
    needs_same_vocabulary: bool = False
    caveat: str | None = None

    def score(self, columns: Columns) -> Ratio:
        transform = {"share": "mean", "nats": "mean", "perplexity": "perplexity", "bits": "bits"}[self.unit]
        return Ratio(columns[self.numerator], columns[self.denominator], transform)


@dataclass(frozen=True)
class Task:
    """What a model is measured on.

    name: as --tasks names it.
    method: one line: what is done, in whose way.
    version: raised when the method changes, so that cached columns are not used.
    units: what a row of the columns is, in the plural.
    data: name, hub_id, sha256, n, units and complete, for scorecard.json: `hub_id` is the dataset on the Hub that the
        data is, None if that is not known; `complete`: it is all of it, without --limit.
    measure: called on all ranks; (model, tokenizer, accelerator, settings) -> columns, (U,) float64 each.
    depends_on_windows: WindowSettings.stride changes the scores.
    vocabulary: sha256 of the only vocabulary whose models it can measure; None: any.
    corpus: the prepared data, as `corpus_identity` names it; None: the task has none.
    """

    name: str
    title: str
    method: str
    version: int
    units: str
    data: dict[str, Any]
    metrics: tuple[Metric, ...]
    measure: Callable[[Any, Any, "Accelerator", "WindowSettings"], Columns]
    depends_on_windows: bool = True
    vocabulary: str | None = None
    corpus: str | None = None
