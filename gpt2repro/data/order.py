"""Which tokens a step trains on: a pure function of the seed and the sample's number.

Nothing about the order is saved but the step (and the batches that rollbacks skip), and any world size reads the
identical token stream.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from gpt2repro.recipe import Sampling


FEISTEL_ROUNDS = 6
MIXTURE_BLOCK = 1000  # consecutive samples over which the sources of a mixture have their exact shares


def count_windows(n_tokens: int, sequence_length: int) -> int:
    """How many windows of sequence_length + 1 tokens tile the stream. Each shares one token with the next, so that
    every token but the first is predicted once."""
    return (n_tokens - 1) // sequence_length


def window_starts(
    sampling: Sampling, samples: np.ndarray, n_tokens: int, sequence_length: int, seed: int
) -> np.ndarray:
    """Where the windows of these samples start in the token stream.

    Args:
        sampling: `shuffle`: each epoch is a fresh permutation of the windows; `sequential`: the windows in order, as
            build-nanogpt reads them; `random`: any offset, with replacement, as nanoGPT draws them.
        samples: (N,) int, sample numbers, counted from the start of the run.
        n_tokens: length of the token stream, more than sequence_length.
    Returns:
        (N,) int64 offsets, each at most n_tokens - sequence_length - 1.
    """
    samples = np.asarray(samples, np.uint64)
    seed_key = _hash(np.uint64(seed))
    if sampling == "random":
        starts = _hash(samples, seed_key) % np.uint64(n_tokens - sequence_length)
        return starts.astype(np.int64)
    n_windows = np.uint64(count_windows(n_tokens, sequence_length))
    epochs, windows = samples // n_windows, samples % n_windows
    if sampling == "shuffle":
        windows = permute(windows, int(n_windows), _hash(epochs, seed_key))
    return windows.astype(np.int64) * sequence_length


def mixture_slots(weights: list[float]) -> np.ndarray:
    """How many samples of each block come from each of K sources with these weights.

    Returns:
        (K,) int64, MIXTURE_BLOCK in total. A source's share of the block is within 1 / MIXTURE_BLOCK of its share of
        the weights, and equal to it if that is a multiple of 1 / MIXTURE_BLOCK.
    """
    ends = np.cumsum(weights)
    return np.diff(np.floor(ends / ends[-1] * MIXTURE_BLOCK + 0.5), prepend=0).astype(np.int64)


def mix(samples: np.ndarray, slots: Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which source each sample of a mixture comes from.

    Each block shuffles its slots afresh. The samples of a source are numbered in the order in which the run reads them,
    so that with a single source sample i of the run is sample i of the source.

    Args:
        samples: (N,) int, sample numbers, counted from the start of the run.
        slots: (K,) int, MIXTURE_BLOCK in total: how many samples of each block come from each source.
    Returns:
        (N,) int64, the source of each sample; (N,) int64, its number among the samples of that source.
    """
    blocks, block_of = np.unique(samples // MIXTURE_BLOCK, return_inverse=True)
    keys = np.repeat(_hash(blocks, stateless_seed(seed, 0)), MIXTURE_BLOCK)
    positions = np.tile(np.arange(MIXTURE_BLOCK, dtype=np.uint64), len(blocks))
    shuffled = permute(positions, MIXTURE_BLOCK, keys).reshape(len(blocks), MIXTURE_BLOCK)
    sources = np.searchsorted(np.cumsum(slots), shuffled, side="right")  # (blocks, MIXTURE_BLOCK)
    is_source = sources[..., None] == np.arange(len(slots))  # (blocks, MIXTURE_BLOCK, K)
    counts_so_far = np.cumsum(is_source, axis=1)  # within the block, this position included

    position = samples % MIXTURE_BLOCK
    source = sources[block_of, position]
    in_earlier_blocks = blocks[block_of] * np.asarray(slots)[source]
    return source, in_earlier_blocks + counts_so_far[block_of, position, source] - 1


def source_seed(seed: int, source: int) -> int:
    """The seed of a source's data order. The first source has the run's own seed, as in a run without a mixture."""
    return stateless_seed(seed, source) if source else seed


def stateless_seed(*where: int) -> int:
    """A 63-bit seed that is a function of all the numbers given, e.g. (seed, step, micro-batch, rank)."""
    mixed = np.zeros((), np.uint64)
    for number in where:
        mixed = _hash(number, mixed)
    return int(mixed) >> 1


def permute(indices: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Apply a pseudo-random permutation of 0 ... n - 1 to indices, without a table of n entries.

    A Feistel network permutes the smallest 4**k >= n values. A value that it maps to n or above goes through it again
    until it falls below n ("cycle walking"), which yields a permutation of 0 ... n - 1: Black and Rogaway, "Ciphers
    with Arbitrary Finite Domains" (2002).

    Args:
        indices: (N,) uint64 below n.
        keys: (N,) uint64; indices with the same key see the same permutation.
    Returns:
        (N,) uint64 below n.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)

    def network(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left, right = values >> half, values & mask
        for round_number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (_hash(right, keys + np.uint64(round_number)) & mask)
        return (left << half) | right

    result = network(indices, keys)
    outside = result >= n
    while outside.any():
        result[outside] = network(result[outside], keys[outside])
        outside = result >= n
    return result


def _hash(values: ArrayLike, key: ArrayLike = 0) -> np.ndarray:
    """SplitMix64's output function of each value and key, both uint64. Source: Steele, Lea and Flood (2014)."""
    with np.errstate(over="ignore"):  # wraparound modulo 2**64 is intended
        z = (np.asarray(values, np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.asarray(key, np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
