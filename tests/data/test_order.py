"""The data order compared with plain integer arithmetic, and the statistics of a good shuffle."""

import itertools
import math

import numpy as np
import pytest
import torch

from gpt2repro.data.order import _hash, count_windows, permute, stateless_seed, window_starts


SEQUENCE_LENGTH = 8


def starts(sampling="shuffle", n_samples=100, n_tokens=1000, seed=1337, first=0):
    samples = np.arange(first, first + n_samples)
    return window_starts(sampling, samples, n_tokens, SEQUENCE_LENGTH, seed)


def shuffled(n, key):
    return permute(np.arange(n, dtype=np.uint64), n, np.full(n, key, np.uint64)).astype(np.int64)


# ---- the same with Python's integers ----


def splitmix(value, key):
    z = ((value + 1) * 0x9E3779B97F4A7C15 + key) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def feistel(index, n, key):
    bits = next(k for k in itertools.count(1) if 4**k >= n)
    while True:
        left, right = divmod(index, 2**bits)
        for round_number in range(6):
            left, right = right, left ^ splitmix(right, (key + round_number) % 2**64) % 2**bits
        index = left * 2**bits + right
        if index < n:
            return index


def test_hash_is_splitmix64():
    """Published outputs of SplitMix64 for the seeds 0 and 1234567."""
    assert [hex(z) for z in _hash(np.arange(3))] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert _hash(np.arange(4), 1234567).tolist() == published


@pytest.mark.parametrize("n", [1, 2, 5, 16, 17, 1000])
@pytest.mark.parametrize("key", [0, 1337, 2**64 - 3])
def test_permute_is_a_feistel_network(n, key):
    indices = np.arange(n)
    assert shuffled(n, key).tolist() == [feistel(int(i), n, key) for i in indices]


def test_the_order_never_changes():
    """Running trainings depend on it. If this fails, resumed runs read other data: give the new order a new name."""
    assert starts("shuffle", 8, n_tokens=1_000_000).tolist() == [
        832816,
        698488,
        726688,
        642136,
        405880,
        369776,
        636680,
        969152,
    ]
    assert starts("random", 8, n_tokens=1_000_000).tolist() == [
        786702,
        121129,
        673681,
        967469,
        852380,
        268183,
        989968,
        903850,
    ]
    assert starts("sequential", 8, n_tokens=1_000_000).tolist() == [0, 8, 16, 24, 32, 40, 48, 56]
    assert stateless_seed(1337, 3, 1, 0) == 747338861474796983


# ---- permutations ----


@pytest.mark.parametrize("key", [0, 1, 2**63 + 11])
def test_permute_is_a_bijection_for_every_small_n(key):
    for n in range(1, 301):
        assert sorted(shuffled(n, key)) == list(range(n)), n


@pytest.mark.parametrize("n", [4095, 4096, 4097, 65_537, 99_991, 2**20 + 7])
def test_permute_is_a_bijection_for_large_n(n):
    assert (np.bincount(shuffled(n, key=n), minlength=n) == 1).all()


