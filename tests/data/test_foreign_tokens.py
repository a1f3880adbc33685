"""Folders written byte for byte as nanoGPT, build-nanogpt, llm.c and datatrove do, read back window by window."""

import os
import shutil
import struct

import numpy as np
import pytest

from gpt2repro.data.foreign_tokens import HELD_OUT_TOKENS, read_foreign_tokens
from gpt2repro.data.manifest import Manifest, TokenizerRecord
from gpt2repro.data.order import count_windows
from gpt2repro.data.token_stream import TokenStream
from gpt2repro.errors import UserError


T = 16
TOKENS = np.random.default_rng(0).integers(0, 50_257, 30_000)
TOKENS[[0, -1]] = 0, 50_256
TRAIN, VAL = TOKENS[:24_000], TOKENS[24_000:]
LENGTHS = [9_000, 9_000, 6_000]  # tokens of each training file


def train_parts():
    return np.split(TRAIN, np.cumsum(LENGTHS)[:-1])


def write_nanogpt(folder):
    """data/openwebtext/prepare.py: a memmap of uint16 for each split."""
    for split, tokens in (("train", TRAIN), ("val", VAL)):
        array = np.memmap(folder / f"{split}.bin", dtype=np.uint16, mode="w+", shape=(len(tokens),))
        array[:] = tokens
        array.flush()


def write_build_nanogpt(folder):
    """fineweb.py: np.save of uint16, shard 0 is validation."""
    for index, tokens in enumerate([VAL, *train_parts()]):
        split = "val" if index == 0 else "train"
        np.save(folder / f"edufineweb_{split}_{index:06d}", tokens.astype(np.uint16))


def write_llm_c_file(path, tokens, magic=20240520, version=1, dtype=np.uint16):
    """write_datafile of dev/data/data_common.py."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + np.array(tokens, dtype=dtype).tobytes())


def write_llm_c(folder):
    """dev/data/fineweb.py: shard 0 is validation."""
    for index, tokens in enumerate([VAL, *train_parts()]):
        split = "val" if index == 0 else "train"
        write_llm_c_file(folder / f"fineweb_{split}_{index:06d}.bin", tokens)


def write_llm_c_whole(folder):
    """dev/data/tinyshakespeare.py: one file for each split."""
    write_llm_c_file(folder / "tiny_shakespeare_train.bin", TRAIN)
    write_llm_c_file(folder / "tiny_shakespeare_val.bin", VAL)


def write_datatrove(folder, tokenizer="gpt2|2"):
    """TokenizedFile of pipeline/tokens/tokenizer.py: documents that end in <|endoftext|>, one file for each task."""
    for rank, tokens in enumerate(np.split(TOKENS, [10_000, 29_900])):
        path = folder / f"{rank:05d}_unshuffled.ds"
        ends = [*range(1000, len(tokens), 1000), len(tokens)]
        path.write_bytes(struct.pack(f"<{len(tokens)}H", *tokens.tolist()))
        path.with_name(path.name + ".index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
        metadata = "\n".join([tokenizer, str(len(tokens)), f"{len(tokens) / 1000:.1f} kT"])
        path.with_name(path.name + ".metadata").write_text(metadata)
    (folder / "00003_unshuffled.ds").touch()  # a task without documents


WRITERS = {
    "nanoGPT": write_nanogpt,
    "build-nanogpt": write_build_nanogpt,
    "llm.c": write_llm_c,
    "llm.c, one file": write_llm_c_whole,
    "datatrove": write_datatrove,
}


@pytest.fixture(params=WRITERS)
def written(request, tmp_path):
    """The format's name and a folder of it."""
    WRITERS[request.param](tmp_path)
    return request.param.partition(",")[0], tmp_path


def refused(folder):
    with pytest.raises(UserError) as caught:
        Manifest.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- reading ----


def test_every_window_holds_the_tokens_that_were_written(written):
    name, folder = written
    splits = {"train": TRAIN, "val": VAL}
    if name == "datatrove":
        splits = {"train": TOKENS[:-300], "val": TOKENS[-300:]}  # the last hundredth is held out; it spans two files
    for split, tokens in splits.items():
        stream = TokenStream.open(folder, split)
        assert len(stream) == len(tokens)
        for window in range(count_windows(len(tokens), T)):
            assert stream.read(window * T, T + 1).tolist() == tokens[window * T : window * T + T + 1].tolist()
        assert stream.read(0, len(tokens)).tolist() == tokens.tolist()
        assert stream.counts(50_257).tolist() == np.bincount(tokens, minlength=50_257).tolist()


