"""Bootstrap intervals, against closed forms and an exact enumeration."""

import itertools
import math

import numpy as np
import pytest

from gpt2repro.evaluation.bootstrap import Interval, Ratio, draws, interval, resample


def accuracy(correct) -> Ratio:
    correct = np.asarray(correct, np.float64)
    return Ratio(correct, np.ones_like(correct))


def difference_interval(ours: Ratio, theirs: Ratio) -> Interval | None:
    a, b = resample([ours, theirs])
    return interval(a - b)


def test_the_interval_of_a_paired_difference_of_proportions_is_the_closed_form():
    """With b items that only A has right and c that only B has right of n, the difference (b - c) / n has the standard
    error sqrt(b + c - (b - c)^2 / n) / n (McNemar; Agresti 2002, section 10.1.1)."""
    n, both, b, c = 2_000, 500, 180, 120
    ours = [1] * both + [1] * b + [0] * c + [0] * (n - both - b - c)
    theirs = [1] * both + [0] * b + [1] * c + [0] * (n - both - b - c)
    found = difference_interval(accuracy(ours), accuracy(theirs))
    difference = (b - c) / n
    error = math.sqrt(b + c - (b - c) ** 2 / n) / n
    assert found.low == pytest.approx(difference - 1.96 * error, abs=0.08 * error)
    assert found.high == pytest.approx(difference + 1.96 * error, abs=0.08 * error)
    unpaired = math.sqrt(sum(p * (1 - p) / n for p in (np.mean(ours), np.mean(theirs))))
    assert error < 0.65 * unpaired  # what pairing is for


def test_the_interval_of_one_proportion_is_the_closed_form():
    n, right = 1_500, 450
    [sample] = resample([accuracy([1] * right + [0] * (n - right))])
    found = interval(sample)
    error = math.sqrt(0.3 * 0.7 / n)
    assert found.low == pytest.approx(0.3 - 1.96 * error, abs=0.08 * error)
    assert found.high == pytest.approx(0.3 + 1.96 * error, abs=0.08 * error)


def test_three_units_give_the_quantiles_of_all_27_resamples():
    nll, words = np.array([2.0, 9.0, 4.0]), np.array([1.0, 3.0, 2.0])
    exact = sorted(
        math.exp(nll[list(drawn)].sum() / words[list(drawn)].sum()) for drawn in itertools.product(range(3), repeat=3)
    )
    [sample] = resample([Ratio(nll, words, "perplexity")])
    found = interval(sample)
    assert found.low == pytest.approx(exact[0]) and found.high == pytest.approx(exact[-1])
    assert np.mean(sample) == pytest.approx(np.mean(exact), rel=0.01)


def test_equal_models_differ_by_nothing():
    nll = np.random.default_rng(0).gamma(2, 3, 40)
    score = Ratio(nll, np.full(40, 7.0), "bits")
    found = difference_interval(score, score)
    assert found == Interval(0.0, 0.0) and found.contains(0.0)


def test_a_constant_gain_a_word_is_certain_in_pairs():
    """The units differ much more from each other than the two models do."""
    generator = np.random.default_rng(1)
    words = generator.integers(50, 5_000, 60).astype(float)
    nll = words * generator.uniform(2, 6, 60)
    ours, theirs = Ratio(nll - 0.01 * words, words), Ratio(nll, words)
    found = difference_interval(ours, theirs)
    assert found.low == pytest.approx(-0.01) and found.high == pytest.approx(-0.01)
    alone = interval(resample([theirs])[0])
    assert alone.high - alone.low > 0.3


def test_a_single_unit_has_no_interval():
    assert interval(resample([accuracy([1])])[0]) is None
    assert difference_interval(accuracy([1]), accuracy([0])) is None


def test_values_and_their_transforms():
    nll, tokens = np.array([3.0, 6.0]), np.array([1.0, 2.0])
    assert Ratio(nll, tokens).value() == 3
    assert Ratio(nll, tokens, "perplexity").value() == pytest.approx(math.exp(3))
    assert Ratio(nll, tokens, "bits").value() == pytest.approx(3 / math.log(2))


def test_draws_are_the_same_each_time():
    first, second = (np.concatenate(list(draws(5, 300))) for _ in range(2))
    assert (first == second).all() and first.shape == (300, 5) and (first.sum(1) == 5).all()
