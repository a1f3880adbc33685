"""Batches compared with slices of the token array: the same tokens for any number of processes, from any step."""

import pickle

import numpy as np
import pytest
import torch

from gpt2repro.data.batches import MicroBatches
from gpt2repro.data.mixture import Mixture
from gpt2repro.data.order import count_windows, window_starts
from gpt2repro.data.token_stream import TokenStream
from gpt2repro.errors import UserError
from gpt2repro.recipe import Recipe


T = 8
SEQUENCES = 8  # per step
STEPS = 6
TOKENS = np.random.default_rng(0).integers(0, 50_257, 205).astype(np.uint16)  # 25 windows: the third step ends epoch 0
LAYOUTS = [(1, 2), (2, 2), (4, 2), (1, 8), (8, 1), (2, 4)]  # processes, micro-batch size


@pytest.fixture
def stream(tmp_path):
    """The tokens in shards of 30, so that every fourth window crosses a shard boundary; a mixture of one source."""
    parts = np.split(TOKENS, range(30, len(TOKENS), 30))
    paths = [tmp_path / f"train_{i:05d}.npy" for i in range(len(parts))]
    for path, part in zip(paths, parts):
        np.save(path, part)
    tokens = TokenStream(tuple(paths), tuple(map(len, parts)), (None,) * len(parts), 50_257)
    return Mixture(("alone",), (tokens,), (1000,))


def micro_batches(stream, rank=0, num_processes=1, micro_batch_size=2, **fields):
    recipe = Recipe(
        global_batch_tokens=SEQUENCES * T,
        sequence_length=T,
        micro_batch_size=micro_batch_size,
        max_steps=STEPS,
        warmup_steps=0,
        num_workers=0,
    )
    return MicroBatches(stream, Recipe(**vars(recipe) | fields), rank, num_processes)


def global_batch(stream, step, num_processes, micro_batch_size, **fields):
    """(SEQUENCES, T + 1): what all ranks read in a step, in sample order."""
    ranks = [micro_batches(stream, rank, num_processes, micro_batch_size, **fields) for rank in range(num_processes)]
    accumulation = SEQUENCES // (num_processes * micro_batch_size)
    return torch.cat([rank[step, micro] for micro in range(accumulation) for rank in ranks])


@pytest.mark.parametrize("sampling", ["shuffle", "sequential", "random"])
@pytest.mark.parametrize("num_processes, micro_batch_size", LAYOUTS)
def test_a_step_reads_the_same_tokens_for_any_number_of_processes(stream, sampling, num_processes, micro_batch_size):
    for step in range(STEPS):
        samples = np.arange(step * SEQUENCES, (step + 1) * SEQUENCES)
        starts = window_starts(sampling, samples, len(TOKENS), T, Recipe.seed)
        expected = [TOKENS[start : start + T + 1].tolist() for start in starts]
        assert global_batch(stream, step, num_processes, micro_batch_size, sampling=sampling).tolist() == expected


@pytest.mark.parametrize("num_processes, micro_batch_size", LAYOUTS)
def test_each_epoch_predicts_each_token_once(stream, num_processes, micro_batch_size):
    """An epoch of 25 windows is 3 steps and one sequence."""
    windows = torch.cat([global_batch(stream, step, num_processes, micro_batch_size) for step in range(4)])
    epoch = windows[: count_windows(len(TOKENS), T)]
    assert sorted(epoch[:, 1:].flatten().tolist()) == sorted(TOKENS[1 : 25 * T + 1].tolist())


def test_sequential_steps_walk_through_the_text(stream):
    """As build-nanogpt reads: inputs and targets of step 0 are tokens 0 ... S*T - 1 and 1 ... S*T."""
    batch = global_batch(stream, 0, 2, 2, sampling="sequential")
    assert batch[:, :-1].flatten().tolist() == TOKENS[: SEQUENCES * T].tolist()
    assert batch[:, 1:].flatten().tolist() == TOKENS[1 : SEQUENCES * T + 1].tolist()


RAMP = {"batch_ramp_start": 2 * T, "batch_ramp_tokens": 16 * T, "global_batch_tokens": 8 * T}
# Sequences per step: 2, plus 6/16 for each sequence seen, rounded down to whole pairs, until 16 were seen.
RAMP_SEQUENCES = [2, 2, 2, 4, 4, 6, 8, 8]


