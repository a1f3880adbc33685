"""Shards compared with the arrays they were made from, their manifest with a recount; `verify` finds each damage."""

import dataclasses
import errno
import hashlib
import json
import math
import os
import pickle
import resource
import shutil

import numpy as np
import pytest

from gpt2repro.data import shards
from gpt2repro.data.manifest import Manifest, shard_state
from gpt2repro.data.shards import ShardWriter, Split
from gpt2repro.data.token_stream import TokenStream, unigram_entropy
from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.errors import UserError
from gpt2repro.files import file_sha256


EOT = 99
LENGTHS = [5, 0, 1, 30, 2, 64, 0, 0, 7, 200, 3]  # of the documents, in tokens


def make_documents():
    generator = np.random.default_rng(0)
    return [generator.integers(0, EOT, length).tolist() for length in LENGTHS]


def write(directory, documents, shard_tokens, split="train", dtype=np.uint16, eot_id=EOT):
    writer = ShardWriter(directory, split, np.dtype(dtype), shard_tokens, eot_id)
    for tokens in documents:
        writer.add(tokens, text_bytes=3 * len(tokens))
    return writer.finish()


def write_prepared(directory, shard_tokens=50):
    """A complete prepared directory: both splits, tokenizer, manifest."""
    tokenizer = build_tokenizer("char", ["".join(map(chr, range(33, 33 + EOT + 1)))])
    splits = {
        "train": write(directory, make_documents(), shard_tokens),
        "val": write(directory, make_documents()[:3], shard_tokens, "val"),
    }
    tokenizer.fast.save_pretrained(directory / "tokenizer")
    record = dataclasses.replace(tokenizer.record(), eot_id=EOT)
    Manifest({"name": "files"}, record, splits).write(directory)
    return directory


def flat(documents):
    return [token for tokens in documents for token in (EOT, *tokens)]


# ---- writing ----


@pytest.mark.parametrize("shard_tokens", [1, 2, 7, 64, 312 + 11, 10_000])  # 323 = all tokens in one full shard
def test_shards_hold_the_documents_in_order(tmp_path, shard_tokens):
    documents = make_documents()
    record = write(tmp_path, documents, shard_tokens)
    arrays = [np.load(tmp_path / shard.file) for shard in record.shards]

    assert np.concatenate(arrays).tolist() == flat(documents)
    assert [len(array) for array in arrays[:-1]] == [shard_tokens] * (len(arrays) - 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"train_{i:05d}.npy" for i in range(len(arrays))]

    assert record.tokens == sum(map(len, arrays)) == sum(LENGTHS) + len(LENGTHS)
    assert record.documents == len(LENGTHS)
    assert record.bytes == 3 * sum(LENGTHS)
    for shard, array in zip(record.shards, arrays):
        assert shard.tokens == len(array)
        assert shard.documents == (array == EOT).sum()  # those that start in it
        assert shard.sha256 == hashlib.sha256((tmp_path / shard.file).read_bytes()).hexdigest()


def test_each_document_counts_for_the_shard_that_holds_its_first_token(tmp_path):
    """Including a document that starts exactly where a shard does, and empty ones without an end-of-text token."""
    record = write(tmp_path, [[1, 2], [3, 4], [5], []], 3)
    assert [shard.documents for shard in record.shards] == [1, 1, 2]
    record = write(tmp_path, [[1, 2, 3], [], [4], []], 3, "val", eot_id=None)
    assert [shard.documents for shard in record.shards] == [2, 2]


def test_without_an_end_of_text_token_documents_follow_each_other(tmp_path):
    record = write(tmp_path, [[1, 2], [], [3]], 2, eot_id=None)
    assert [np.load(tmp_path / shard.file).tolist() for shard in record.shards] == [[1, 2], [3]]
    assert (record.tokens, record.documents) == (3, 3)