def test_the_record_is_like_a_manifest(written):
    name, folder = written
    manifest = Manifest.open(folder)
    assert manifest.corpus["name"] == f"{folder.name} ({name}'s tokens)"
    assert manifest.tokenizer == TokenizerRecord(name="gpt2", vocab_size=50257, eot_id=50256, sha256=None)
    assert sum(split.tokens for split in manifest.splits.values()) == len(TOKENS)
    for split in manifest.splits.values():
        assert split.tokens == sum(shard.tokens for shard in split.shards)
        assert split.bytes is split.documents is None


def test_datatrove_holds_out_at_most_ten_million_tokens(tmp_path):
    """Sparse files, which take no disk space."""
    for rank in range(2):
        path = tmp_path / f"{rank:03d}_merged.ds"
        path.touch()
        os.truncate(path, 2 * 600_000_000)
        path.with_name(path.name + ".metadata").write_text("openai-community/gpt2|2\n600000000\n600 MT")
    splits = Manifest.open(tmp_path).splits
    assert (splits["train"].tokens, splits["val"].tokens) == (1_190_000_000, HELD_OUT_TOKENS)
    (shard,) = splits["val"].shards
    assert shard.file == "001_merged.ds" and shard.offset == 2 * 590_000_000


def test_old_datatrove_metadata_without_a_token_size(tmp_path):
    write_datatrove(tmp_path, tokenizer="gpt2")
    assert Manifest.open(tmp_path).splits["train"].tokens == 29_700


def test_a_manifest_takes_precedence(tmp_path):
    write_nanogpt(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format_version": 0}')
    assert "format version 0" in refused(tmp_path)


# ---- fingerprints ----


def test_the_fingerprint_survives_a_move_of_the_folder(written, tmp_path_factory):
    _, folder = written
    moved = tmp_path_factory.mktemp("moved") / "elsewhere"
    shutil.copytree(folder, moved)
    assert Manifest.open(moved).fingerprint == Manifest.open(folder).fingerprint


def flip_bit(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: flip_bit(path, 0),
        lambda path: flip_bit(path, 4095),
        lambda path: flip_bit(path, -4096),
        lambda path: flip_bit(path, -2),
        lambda path: path.write_bytes(path.read_bytes() + b"\0\0"),
    ],
    ids=["first byte", "byte 4095", "last but 4095", "last token", "one more token"],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_the_fingerprint_covers_the_size_and_both_ends_of_each_file(tmp_path, change, split):
    write_nanogpt(tmp_path)
    before = Manifest.open(tmp_path).fingerprint
    change(tmp_path / f"{split}.bin")
    assert Manifest.open(tmp_path).fingerprint != before


# ---- damage ----


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_split_is_named(written, split):
    name, folder = written
    if name == "datatrove":
        pytest.skip("it has one split")
    for path in list(folder.glob(f"*{split}*")):
        path.unlink()
    assert f"holds {name}'s tokens, but none for the split {split}" in refused(folder)


def test_empty_files_are_no_split(tmp_path):
    write_nanogpt(tmp_path)
    (tmp_path / "val.bin").write_bytes(b"")
    assert "none for the split val" in refused(tmp_path)


def test_a_character_vocabulary_is_refused_without_unpickling_it(tmp_path):
    write_nanogpt(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "executed").encode() + b"'\ntR.")
    message = refused(tmp_path)
    assert "meta.pkl holds the vocabulary" in message
    assert "`python prepare_data.py files --source TEXT --tokenizer char --output_dir DIR`" in message
    assert not (tmp_path / "executed").exists()


def cut(path, count):
    path.write_bytes(path.read_bytes()[:-count])


def set_header(index, value):
    def damage(path):
        data = bytearray(path.read_bytes())
        struct.pack_into("<i", data, 4 * index, value)
        path.write_bytes(data)

    return damage


