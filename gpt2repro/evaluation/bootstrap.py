"""Confidence intervals by resampling, for one model and for the difference of two on the same units.

    ours, theirs = resample([our_score, their_score])
    interval(ours), interval(ours - theirs)

A unit is what was drawn independently: an item of a benchmark, a document, a block of a long text. Both models of a
comparison are resampled with the same units (a paired bootstrap), so that a hard item counts against both; the interval
of the difference is then much narrower than the intervals of the two models suggest. Source: Efron and Tibshirani
(1993), An Introduction to the Bootstrap, section 13.3 (percentile interval); Koehn (2004), Statistical Significance
Tests for Machine Translation Evaluation (paired).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from gpt2repro.data.token_stream import LARGEST_EXPONENT


RESAMPLES = 5_000
LEVEL = 0.95
CHUNK = 256  # resamples at a time: their counts of a benchmark's 10,000 items take 10 MB
SEED = 1337
TRANSFORMS: dict[str, Callable] = {
    "mean": lambda ratio: ratio,
    "perplexity": lambda ratio: np.exp(np.minimum(ratio, LARGEST_EXPONENT)),  # of nats
    "bits": lambda ratio: ratio / math.log(2),  # of nats
}


@dataclass(frozen=True)
class Ratio:
    """A score that is a ratio of two sums over units: an accuracy, a loss a token, a perplexity a word.

    numerator, denominator: (U,) float64, one value a unit.
    transform: what is done to the ratio; a key of TRANSFORMS.
    """

    numerator: np.ndarray
    denominator: np.ndarray
    transform: str = "mean"

    def value(self) -> float:
        return float(TRANSFORMS[self.transform](self.numerator.sum() / self.denominator.sum()))

    def resampled(self, counts: np.ndarray) -> np.ndarray:
        """(R,) float64: the score of each resample.

        Args:
            counts: (R, U), how often each unit was drawn.
        """
        return TRANSFORMS[self.transform]((counts @ self.numerator) / (counts @ self.denominator))


@dataclass(frozen=True)
class Interval:
    """low, high: the ends of the 95% interval; the observed value itself need not be its middle."""

    low: float
    high: float

    def contains(self, value: float) -> bool:
        return self.low <= value <= self.high


def draws(units: int, resamples: int = RESAMPLES, seed: int = SEED) -> Iterator[np.ndarray]:
    """(CHUNK, units) float64 counts of `units` draws with replacement; the same for the same arguments."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, CHUNK):
        rows = min(CHUNK, resamples - start)
        drawn = generator.integers(units, size=(rows, units))
        row_offsets = np.arange(rows)[:, None] * units
        counts = np.bincount((drawn + row_offsets).ravel(), minlength=rows * units)
        yield counts.reshape(rows, units).astype(np.float64)


def resample(scores: list[Ratio], resamples: int = RESAMPLES) -> list[np.ndarray]:
    """What each score is on resampled units; the same units for all, so that samples may be subtracted.

    Args:
        scores: all over the same units in the same order.
    Returns:
        (resamples,) float64 each; (0,) where there is a single unit, which says nothing about others.
    """
    units = len(scores[0].numerator)
    if units < 2:
        return [np.empty(0)] * len(scores)
    chunks = [[score.resampled(counts) for score in scores] for counts in draws(units, resamples)]
    return [np.concatenate(sample) for sample in zip(*chunks)]


def interval(sample: np.ndarray) -> Interval | None:
    """The 95% percentile interval of a resampled score, or of the difference of two; None if the sample is empty."""
    if not len(sample):
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(sample, [tail, 1 - tail])
    return Interval(float(low), float(high))


def with_error(accuracy: float, standard_error: float | None) -> str:
    """As in "0.2955 ± 0.0046"; a single item has no standard error."""
    error = "n/a" if standard_error is None else f"{standard_error:.4f}"
    return f"{accuracy:.4f} ± {error}"