def test_without_documents_there_is_no_shard(tmp_path):
    assert write(tmp_path, [], 10) == Split(tokens=0, documents=0, bytes=0, shards=())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("buffer_tokens", [1, 7, 64, 10**6])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_files_equal_numpys(tmp_path, monkeypatch, buffer_tokens, dtype):
    """Byte for byte, for buffers smaller and larger than a document and a shard."""
    monkeypatch.setattr(ShardWriter, "BUFFER_TOKENS", buffer_tokens)
    record = write(tmp_path, make_documents(), 50, dtype=dtype)
    tokens = np.array(flat(make_documents()), dtype)
    for number, shard in enumerate(record.shards):
        np.save(tmp_path / "expected.npy", tokens[50 * number : 50 * (number + 1)])
        assert (tmp_path / shard.file).read_bytes() == (tmp_path / "expected.npy").read_bytes()


def test_a_shard_gets_its_name_once_it_is_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(ShardWriter, "BUFFER_TOKENS", 1)
    writer = ShardWriter(tmp_path, "train", np.dtype(np.uint16), 10, EOT)
    writer.add(range(14), 0)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"train_00000.npy", f"train_00001.npy.{os.getpid()}.tmp"}
    writer.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["train_00000.npy"]
    assert np.load(tmp_path / "train_00000.npy").tolist() == [EOT, *range(9)]
    writer.discard()


