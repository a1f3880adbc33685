"""Mixtures compared with plain counting: exact shares, the same stream for any layout, each source in its own order."""

import itertools
import json
import math
from collections import Counter
from hashlib import sha256

import numpy as np
import pytest
import torch

from gpt2repro.data.batches import MicroBatches
from gpt2repro.data.manifest import Manifest
from gpt2repro.data.mixture import RunData
from gpt2repro.data.order import (
    MIXTURE_BLOCK,
    _hash,
    count_windows,
    mix,
    mixture_slots,
    permute,
    source_seed,
    stateless_seed,
    window_starts,
)
from gpt2repro.data.token_stream import unigram_entropy
from gpt2repro.errors import UserError
from gpt2repro.recipe import Recipe


T = 8
SEQUENCES = 16  # per step


def tokenizer_record(name, vocab_size):
    """Of a tokenizer.json that holds only its name."""
    return {
        "name": name,
        "vocab_size": vocab_size,
        "eot_id": vocab_size - 1,
        "sha256": sha256(name.encode()).hexdigest(),
    }


TOKENIZER = tokenizer_record("bpe:600", 600)
SIZES = {"a": 401, "b": 165, "c": 83}  # 50, 20 and 10 windows
WEIGHTS = {"a": 0.7, "b": 0.2, "c": 0.1}


def write(directory, split, tokens, tokenizer=TOKENIZER):
    """Add a split to a prepared directory."""
    (directory / "tokenizer").mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer" / "tokenizer.json").write_text(tokenizer["name"])
    path = directory / "manifest.json"
    manifest = {"format_version": 1, "corpus": {"name": directory.name}, "tokenizer": tokenizer, "splits": {}}
    if path.exists():
        manifest = json.loads(path.read_text())
        del manifest["sha256"]
    np.save(directory / f"{split}_00000.npy", tokens)
    shard = {"file": f"{split}_00000.npy", "tokens": len(tokens), "documents": 1, "sha256": "1" * 64}
    manifest["splits"][split] = {"tokens": len(tokens), "documents": 1, "bytes": 4 * len(tokens), "shards": [shard]}
    seal = sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest | {"sha256": seal}))


@pytest.fixture
def directories(tmp_path):
    """Three sources whose tokens identify them: a has 0 ... 199, b 200 ... 399, c 400 ... 599."""
    generator = np.random.default_rng(0)
    for number, (name, size) in enumerate(SIZES.items()):
        for split in ("train", "val"):
            write(tmp_path / name, split, generator.integers(200 * number, 200 * (number + 1), size).astype(np.uint16))
    return {str(tmp_path / name): weight for name, weight in WEIGHTS.items()}


def recipe(**fields):
    settings = {"global_batch_tokens": SEQUENCES * T, "sequence_length": T, "micro_batch_size": 2, "max_steps": 200}
    return Recipe(**settings | {"num_workers": 0} | fields)


def global_batch(data, step, num_processes=1, micro_batch_size=16, **fields):
    """(SEQUENCES, T + 1): what all ranks read in a step, in sample order."""
    run = recipe(micro_batch_size=micro_batch_size, **fields)
    ranks = [MicroBatches(data, run, rank, num_processes) for rank in range(num_processes)]
    accumulation = run.accumulation(num_processes, step)
    return torch.cat([rank[step, micro] for micro in range(accumulation) for rank in ranks])


# ---- shares ----


@pytest.mark.parametrize(
    ("weights", "slots"),
    [
        ([1], [1000]),
        ([0.7, 0.3], [700, 300]),
        ([70, 30], [700, 300]),
        ([0.1, 0.2, 0.3, 0.4], [100, 200, 300, 400]),
        ([0.999, 0.001], [999, 1]),
        ([0.1] * 10, [100] * 10),
        ([1, 1, 1], [333, 334, 333]),
        ([1] * 200, [5] * 200),
    ],
)
def test_slots_are_the_weights_in_thousandths(weights, slots):
    assert mixture_slots(weights).tolist() == slots