@pytest.mark.parametrize("n", [8, 9, 33, 100])
def test_permute_sends_an_index_everywhere_equally_often(n):
    """Over many epochs. With 5 to 7 windows one place is up to 10% too frequent: a Feistel network needs some width."""
    keys = _hash(np.arange(20_000))
    for index in (0, 1, n // 2, n - 1):
        counts = np.bincount(permute(np.full(len(keys), index, np.uint64), n, keys).astype(int), minlength=n)
        assert chi_square(counts) < n - 1 + 4 * math.sqrt(2 * (n - 1))


# ---- epochs ----


@pytest.mark.parametrize("sampling", ["shuffle", "sequential"])
@pytest.mark.parametrize("n_tokens", [9, 16, 17, 18, 1000, 4001])
def test_an_epoch_reads_every_window_once(sampling, n_tokens):
    windows = count_windows(n_tokens, SEQUENCE_LENGTH)
    all_starts = list(range(0, n_tokens - SEQUENCE_LENGTH, SEQUENCE_LENGTH))  # a window has T + 1 tokens
    for epoch in range(3):
        read = starts(sampling, windows, n_tokens, first=epoch * windows)
        assert sorted(read) == all_starts
        if sampling == "sequential":
            assert read.tolist() == all_starts


def test_any_range_of_samples_gives_the_same_starts():
    """Even across the end of an epoch: there are 124 windows."""
    whole = starts(n_samples=500)
    assert whole.tolist() == [int(starts(n_samples=1, first=i)[0]) for i in range(500)]
    assert whole[120:130].tolist() == starts(n_samples=10, first=120).tolist()


@pytest.mark.parametrize("other", [{"first": 124}, {"first": 124 * 1000}, {"seed": 1338}, {"seed": 0}])
def test_every_epoch_and_seed_has_its_own_order(other):
    """Two independent permutations agree in one place on average, and in more than 7 once in 100,000 cases."""
    windows = count_windows(1000, SEQUENCE_LENGTH)
    first, second = starts(n_samples=windows), starts(n_samples=windows, **other)
    assert sorted(first) == sorted(second)
    assert (first == second).sum() <= 7
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(windows)


# ---- no visible structure ----


@pytest.mark.parametrize("key", [0, 1, 1337, 2**40])
def test_shuffle_has_no_visible_structure(key):
    n, bound = 4096, 4 / math.sqrt(4096)  # four standard deviations
    order = shuffled(n, key)
    position = np.arange(n)
    assert abs(np.corrcoef(position, order)[0, 1]) < bound
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(order[lag:], order[:-lag])[0, 1]) < bound
    # Each sixteenth of the order draws equally from each sixteenth of the text: 225 degrees of freedom
    table = np.histogram2d(position, order, bins=16)[0]
    assert 225 - 4 * math.sqrt(2 * 225) < chi_square(table) < 225 + 4 * math.sqrt(2 * 225)
    # Distances between consecutive windows repeat as often as by chance; a multiplicative order has few distinct ones
    distinct = len(np.unique(np.diff(order) % n)) / n
    assert abs(distinct - (1 - math.exp(-1))) < 0.03


def chi_square(counts):
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


# ---- random offsets ----


def test_random_offsets_reach_every_valid_window_and_no_other():
    n_tokens = 50
    offsets = starts("random", 3000, n_tokens)
    assert set(offsets) == set(range(n_tokens - SEQUENCE_LENGTH))  # the last window ends at token 49


def test_random_offsets_are_uniform_and_repeat():
    n_tokens = 64_000 + SEQUENCE_LENGTH
    offsets = starts("random", 64_000, n_tokens)
    assert chi_square(np.histogram(offsets, bins=64, range=(0, 64_000))[0]) < 63 + 4 * math.sqrt(2 * 63)
    assert abs(len(set(offsets)) / 64_000 - (1 - math.exp(-1))) < 0.01  # drawn with replacement
    assert abs(np.corrcoef(offsets[1:], offsets[:-1])[0, 1]) < 4 / math.sqrt(64_000)


def test_random_seeds_differ():
    assert (starts("random", seed=1) != starts("random", seed=2)).mean() > 0.9


def test_offsets_beyond_32_bits():
    """A stream of 10**11 tokens, as FineWeb's larger samples have."""
    for sampling in ("shuffle", "random"):
        offsets = starts(sampling, 1000, n_tokens=10**11)
        assert offsets.dtype == np.int64
        assert 0 <= offsets.min() < 10**9 and 0.99e11 < offsets.max() <= 10**11 - SEQUENCE_LENGTH - 1


# ---- seeds ----


def test_stateless_seeds_are_distinct():
    where = list(itertools.product([1337], range(100), range(8), range(8)))
    seeds = {stateless_seed(*numbers) for numbers in where}
    assert len(seeds) == len(where)
    assert stateless_seed(1, 2) != stateless_seed(2, 1)
    assert stateless_seed(1) != stateless_seed(1, 0)
    assert stateless_seed(1337, 5, 0, 0) != stateless_seed(1338, 5, 0, 0)


def test_stateless_seeds_are_valid_for_torch_and_fill_their_range():
    seeds = [stateless_seed(1337, step) for step in range(1000)]
    assert min(seeds) >= 0 and 2**62 < max(seeds) < 2**63
    torch.Generator().manual_seed(max(seeds))