def test_the_batch_grows_with_the_tokens_seen():
    recipe = Recipe(sequence_length=T, micro_batch_size=1, **RAMP)
    seen = [sum(RAMP_SEQUENCES[:step]) for step in range(9)]
    assert [recipe.first_sample(step) for step in range(9)] == seen
    assert [recipe.tokens_before(step) for step in range(9)] == [n * T for n in seen]
    assert [recipe.accumulation(2, step) for step in range(8)] == [n // 2 for n in RAMP_SEQUENCES]
    assert recipe.first_sample(1_000_006) == seen[6] + 1_000_000 * 8


def test_a_ramp_like_gpt3s_is_linear_and_has_the_stated_length():
    """32k to 0.5M tokens over the first 4 billion, as GPT-3 125M may have used: appendix B."""
    recipe = Recipe(batch_ramp_start=2**15, batch_ramp_tokens=4 * 10**9)
    steps = next(step for step in range(10**6) if recipe.tokens_before(step) >= 4 * 10**9)
    sizes = [recipe.tokens_before(step + 1) - recipe.tokens_before(step) for step in range(steps + 2)]
    assert sizes[0] == 2**15 and sizes[-2:] == [2**19] * 2 and sizes == sorted(sizes)
    assert set(sizes) == {2**15 * n for n in range(1, 17)}
    for step in range(0, steps, 500):
        line = 2**15 + (2**19 - 2**15) * recipe.tokens_before(step) / (4 * 10**9)
        assert line - 2**15 < sizes[step] <= line
    assert recipe.tokens_before(steps) - 4 * 10**9 < 2**19


@pytest.mark.parametrize("num_processes, micro_batch_size", [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("first_step", [0, 2, 7])
def test_a_growing_batch_is_the_same_for_any_number_of_processes(stream, num_processes, micro_batch_size, first_step):
    """From any step on, samples are read in order, none twice and none skipped."""
    fields = RAMP | {"max_steps": len(RAMP_SEQUENCES)}
    ranks = [micro_batches(stream, rank, num_processes, micro_batch_size, **fields) for rank in range(num_processes)]
    found = torch.cat([torch.cat(each) for each in zip(*(rank.iterate(first_step, False) for rank in ranks))])
    samples = np.arange(sum(RAMP_SEQUENCES[:first_step]), sum(RAMP_SEQUENCES))
    starts = window_starts("shuffle", samples, len(TOKENS), T, Recipe.seed)
    assert found.tolist() == [TOKENS[start : start + T + 1].tolist() for start in starts]


def test_the_seed_changes_the_batches(stream):
    assert not torch.equal(global_batch(stream, 0, 1, 2, seed=1), global_batch(stream, 0, 1, 2, seed=2))


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("first_step", [0, 1, 4, STEPS])
def test_a_resumed_run_reads_the_rest_of_the_uninterrupted_one(stream, num_workers, first_step):
    batches = micro_batches(stream, rank=1, num_processes=2, num_workers=num_workers)
    whole = [batches[step, micro] for step in range(STEPS) for micro in range(2)]
    resumed = list(batches.iterate(first_step, pin_memory=False))
    assert len(resumed) == (STEPS - first_step) * 2
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole[first_step * 2 :]))
    assert all(batch.shape == (2, T + 1) and batch.dtype == torch.int64 for batch in resumed)


def test_a_pickled_copy_reads_the_same(stream):
    batches = micro_batches(stream)
    expected = batches[1, 1]
    message = pickle.dumps(batches)
    assert torch.equal(pickle.loads(message)[1, 1], expected)
    assert len(message) < 10_000  # file names are pickled, tokens are not


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_token_beyond_the_vocabulary_is_one_line_also_from_a_worker(stream, num_workers):
    path = stream.streams[0].paths[2]
    np.save(path, np.where(np.arange(30) == 17, 60_000, np.load(path)).astype(np.uint16))
    with pytest.raises(UserError) as caught:
        list(micro_batches(stream, num_workers=num_workers).iterate(0, pin_memory=False))
    message = "train_00002.npy holds token 60000, but its tokenizer has the ids 0 to 50256"
    assert message in str(caught.value) and "\n" not in str(caught.value)