def test_any_weights_are_met_within_a_thousandth():
    generator = np.random.default_rng(0)
    for _ in range(300):
        weights = generator.uniform(0.01, 1, generator.integers(1, 20))
        slots = mixture_slots(weights)
        assert slots.sum() == MIXTURE_BLOCK
        assert np.abs(slots / MIXTURE_BLOCK - weights / weights.sum()).max() <= 1e-3


@pytest.mark.parametrize("slots", [[1000], [700, 300], [1, 999], [500, 200, 200, 100]])
def test_every_block_has_the_exact_shares(slots):
    sources, numbers = mix(np.arange(5 * MIXTURE_BLOCK), np.array(slots), seed=7)
    for block in sources.reshape(5, MIXTURE_BLOCK):
        assert np.bincount(block, minlength=len(slots)).tolist() == slots
    for source, count in enumerate(slots):  # each is numbered from 0, without gaps
        assert numbers[sources == source].tolist() == list(range(5 * count))


def test_mix_is_the_permutation_written_out():
    """A sample's source is the one whose slots contain its permuted place; its number counts the earlier samples of
    that source. test_order.py tests the permutation itself."""
    slots, seed = [300, 600, 100], 11
    sources, numbers = mix(np.arange(3 * MIXTURE_BLOCK), np.array(slots), seed)
    seen = Counter()
    for sample in range(3 * MIXTURE_BLOCK):
        block, place = divmod(sample, MIXTURE_BLOCK)
        key = _hash(np.array([block]), stateless_seed(seed, 0))
        slot = int(permute(np.array([place], np.uint64), MIXTURE_BLOCK, key)[0])
        source = 0 if slot < 300 else 1 if slot < 900 else 2
        assert (sources[sample], numbers[sample]) == (source, seen[source])
        seen[source] += 1


def test_the_mixture_never_changes():
    """Running trainings depend on it; see test_the_order_never_changes."""
    sources, numbers = mix(np.arange(3990, 4010), np.array([700, 300]), seed=1337)
    assert sources.tolist() == [0, 1, 0, 1, 0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0, 1, 0]
    assert numbers[sources == 0].tolist() == list(range(2795, 2805))
    assert numbers[sources == 1].tolist() == list(range(1195, 1205))


def test_any_range_of_samples_gives_the_same():
    slots = np.array([650, 350])
    whole = mix(np.arange(2500), slots, seed=3)
    for first, last in ((0, 1), (999, 1001), (990, 2010), (1234, 1250), (2499, 2500)):
        for part, all_of_them in zip(mix(np.arange(first, last), slots, seed=3), whole):
            assert part.tolist() == all_of_them[first:last].tolist()


def test_every_seed_and_block_has_its_own_order():
    """Two independent orders of halves agree in half of 1,000 places, with a standard deviation of 16."""
    slots = np.array([500, 500])
    first, second, third = mix(np.arange(3000), slots, seed=1)[0].reshape(3, 1000)
    other = mix(np.arange(1000), slots, seed=2)[0]
    for a, b in itertools.combinations((first, second, third, other), 2):
        assert abs((a == b).sum() - 500) < 80
    runs = 1 + (first[1:] != first[:-1]).sum()  # well mixed: 501 runs on average
    assert abs(runs - 501) < 80


def test_every_source_has_its_own_seed():
    assert source_seed(1337, 0) == 1337
    assert len({source_seed(seed, source) for seed in (0, 1, 1337) for source in range(5)}) == 15


# ---- batches ----