def test_a_disk_that_fills_up_leaves_no_part_of_a_shard(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = ShardWriter(tmp_path, "train", np.dtype(np.uint16), 10, EOT)
    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        writer.add(range(14), 0)
    writer.discard()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shard_tokens", [3, 1000, 10**6])
def test_shards_decode_to_their_text(tmp_path, topics, gpt2, encoding, shard_tokens):
    texts = ["", "Ümlaut 👩‍👩‍👧 \0\r\n", "written <|endoftext|> out", *topics[:3]]
    record = write(tmp_path, gpt2.encode_batch(texts), shard_tokens, eot_id=gpt2.eot_id)
    tokens = np.concatenate([np.load(tmp_path / shard.file) for shard in record.shards])

    starts = np.flatnonzero(tokens == 50256)
    assert starts[0] == 0
    decoded = [encoding.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]
    assert decoded == texts


@pytest.mark.parametrize(
    "vocab_size, dtype", [(65, np.uint16), (50_257, np.uint16), (65_536, np.uint16), (65_537, np.uint32)]
)
def test_the_smallest_type_that_holds_every_id(tmp_path, vocab_size, dtype):
    assert shards.token_dtype(vocab_size) == dtype
    record = write(tmp_path, [[0, vocab_size - 1]], 10, dtype=shards.token_dtype(vocab_size), eot_id=None)
    array = np.load(tmp_path / record.shards[0].file, mmap_mode="r")
    assert array.dtype == dtype and array.ndim == 1
    assert array.tolist() == [0, vocab_size - 1]


# ---- reading ----


@pytest.mark.parametrize("shard_tokens", [1, 7, 50, 1000])
def test_reads_cross_shard_boundaries(tmp_path, shard_tokens):
    stream = TokenStream.open(write_prepared(tmp_path, shard_tokens), "train")
    tokens = flat(make_documents())
    assert len(stream) == len(tokens)
    for start in range(0, len(tokens), 3):
        for length in (0, 1, 2, 49, 50, 51, 120):
            if start + length <= len(tokens):
                assert stream.read(start, length).tolist() == tokens[start : start + length]
    assert stream.read(0, len(tokens)).dtype == np.int64
    assert len(TokenStream.open(tmp_path, "val")) == len(flat(make_documents()[:3]))


def test_a_pickle_holds_file_names_only(tmp_path):
    stream = TokenStream.open(write_prepared(tmp_path), "train")
    expected = stream.read(20, 200).tolist()  # maps the files
    message = pickle.dumps(stream)
    assert len(message) < 2000
    copy = pickle.loads(message)
    assert copy == stream
    assert copy.read(20, 200).tolist() == expected


def test_counts(tmp_path):
    stream = TokenStream.open(write_prepared(tmp_path, 7), "train")
    tokens = flat(make_documents())
    assert stream.counts(128).tolist() == [tokens.count(token) for token in range(128)]


@pytest.mark.parametrize(
    "counts, entropy",
    [
        ([7], 0.0),
        ([0, 7, 0], 0.0),
        ([5] * 50, math.log(50)),
        ([2, 1, 1], 1.5 * math.log(2)),
        ([3, 1, 0], math.log(4) - 0.75 * math.log(3)),
    ],
)
def test_unigram_entropy_of_known_cases(counts, entropy):
    assert unigram_entropy(np.array(counts)) == pytest.approx(entropy, abs=1e-12)


def test_unigram_entropy_is_the_loss_of_the_frequencies(tmp_path):
    """The mean of -log p(token) over the tokens themselves."""
    tokens = flat(make_documents())
    mean = math.fsum(-math.log(tokens.count(token) / len(tokens)) for token in tokens) / len(tokens)
    stream = TokenStream.open(write_prepared(tmp_path), "train")
    assert unigram_entropy(stream.counts(1000)) == pytest.approx(mean, abs=1e-12)


# ---- damaged directories ----


@pytest.mark.parametrize("num_workers", [1, 3])
def test_verify_accepts_intact_data(tmp_path, num_workers):
    seen = []
    manifest = Manifest.read(write_prepared(tmp_path))
    manifest.verify(tmp_path, num_workers, lambda shards: (seen.append(1) or s for s in shards))
    assert manifest.to_dict() == json.loads((tmp_path / "manifest.json").read_text())
    assert len(seen) == 7 + 1 == sum(len(split.shards) for split in manifest.splits.values())


def flip_byte(directory):
    path = directory / "train_00002.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def truncate(directory):
    path = directory / "train_00002.npy"
    path.write_bytes(path.read_bytes()[:-10])


def remove_shard(directory):
    (directory / "train_00002.npy").unlink()


def swap_shards(directory):
    a, b = (directory / f"train_0000{i}.npy" for i in (1, 2))
    a.rename(directory / "aside"), b.rename(a), (directory / "aside").rename(b)


def seal(content):
    """The seal, written out: the sha256 of the sorted JSON of everything else."""
    unsealed = {key: value for key, value in content.items() if key != "sha256"}
    return unsealed | {"sha256": hashlib.sha256(json.dumps(unsealed, sort_keys=True).encode()).hexdigest()}


def edit_manifest(change, sealed=True):
    def damage(directory):
        manifest = json.loads((directory / "manifest.json").read_text())
        change(manifest)
        if sealed:
            manifest = seal(manifest)
        (directory / "manifest.json").write_text(json.dumps(manifest))

    return damage


def edit_split(**values):
    return edit_manifest(lambda manifest: manifest["splits"]["train"].update(values))


def edit_shard(**values):
    return edit_manifest(lambda manifest: manifest["splits"]["train"]["shards"][2].update(values))


def change_tokenizer(directory):
    path = directory / "tokenizer" / "tokenizer.json"
    definition = json.loads(path.read_text())
    vocab = definition["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    path.write_text(json.dumps(definition))


def replace_shard(values, dtype):
    """Another array in the place of a shard, with its hash."""

    def damage(directory):
        path = directory / "train_00002.npy"
        np.save(path, np.array(values, dtype))
        edit_shard(sha256=file_sha256(path))(directory)

    return damage


def pipe_for_a_shard(directory):
    remove_shard(directory)
    os.mkfifo(directory / "train_00002.npy")


NOT_TOKENS = {
    "negative ids": (replace_shard([-1] * 50, np.int64), "it holds int64 in 1 dim.*, not uint16 or uint32 in one"),
    "booleans": (replace_shard([True] * 50, bool), "it holds bool in 1 dimensions"),
    "two dimensions": (replace_shard([[0]] * 50, np.uint16), "it holds uint16 in 2 dimensions"),
    "a number": (replace_shard(5, np.uint16), "it holds uint16 in 0 dimensions"),
    "objects": (replace_shard([None] * 50, object), "Array can't be memory-mapped"),
}
CHANGES = {  # in small files, which are checked at every start too
    "edited manifest": (
        edit_manifest(lambda manifest: manifest["tokenizer"].update(eot_id=5), sealed=False),
        r"manifest\.json was changed after it was written",
    ),
    "removed seal": (edit_manifest(lambda manifest: manifest.pop("sha256"), sealed=False), "was changed after"),
    "other tokenizer": (change_tokenizer, r"tokenizer\.json is damaged"),
    "missing tokenizer": (lambda directory: shutil.rmtree(directory / "tokenizer"), r"tokenizer\.json is missing"),
}
DAMAGES = {
    **CHANGES,
    **NOT_TOKENS,
    "flipped byte": (flip_byte, r"train_00002\.npy .*sha256"),
    "truncated shard": (truncate, r"train_00002\.npy .*sha256"),
    "missing shard": (remove_shard, r"train_00002\.npy is missing"),
    "swapped shards": (swap_shards, r"train_00001\.npy .*sha256.*\n.*train_00002\.npy .*sha256"),
    "tokens of a shard": (edit_shard(tokens=49), r"train_00002\.npy holds 50 tokens, the manifest says 49"),
    "documents of a shard": (edit_shard(documents=77), r"train_00002\.npy: \d documents start there.* says 77"),
    "tokens of the split": (edit_split(tokens=1), "train .*tokens"),
    "documents of the split": (edit_split(documents=1), "train .*documents"),
    "dropped shard": (edit_manifest(lambda manifest: manifest["splits"]["train"]["shards"].pop()), "train .*tokens"),
    "vocabulary": (edit_manifest(lambda manifest: manifest["tokenizer"].update(vocab_size=EOT)), "token 99, above"),
    "a folder for a shard": (
        lambda d: ((d / "train_00001.npy").unlink(), (d / "train_00001.npy").mkdir()),
        "train_00001.npy is missing",
    ),
}


@pytest.mark.parametrize("damage, complaint", DAMAGES.values(), ids=DAMAGES)
def test_verify_finds(tmp_path, damage, complaint):
    damage(write_prepared(tmp_path))
    with pytest.raises(UserError, match=complaint) as caught:
        Manifest.read(tmp_path).verify(tmp_path)
    assert "prepare the data again" in str(caught.value)


def test_verify_reports_every_damaged_file(tmp_path):
    directory = write_prepared(tmp_path)
    flip_byte(directory)
    (directory / "val_00000.npy").unlink()
    with pytest.raises(UserError) as caught:
        Manifest.read(directory).verify(directory)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and "train_00002.npy" in lines[0] and "val_00000.npy" in lines[1]


UNREADABLE = {
    **CHANGES,
    **NOT_TOKENS,
    "a pipe for a shard": (pipe_for_a_shard, "train_00002.npy cannot be opened .it is not a file"),
    "a shard elsewhere": (edit_shard(file="../train_00002.npy"), "the shard '../train_00002.npy' is not in the dir"),
    "an absolute path": (edit_shard(file="/train_00002.npy"), "the shard '/train_00002.npy' is not in the directory"),
    "truncated shard": (truncate, "cannot be opened.*delete .* and repeat the `python prepare_data.py` command"),
    "missing shard": (remove_shard, "cannot be opened"),
    "tokens of a shard": (edit_shard(tokens=49), "holds 50 tokens, the manifest says 49"),
    "not copied whole": (
        lambda directory: (directory / "manifest.json").unlink(),
        "no manifest.json.*copy that file too",
    ),
    "other version": (edit_manifest(lambda manifest: manifest.update(format_version=0)), "format version 0"),
    "broken manifest": (lambda directory: (directory / "manifest.json").write_text("{"), r"manifest\.json is damaged"),
    "a list": (lambda directory: (directory / "manifest.json").write_text("[]"), r"manifest\.json is damaged"),
    "nothing": (lambda directory: (directory / "manifest.json").write_text("null"), r"manifest\.json is damaged"),
    "no splits": (edit_manifest(lambda manifest: manifest.pop("splits")), r"manifest\.json is damaged"),
    "no vocabulary": (edit_manifest(lambda m: m["tokenizer"].pop("vocab_size")), r"manifest\.json is damaged"),
    "a folder for a shard": (
        lambda d: ((d / "train_00001.npy").unlink(), (d / "train_00001.npy").mkdir()),
        "train_00001.npy cannot be opened",
    ),
    "missing": (shutil.rmtree, "does not exist"),
}


@pytest.mark.parametrize("damage, complaint", UNREADABLE.values(), ids=UNREADABLE)
def test_open_refuses(tmp_path, damage, complaint):
    directory = tmp_path / "data"
    directory.mkdir()
    damage(write_prepared(directory))
    with pytest.raises(UserError, match=complaint):
        TokenStream.open(directory, "train")


def test_what_has_changed_is_verified_again_whatever_its_time_says(tmp_path):
    manifest = Manifest.read(write_prepared(tmp_path))
    verified = manifest.verify_changed(tmp_path, {})
    assert manifest.verify_changed(tmp_path, verified) == verified
    path = tmp_path / "train_00002.npy"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    flip_byte(tmp_path)
    os.utime(path, ns=times)
    with pytest.raises(UserError, match="train_00002.npy is damaged"):
        manifest.verify_changed(tmp_path, verified)


def rot(path, verified, sample):
    """Flip a byte without a trace in the file system: what was recorded says the same times; if it missed the sample,
    also the same sample."""
    flip_byte(path.parent)
    state = shard_state(path)
    verified[str(path)] = state if not sample else [*state[:3], verified[str(path)][3]]


def test_rot_in_a_sample_of_a_shard_is_found_at_every_start(tmp_path):
    manifest = Manifest.read(write_prepared(tmp_path))
    verified = manifest.verify_changed(tmp_path, {})
    rot(tmp_path / "train_00002.npy", verified, sample=True)
    with pytest.raises(UserError, match="train_00002.npy is damaged: its sha256 differs.*; prepare the data again"):
        manifest.verify_changed(tmp_path, verified)


def test_rot_anywhere_is_found_when_all_shards_are_hashed(tmp_path):
    manifest = Manifest.read(write_prepared(tmp_path))
    verified = manifest.verify_changed(tmp_path, {})
    rot(tmp_path / "train_00002.npy", verified, sample=False)
    manifest.verify_changed(tmp_path, verified)
    with pytest.raises(UserError, match="train_00002.npy is damaged"):
        manifest.verify_changed(tmp_path, verified, all_shards=True)


@pytest.mark.parametrize("recorded", [[1, 2, 3], {"a": 1}, None, 7, "x", []])
def test_what_an_older_version_or_nobody_recorded_is_verified_again(tmp_path, recorded):
    manifest = Manifest.read(write_prepared(tmp_path))
    verified = manifest.verify_changed(tmp_path, {})
    assert manifest.verify_changed(tmp_path, dict.fromkeys(verified, recorded)) == verified
    flip_byte(tmp_path)
    with pytest.raises(UserError, match="train_00002.npy is damaged"):
        manifest.verify_changed(tmp_path, dict.fromkeys(verified, recorded))


def test_another_trainers_shard_that_changed_since_the_run_began(tmp_path):
    for name in ("train.bin", "val.bin"):
        np.arange(50_000, dtype=np.uint16).tofile(tmp_path / name)
    manifest = Manifest.open(tmp_path)
    verified = manifest.verify_changed(tmp_path, {})
    (tmp_path / "val.bin").touch()
    manifest.verify_changed(tmp_path, verified)
    tokens = np.memmap(tmp_path / "train.bin", np.uint16)
    tokens[0] += 1
    tokens.flush()
    with pytest.raises(UserError, match="train.bin is not what it was when the run began; restore it"):
        manifest.verify_changed(tmp_path, verified)


def test_more_shards_than_a_process_may_open(tmp_path):
    """Read at random, repeatedly, as a mixture of streams, one of them pickled."""
    stream = TokenStream.open(write_prepared(tmp_path, 1), "train")
    tokens, limits = flat(make_documents()), resource.getrlimit(resource.RLIMIT_NOFILE)
    assert len(stream.paths) > 300
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 150, limits[1]))
    try:
        streams = [TokenStream.open(tmp_path, "train"), pickle.loads(pickle.dumps(stream))]
        for start in np.random.default_rng(0).integers(0, len(tokens) - 3, 500).tolist():
            assert all(stream.read(start, 3).tolist() == tokens[start : start + 3] for stream in streams)
        assert all(stream.read(0, len(tokens)).tolist() == tokens for stream in streams)
        assert streams[0].counts(100).sum() == len(tokens)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_another_trainers_folder_has_nothing_to_verify(tmp_path):
    np.zeros(99, np.uint16).tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match="holds nanoGPT's tokens, which have no manifest.json"):
        Manifest.read(tmp_path)


def test_a_manifest_without_the_hashes_of_all_tokenizer_files_is_read(tmp_path):
    manifest = Manifest.read(write_prepared(tmp_path))
    assert "tokenizer_files" not in manifest.to_dict()
    manifest.verify(tmp_path)