NPY, BIN, DS = "edufineweb_train_000001.npy", "fineweb_train_000001.bin", "00000_unshuffled.ds"
DAMAGES = {
    "nanoGPT, odd": ("nanoGPT", "train.bin", lambda path: cut(path, 1), "47,999 bytes, an odd number"),
    "npy, truncated": ("build-nanogpt", NPY, lambda path: cut(path, 2), "is truncated or not an .npy file"),
    "npy, empty": ("build-nanogpt", NPY, lambda path: path.write_bytes(b""), "is truncated or not an .npy file"),
    "npy, not one": (
        "build-nanogpt",
        NPY,
        lambda path: path.write_bytes(b"PK\3\4" * 99),
        "is truncated or not an .npy file",
    ),
    "npy, int64": ("build-nanogpt", NPY, lambda path: np.save(path, TRAIN), "holds int64 in 1 dimensions, not uint16"),
    "npy, 2-D": (
        "build-nanogpt",
        NPY,
        lambda path: np.save(path, TRAIN.reshape(2, -1).astype(np.uint16)),
        "holds uint16 in 2 dimensions",
    ),
    "nanoGPT, a pipe": (
        "nanoGPT",
        "train.bin",
        lambda path: (path.unlink(), os.mkfifo(path)),
        "is neither a file nor a folder; remove it",
    ),
    "llm.c, magic": ("llm.c", BIN, set_header(0, 20240326), "begins with magic 20240326, version 1"),
    "llm.c, version": ("llm.c", BIN, set_header(1, 2), "begins with magic 20240520, version 2"),
    "llm.c, Llama 3": (
        "llm.c",
        BIN,
        lambda path: write_llm_c_file(path, TRAIN + 50_000, 20240801, 7, np.uint32),
        "begins with magic 20240801, version 7; GPT-2's tokens with 20240520, 1, Llama 3's",
    ),
    "llm.c, count": ("llm.c", BIN, set_header(2, 9001), "by its header of 9,001 tokens it should have 19,026"),
    "llm.c, truncated": ("llm.c", BIN, lambda path: cut(path, 1), "has 19,023 bytes, by its header"),
    "llm.c, header only": ("llm.c", BIN, lambda path: path.write_bytes(b"\0" * 1023), "header alone has 1,024"),
    "datatrove, truncated": ("datatrove", DS, lambda path: cut(path, 1), "19,999 bytes, .* says 10,000 tokens"),
    "datatrove, unfinished": (
        "datatrove",
        DS + ".metadata",
        lambda path: path.unlink(),
        "is missing or damaged, so 00000_unshuffled.ds may be unfinished",
    ),
    "datatrove, no count": (
        "datatrove",
        DS + ".metadata",
        lambda path: path.write_text("gpt2|2\nmany"),
        "is missing or damaged",
    ),
    "datatrove, other tokenizer": (
        "datatrove",
        DS + ".metadata",
        lambda path: path.write_text("HuggingFaceTB/cosmo2-tokenizer|2\n10000\n10 kT"),
        "holds tokens of HuggingFaceTB/cosmo2-tokenizer, not GPT-2's",
    ),
    "datatrove, uint32": (
        "datatrove",
        DS + ".metadata",
        lambda path: path.write_text("gpt2|4\n5000\n5 kT"),
        "holds tokens of gpt2, not GPT-2's",
    ),
}


@pytest.mark.parametrize("format, file, damage, complaint", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_one_line_with_the_file(tmp_path, format, file, damage, complaint):
    WRITERS[format](tmp_path)
    damage(tmp_path / file)
    message = refused(tmp_path)
    assert str(tmp_path / file.removesuffix(".metadata")) in message
    with pytest.raises(UserError, match=complaint):
        TokenStream.open(tmp_path, "train")


@pytest.mark.parametrize("split, place", [("train", 0), ("train", 2047), ("train", -1), ("train", -2048), ("val", 5)])
def test_an_id_beyond_gpt2_near_the_ends_of_a_file_is_found_when_it_is_opened(tmp_path, split, place):
    write_nanogpt(tmp_path)
    np.memmap(tmp_path / f"{split}.bin", np.uint16, "r+")[place] = 50_257
    assert f"{split}.bin holds token 50257, GPT-2's largest is 50256" in refused(tmp_path)


def test_an_id_beyond_gpt2_elsewhere_is_found_when_it_is_read(written):
    name, folder = written
    path = sorted([*folder.glob("*train*"), *folder.glob("*.ds")])[0]
    data = path.read_bytes()
    middle = len(data) // 4 * 2
    path.write_bytes(data[:middle] + struct.pack("<2H", 50_300, 60_000) + data[middle + 4 :])
    stream = TokenStream.open(folder, "train")
    bad = (middle - (0 if path.suffix == ".ds" or name == "nanoGPT" else 1024 if name == "llm.c" else 128)) // 2
    stream.read(bad - T, T)
    with pytest.raises(UserError, match=f"{path.name} holds token 60000, but its tokenizer has the ids 0 to 50256"):
        stream.read(bad - 3, T)
    assert stream.counts(50_257).sum() == len(stream) - 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_read_permission_is_one_line(tmp_path):
    write_nanogpt(tmp_path)
    (tmp_path / "train.bin").chmod(0)
    assert "cannot be read" in refused(tmp_path)


def test_any_other_folder_is_not_foreign_tokens(tmp_path):
    np.save(tmp_path / "train_00000.npy", TRAIN.astype(np.uint16))  # ours, without its manifest
    assert read_foreign_tokens(tmp_path) is None
    assert "has no manifest.json" in refused(tmp_path)