@pytest.mark.parametrize("sampling", ["shuffle", "sequential", "random"])
def test_batches_are_the_sources_own_windows(directories, sampling):
    data = RunData.open(directories).train
    tokens = [np.load(f"{directory}/train_00000.npy") for directory in directories]
    seen = Counter()
    for step in range(70):  # across a block boundary
        sources, _ = mix(np.arange(step * SEQUENCES, (step + 1) * SEQUENCES), mixture_slots([0.7, 0.2, 0.1]), 1337)
        for window, source in zip(global_batch(data, step, sampling=sampling), sources):
            number, seen[source] = seen[source], seen[source] + 1
            seed = source_seed(1337, source)
            (start,) = window_starts(sampling, np.array([number]), len(tokens[source]), T, seed)
            assert window.tolist() == tokens[source][start : start + T + 1].tolist()
            assert (window // 200 == source).all()


@pytest.mark.parametrize("num_processes, micro_batch_size", [(1, 4), (2, 4), (4, 4), (1, 16), (8, 2)])
def test_any_layout_reads_the_identical_stream(directories, num_processes, micro_batch_size):
    """One process x 4 micro-batches, 2 x 2, 4 x 1 and others."""
    data = RunData.open(directories).train
    for step in (0, 1, 61, 62, 63, 199):  # sample 1,000 is in step 62
        expected = global_batch(data, step, 1, 16)
        assert torch.equal(global_batch(data, step, num_processes, micro_batch_size), expected)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_reads_the_rest_of_the_uninterrupted_one(directories, num_workers):
    batches = MicroBatches(RunData.open(directories).train, recipe(max_steps=70, num_workers=num_workers), 1, 2)
    whole = [batches[step, micro] for step in range(70) for micro in range(4)]
    resumed = list(batches.iterate(60, pin_memory=False))
    assert len(resumed) == 10 * 4 and all(torch.equal(a, b) for a, b in zip(resumed, whole[60 * 4 :]))


def test_each_source_is_read_once_per_epoch(directories):
    """The first epochs of each source: its 50, 20 or 10 windows, each once."""
    data = RunData.open(directories).train
    read = torch.cat([global_batch(data, step) for step in range(62)])
    for source, stream in enumerate(data.streams):
        n = count_windows(len(stream), T)
        windows = read[(read // 200 == source).all(1)].tolist()
        tiles = sorted(stream.read(start, T + 1).tolist() for start in range(0, n * T, T))
        for epoch in range(len(windows) // n):
            assert sorted(windows[epoch * n : (epoch + 1) * n]) == tiles
        assert len(windows) >= 2 * n


@pytest.mark.parametrize("sampling", ["shuffle", "sequential", "random"])
def test_a_mixture_of_one_source_is_that_source(directories, sampling):
    directory = next(iter(directories))
    tokens = np.load(f"{directory}/train_00000.npy")
    for weight in (1.0, 0.3):
        data = RunData.open({directory: weight}).train
        for step in (0, 1, 62, 150):
            samples = np.arange(step * SEQUENCES, (step + 1) * SEQUENCES)
            starts = window_starts(sampling, samples, len(tokens), T, 1337)
            expected = [tokens[start : start + T + 1].tolist() for start in starts]
            assert global_batch(data, step, sampling=sampling).tolist() == expected


# ---- what a run records ----


def test_the_manifest_of_one_directory_is_its_own(directories):
    directory = next(iter(directories))
    data, manifest = RunData.open({directory: 0.3}), Manifest.open(directory)
    assert data.sources[0].manifest == manifest and data.fingerprint == manifest.fingerprint
    assert data.tokenizer == manifest.tokenizer and data.totals("val") == manifest.splits["val"]


def test_the_record_of_a_mixture_includes_every_manifest(directories):
    manifest = RunData.open(directories).record()
    assert manifest["corpus"] == {"name": "70% a + 20% b + 10% c"}
    assert manifest["tokenizer"] == TOKENIZER
    for split in manifest["splits"].values():
        assert split == {"tokens": sum(SIZES.values()), "documents": None, "bytes": None}
    for (directory, weight), source in zip(directories.items(), manifest["sources"]):
        expected = {"directory": directory, "weight": weight} | RunData.open({directory: 1.0}).record()
        assert source == expected and "shards" not in json.dumps(source)


def test_the_fingerprint_of_a_mixture_covers_contents_and_weights(directories, tmp_path):
    def hash_of(weights):
        return RunData.open(weights).fingerprint

    first = hash_of(directories)
    assert hash_of({directory: 10 * weight for directory, weight in directories.items()}) == first
    assert hash_of(dict(zip(directories, (0.6, 0.3, 0.1)))) != first
    assert hash_of(dict(reversed(directories.items()))) != first  # a source's seed depends on its position
    (tmp_path / "a").rename(tmp_path / "moved")
    (a, *_), (weight, *_) = directories, directories.values()
    moved = {str(tmp_path / "moved"): weight} | {d: w for d, w in directories.items() if d != a}
    assert hash_of(moved) == first
    write(tmp_path / "moved", "train", np.zeros(99, np.uint16))
    assert hash_of(moved) != first


def test_the_baseline_weights_the_frequencies_of_the_sources(directories):
    """The entropy of drawing a source by its weight, then one of its tokens; the sources share no token."""
    data = RunData.open(directories).train
    entropies = [unigram_entropy(stream.counts(600)) for stream in data.streams]
    weights = list(directories.values())
    expected = sum(w * (h - math.log(w)) for w, h in zip(weights, entropies))
    assert unigram_entropy(data.frequencies(600)) == pytest.approx(expected, abs=1e-12)


# ---- mistakes ----


def refused(weights):
    with pytest.raises(UserError) as caught:
        RunData.open(weights)
    return str(caught.value)


@pytest.mark.parametrize("weight", [0.0, -1.0, 0.0004, math.nan, math.inf, 1e-320, 1e308])
def test_a_weight_below_a_thousandth_is_refused(directories, weight):
    a, b, _ = directories
    assert "must be at least a thousandth of their sum" in refused({a: 1e308 if weight == 1e308 else 1.0, b: weight})


def test_different_tokenizers_are_named(directories, tmp_path):
    char = tokenizer_record("char", 600)
    for split in ("train", "val"):
        write(tmp_path / "d", split, np.zeros(99, np.uint16), char)
    message = refused(directories | {str(tmp_path / "d"): 1.0})
    assert f"{tmp_path / 'a'} has tokens of bpe:600 (600 ids, sha256 {TOKENIZER['sha256'][:8]}...)" in message
    assert f"{tmp_path / 'd'} of char (600 ids, sha256 {char['sha256'][:8]}...)" in message and "\n" not in message


def test_tokens_without_a_tokenizer_mix_with_those_of_gpt2(tmp_path):
    gpt2 = tokenizer_record("gpt2", 50257)
    for name, tokenizer in (("ours", gpt2), ("other", TOKENIZER)):
        for split in ("train", "val"):
            write(tmp_path / name, split, np.zeros(99, np.uint16), tokenizer)
    (tmp_path / "nanogpt").mkdir()
    for split in ("train", "val"):
        np.zeros(99, np.uint16).tofile(tmp_path / "nanogpt" / f"{split}.bin")
    foreign, ours, other = (str(tmp_path / name) for name in ("nanogpt", "ours", "other"))
    assert RunData.open({foreign: 1.0, ours: 1.0}).record()["tokenizer"] == gpt2
    assert "other has tokens of bpe:600" in refused({foreign: 1.0, other: 1.0})


def test_two_directories_of_one_name_are_refused(directories, tmp_path):
    for split in ("train", "val"):
        write(tmp_path / "deep" / "a", split, np.zeros(99, np.uint16))
    assert "data has two directories named a" in refused(directories | {str(tmp_path / "deep" / "a"): 1.0})


def test_all_missing_directories_are_named_at_once(directories, tmp_path):
    message = refused(directories | {str(tmp_path / "x"): 1.0, str(tmp_path / "y"): 1.0})
    assert [line.split(" does not")[0] for line in message.splitlines()] == [
        f"data directory {tmp_path / name}" for name in ("x", "y")
    ]
