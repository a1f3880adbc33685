"""Data preparation as users run it, compared with its input: nothing is lost, changed or counted twice."""

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support import ROOT, prepare, refusal, write_jsonl

import prepare_data
from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.errors import UserError
from gpt2repro.prepare import built_in, corpora, parts, readers, retries, workers
from gpt2repro.prepare.prepared import OutputDirectory, check_space


EOT = 50_256


@pytest.fixture(scope="module")
def source(texts, tmp_path_factory):
    """A folder of the documents, in order, in three formats."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(json.dumps({"text": t}) for t in texts[:100]).encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[100:249]}), folder / "b.parquet")
    (folder / "c.txt").write_bytes(texts[249].encode())
    return folder


def load(directory, split):
    """Manifest and tokens of a split."""
    manifest = json.loads((directory / "manifest.json").read_text())
    shards = manifest["splits"][split]["shards"]
    return manifest, np.concatenate([np.load(directory / shard["file"], mmap_mode="r") for shard in shards])


def decode(directory, split, encoding):
    """The documents of a split."""
    tokens = load(directory, split)[1]
    starts = np.flatnonzero(tokens == EOT)
    assert starts[0] == 0
    return [encoding.decode(document[1:].tolist()) for document in np.split(tokens, starts[1:])]


def contents(directory):
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {path.relative_to(directory).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# ---- end to end ----


def test_many_documents_are_split_by_hash(run_script, source, texts, encoding, tmp_path):
    process = run_script(
        *("prepare_data.py", "files", "--source", source, "--output_dir", tmp_path / "out"),
        *("--val_fraction", 0.2, "--shard_tokens", 1000),
    )
    assert process.returncode == 0, process.stderr
    train, val = (decode(tmp_path / "out", split, encoding) for split in ("train", "val"))
    numbers = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) for text in texts]
    assert val == [text for text, number in zip(texts, numbers) if number / 2**64 < 0.2]  # in their order
    assert train == [text for text, number in zip(texts, numbers) if number / 2**64 >= 0.2]
    assert not set(train) & set(val)
    assert abs(len(val) - 50) < 4 * (250 * 0.2 * 0.8) ** 0.5  # four standard deviations

    manifest, tokens = load(tmp_path / "out", "train")
    assert tokens.dtype == np.uint16
    assert manifest["corpus"]["name"] == "files"
    assert [file["name"] for file in manifest["corpus"]["files"]] == ["a.jsonl.gz", "b.parquet", "c.txt"]
    assert manifest["tokenizer"] | {"sha256": ""} == {"name": "gpt2", "vocab_size": 50257, "eot_id": EOT, "sha256": ""}
    assert manifest["split"] == {"val_fraction": 0.2}
    for name, documents in (("train", train), ("val", val)):
        split = manifest["splits"][name]
        assert split["documents"] == len(documents)
        assert split["bytes"] == len("".join(documents).encode())
        assert split["tokens"] == len(documents) + sum(map(len, encoding.encode_ordinary_batch(documents)))
        assert {shard["tokens"] for shard in split["shards"][:-1]} == {1000}
        assert f"{name} {split['tokens']:,} tokens, {len(documents):,} documents" in process.stdout
    files = {shard["file"] for split in manifest["splits"].values() for shard in split["shards"]}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files | {"manifest.json", "tokenizer"}


@pytest.mark.slow
@pytest.mark.parametrize("val_tokens", [1, 1000, 1001])
def test_the_first_documents_are_validation(source, texts, encoding, tmp_path, val_tokens):
    prepare("files", "--source", source, "--output_dir", tmp_path / "out", "--val_tokens", val_tokens)
    train, val = (decode(tmp_path / "out", split, encoding) for split in ("train", "val"))
    assert val + train == texts
    lengths = [1 + len(encoding.encode_ordinary(text)) for text in val]
    assert sum(lengths[:-1]) < val_tokens <= sum(lengths)


@pytest.mark.parametrize("fraction", [0.1, 0.25])
def test_one_text_is_split_by_position(topics, encoding, tmp_path, fraction):
    text = "".join(topics[:3])
    (tmp_path / "one.txt").write_text(text)
    prepare("files", "--source", tmp_path / "one.txt", "--output_dir", tmp_path / "out", "--val_fraction", fraction)
    (train,), (val,) = (decode(tmp_path / "out", split, encoding) for split in ("train", "val"))
    assert train + val == text
    assert len(val) == pytest.approx(fraction * len(text), abs=1)


@pytest.mark.slow
def test_a_document_keeps_its_split_when_the_corpus_grows(texts, encoding, tmp_path):
    """Exact copies stay together, too."""
    splits = []
    for number, documents in enumerate((texts[:120], texts + texts[:60])):
        write_jsonl(tmp_path / f"{number}.jsonl", documents)
        output_dir = tmp_path / str(number)
        prepare("files", "--source", f"{output_dir}.jsonl", "--output_dir", output_dir, "--val_fraction", 0.3)
        splits.append({split: set(decode(output_dir, split, encoding)) for split in ("train", "val")})
    small, large = splits
    assert small["val"] <= large["val"] and small["train"] <= large["train"]
    assert not large["val"] & large["train"]


@pytest.mark.slow
def test_python_docs(python_docs, tmp_path, monkeypatch):
    """The demo's corpus, with its own tokenizer; `--verify` accepts it."""
    monkeypatch.setattr(built_in, "python_docs", lambda: iter(python_docs))  # collecting them again takes seconds
    prepare("python-docs", "--output_dir", tmp_path / "out")
    manifest, tokens = load(tmp_path / "out", "train")
    assert manifest["tokenizer"]["name"] == "bpe:2048" and manifest["tokenizer"]["eot_id"] == 2047
    assert tokens.max() == 2047 and tokens[0] == 2047
    splits = manifest["splits"]
    assert splits["train"]["documents"] == (tokens == 2047).sum()
    assert splits["train"]["documents"] + splits["val"]["documents"] == len(python_docs)
    assert splits["train"]["bytes"] + splits["val"]["bytes"] == len("".join(python_docs).encode())
    assert 0.05 < splits["val"]["documents"] / len(python_docs) < 0.15  # 0.1, give or take four standard deviations
    prepare("--verify", tmp_path / "out")


# ---- nanoGPT's and char-rnn's text ----


def test_shakespeare_char_equals_nanogpts(shared, tmp_path):
    """Sizes and ids as in nanoGPT's data/shakespeare_char/prepare.py."""
    source = shared / "tinyshakespeare.txt"
    prepare("shakespeare-char", "--output_dir", tmp_path / "out", "--source", source)
    data = source.read_text()
    numbers = {character: i for i, character in enumerate(sorted(set(data)))}
    ids = np.array([numbers[character] for character in data], dtype=np.uint16)
    manifest, train = load(tmp_path / "out", "train")
    _, val = load(tmp_path / "out", "val")
    assert manifest["tokenizer"]["vocab_size"] == 65 and manifest["tokenizer"]["eot_id"] is None
    assert (len(train), len(val)) == (1_003_854, 111_540)
    assert np.array_equal(train, ids[: int(len(data) * 0.9)]) and np.array_equal(val, ids[int(len(data) * 0.9) :])


def test_shakespeare_bpe_equals_nanogpts(shared, tmp_path, encoding):
    """301,966 and 36,059 tokens, as in the readme of nanoGPT's data/shakespeare, plus one end-of-text each."""
    source = shared / "tinyshakespeare.txt"
    prepare("shakespeare", "--output_dir", tmp_path / "out", "--source", source)
    data = source.read_text()
    cut = int(len(data) * 0.9)
    for split, text, count in (("train", data[:cut], 301_966), ("val", data[cut:], 36_059)):
        _, tokens = load(tmp_path / "out", split)
        assert len(tokens) == count + 1
        assert tokens.tolist() == [EOT, *encoding.encode_ordinary(text)]


# ---- unfinished and finished directories; tests/prepare/test_parts.py interrupts them ----


@pytest.fixture(scope="module")
def command(source):
    return ["files", "--source", source, "--tokenizer", "bpe:400", "--shard_tokens", 500, "--val_fraction", 0.1]


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    prepare(*command, "--output_dir", directory)
    return directory


def test_a_finished_preparation_is_not_repeated(command, uninterrupted, capsys):
    before = contents(uninterrupted)
    prepare(*command, "--output_dir", uninterrupted, "--num_workers", 2)
    assert capsys.readouterr().out.startswith("already prepared: ")
    assert contents(uninterrupted) == before


def test_a_path_may_begin_at_the_home_directory(tmp_path, monkeypatch):
    """The shell leaves --flag=~/x as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    dataset(tmp_path / "source", ["one", "two", "three"])
    prepare("files", "--source=~/source", "--output_dir=~/out", "--tokenizer", "char", "--val_tokens", 1)
    prepare("--verify=~/out")
    prepare("--describe=~/out")
    prepare("~/source", "--output_dir=~/other", "--tokenizer=~/out", "--val_tokens", 1)
    assert {path.name for path in tmp_path.iterdir()} - {".cache"} == {"source", "out", "other"}


# ---- nothing is overwritten ----


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "change", [["--tokenizer", "gpt2"], ["--shard_tokens", "501"], ["--val_fraction", "0.2"], ["--source", "."]]
)
def test_other_settings_are_refused(command, uninterrupted, tmp_path, change, finished):
    for path in uninterrupted.rglob("*.*"):
        (tmp_path / path.relative_to(uninterrupted)).parent.mkdir(exist_ok=True)
        (tmp_path / path.relative_to(uninterrupted)).write_bytes(path.read_bytes())
    if not finished:
        manifest = tmp_path / "manifest.json"
        (tmp_path / "preparing.json").write_text(json.dumps(json.loads(manifest.read_text())["settings"]))
        manifest.unlink()
        (tmp_path / "parts").mkdir()
        (tmp_path / "parts" / "part_00000.json").write_text("{}")
    before = contents(tmp_path)
    line = refusal(*command, *change, "--output_dir", tmp_path)
    assert f"other settings ({change[0][2:]})" in line and "choose another --output_dir" in line
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "wrong, words",
    [(["--tokenizer", "bpe:9999999"], "use --tokenizer bpe:"), (["--val_tokens", 10**9], "the train split got no")],
)
def test_a_mistake_that_wrote_no_data_can_be_corrected_in_the_same_directory(source, tmp_path, wrong, words):
    command = ["files", "--source", source, "--tokenizer", "bpe:400", "--output_dir", tmp_path / "out"]
    assert words in refusal(*command, *wrong)
    prepare(*command, "--shard_tokens", 500)
    prepare("--verify", tmp_path / "out")


@pytest.mark.parametrize("name", ["notes.txt", "train_00000.npy", "manifest.json", "tokenizer/tokenizer.json"])
def test_a_foreign_directory_is_refused(command, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"name": "a browser extension", "version": 1}')
    before = contents(tmp_path)
    assert "--output_dir" in refusal(*command, "--output_dir", tmp_path)
    assert contents(tmp_path) == before


def test_a_file_is_no_output_directory(command, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "--output_dir" in refusal(*command, "--output_dir", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# ---- mistakes ----


def test_all_bad_flags_are_reported_at_once(run_script, tmp_path):
    process = run_script(
        *("prepare_data.py", "files", "--output_dir", tmp_path / "out", "--shard_tokens", 0, "--num_workers", -1),
        *("--val_tokens", 0, "--val_fraction", 1.5, "--source", tmp_path / "none", "--tokenizer", "bpe:1"),
        *("--dedup", "url,foo"),
    )
    assert process.returncode == 2
    assert process.stderr.splitlines() == [
        f"error: --source {tmp_path / 'none'} does not exist; choose another",
        "error: --shard_tokens 0 must be at least 1",
        "error: --num_workers -1 must be at least 1",
        "error: --val_tokens 0 must be at least 1",
        "error: --val_tokens and --val_fraction exclude each other; give one",
        "error: --val_fraction 1.5 must lie between 0 and 1",
        "error: --tokenizer bpe:1: bpe:N needs a number of token ids N above 256, one for each byte, and up to 2^31",
        "error: --dedup url,foo: use url, minhash, or url,minhash",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("args", [[], ["files"], ["--output_dir", "x"]])
def test_corpus_and_output_directory_are_needed(args):
    assert refusal(*args) == "give a CORPUS and --output_dir DIR, or --verify DIR, or --describe DIR"


@pytest.mark.parametrize(
    "args, use",
    [
        (["x/y", "--source", "."], "--source . is only used for the corpora `files`"),
        (["python-docs", "--source", "."], "--source . is only used for the corpora `files`"),
        (["files", "--hub_config", "x"], "--hub_config x is only used for a dataset"),
        (["files", "--split", "test"], "--split test is only used for a dataset"),
        (["shakespeare", "--revision", "y"], "--revision y is only used for a dataset"),
        (["x/y", "--dedup", "minhash", "--url_column", "link"], "--url_column link is only used with --dedup url"),
        (["x/y", "--dedup", "url", "--slurm_partition", "z"], "--slurm_partition z is only used with --executor slurm"),
        (["x/y", "--dedup", "url", "--slurm_time", "1:0"], "--slurm_time 1:0 is only used with --executor slurm"),
        (["x/y", "--verify", "z"], "CORPUS, --verify and --describe exclude each other"),
    ],
)
def test_a_flag_that_would_be_ignored_is_refused(tmp_path, args, use):
    (line,) = refusal(*args, "--output_dir", tmp_path / "out").splitlines()
    assert line.startswith(use)
    assert not (tmp_path / "out").exists()


def test_two_directories_are_not_checked_at_once():
    assert "exclude each other; give one" in refusal("--verify", "x", "--describe", "y")


@pytest.mark.parametrize("fraction", ["0", "1", "-0.1", "nan"])
def test_fractions_lie_between_0_and_1(fraction):
    assert "must lie between 0 and 1" in refusal("files", "--output_dir", "x", "--val_fraction", fraction)


def test_an_unknown_flag_is_not_guessed():
    assert "--val_frac" in refusal("files", "--output_dir", "x", "--val_frac", "0.1")


@pytest.mark.parametrize("inside", ["out", "deep/er/out"])
def test_the_output_must_not_become_its_own_source(tmp_path, inside):
    """A resumed preparation would read its own files as documents."""
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"document {number}")
    before = contents(tmp_path)
    line = refusal("files", "--source", tmp_path, "--output_dir", tmp_path / inside, "--tokenizer", "char")
    assert "--output_dir" in line and "inside --source" in line
    assert contents(tmp_path) == before


def test_a_source_that_links_to_itself(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert "loop does not exist" in refusal("files", "--source", tmp_path / "loop", "--output_dir", tmp_path / "out")


def test_one_text_has_no_first_documents(tmp_path):
    (tmp_path / "one.txt").write_text("one text")
    line = refusal("files", "--source", tmp_path / "one.txt", "--output_dir", tmp_path / "out", "--val_tokens", 3)
    assert "use --val_fraction" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split, option", [("train", ["--val_tokens", 10**9]), ("val", ["--val_fraction", 1e-9])])
def test_a_split_without_documents(source, tmp_path, split, option):
    line = refusal("files", "--source", source, "--output_dir", tmp_path / "out", "--tokenizer", "char", *option)
    assert f"the {split} split got no document with {option[0]} {option[1]}; use --val_" in line
    assert not (tmp_path / "out" / "manifest.json").exists()
    remedy = line.split("; use ")[1].split()
    prepare("files", "--source", source, "--output_dir", tmp_path / "out", "--tokenizer", "char", *remedy)


@pytest.mark.slow
@pytest.mark.parametrize("documents", [2, 3, 20])
def test_the_default_fraction_suits_a_small_folder(tmp_path, capsys, documents):
    for number in range(documents):
        (tmp_path / f"{number:03}.txt").write_text(f"the text number {number}")
    prepare("files", "--source", tmp_path, "--output_dir", tmp_path.parent / f"out{documents}")
    manifest = json.loads((tmp_path.parent / f"out{documents}" / "manifest.json").read_text())
    assert manifest["splits"]["val"]["documents"] == max(1, documents // 10)
    fraction = manifest["split"]["val_fraction"]
    assert f"validation: --val_fraction {fraction}, as the default 0.005 takes no" in capsys.readouterr().out
    again = tmp_path.parent / f"again{documents}"
    prepare("files", "--source", tmp_path, "--output_dir", again, "--val_fraction", fraction)
    assert json.loads((again / "manifest.json").read_text())["splits"] == manifest["splits"]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [["--max_documents", 8], ["--max_tokens", 50]])
def test_limits_of_a_small_folder(tmp_path, limit):
    for number in range(30):
        (tmp_path / f"{number:03}.txt").write_text(f"the text number {number}")
    command = ["files", "--source", tmp_path, "--output_dir", tmp_path.parent / f"{limit[0]}", *limit]
    with contextlib.suppress(UserError):
        prepare(*command)
        return
    prepare(*command, *refusal(*command).split("; use ")[1].split())


def test_special_tokens_are_recorded_and_said(tmp_path, capsys):
    tokenizer = build_tokenizer("bpe:266", ["hello world"]).fast
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.save_pretrained(tmp_path / "chat")
    rows = [{"text": f"<|user|>hello {number} <|endoftext|>"} for number in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["files", "--source", tmp_path / "a.jsonl", "--tokenizer", tmp_path / "chat", "--val_fraction", 0.3]
    for choice, per_document in (("keep", 1), ("text", 0)):
        prepare(*command, "--output_dir", tmp_path / choice, "--special_tokens", choice)
        said = "special tokens written in a document: one id each for <|user|>; ordinary text for <|endoftext|>"
        assert (said in capsys.readouterr().out) == (choice == "keep")
        manifest, tokens = load(tmp_path / choice, "train")
        documents = manifest["splits"]["train"]["documents"]
        marker, end_of_text = tokenizer.convert_tokens_to_ids(["<|user|>", "<|endoftext|>"])
        assert (tokens == marker).sum() == documents * per_document and (tokens == end_of_text).sum() == documents
        assert ("<|user|>" in manifest["special_tokens"][choice]) and manifest["settings"]["special_tokens"] == choice
    line = refusal(*command, "--output_dir", tmp_path / "keep", "--special_tokens", "text")
    assert "other settings (special_tokens)" in line


def test_a_tokenizer_without_end_of_text_is_said(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "hello {number}"}}\n' for number in range(9)))
    command = ["files", "--source", tmp_path / "a.jsonl", "--val_fraction", 0.3]
    prepare(*command, "--tokenizer", "char", "--output_dir", tmp_path / "char")
    assert "no end-of-text token, so nothing separates documents" in capsys.readouterr().out
    prepare(*command, "--tokenizer", tmp_path / "char", "--output_dir", tmp_path / "again")
    prepare(*command, "--tokenizer", "gpt2", "--output_dir", tmp_path / "gpt2")
    assert capsys.readouterr().out.count("end-of-text") == 1


@pytest.mark.parametrize(
    "lengths, option, said",
    [
        ([999, 9], ["--val_tokens", 9], "note: validation has 1,000 tokens with --val_tokens 9,"),
        ([9] * 9, ["--val_tokens", 19], None),
        ([9, 9, 999], ["--val_fraction", 0.7], "note: validation has 2.0% of the tokens with --val_fraction 0.7,"),
        ([9, 9, 9], ["--val_fraction", 0.7], None),
    ],
)
def test_a_split_that_differs_from_what_was_asked_for_is_said(tmp_path, monkeypatch, capsys, lengths, option, said):
    monkeypatch.setattr(parts, "takes_document", lambda fraction, text: not text.startswith("2"))
    write_jsonl(tmp_path / "a.jsonl", [f"{number}" * length for number, length in enumerate(lengths)])
    build_tokenizer("bpe:257", [""]).fast.save_pretrained(tmp_path / "tokenizer")
    command = ["files", "--source", tmp_path / "a.jsonl", "--tokenizer", tmp_path / "tokenizer"]
    prepare(*command, "--output_dir", tmp_path / "out", *option)
    printed = capsys.readouterr().out
    assert said in printed if said else "note: validation" not in printed


@pytest.mark.parametrize(
    "files, separator, notes",
    [
        ({"a.txt": "1##2", "b.txt": "3"}, "##", []),
        ({"a.txt": "1##2", "b.txt": "3"}, "#*#", ["'#*#' separates nothing: no file has two documents"]),
        ({"a.txt": "1##2", "b.csv": "text\nthree\n"}, "##", ["leaves 1 tables as they are: a row is a document"]),
    ],
)
def test_what_a_separator_does_not_separate_is_said(tmp_path, capsys, files, separator, notes):
    (tmp_path / "src").mkdir()
    for name, text in files.items():
        (tmp_path / "src" / name).write_text(text)
    command = ["files", "--source", tmp_path / "src", "--output_dir", tmp_path / "out", "--tokenizer", "char"]
    prepare(*command, "--val_tokens", 1, f"--document_separator={separator}")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: --document_separator ")]
    assert [line.endswith(note) for line, note in zip(said, notes, strict=True)] == [True] * len(notes)


def test_a_separator_for_tables_alone_is_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["1##2", "3"])
    command = ["files", "--source", tmp_path, "--output_dir", tmp_path.parent / "out", "--document_separator", "##"]
    assert "holds none: a row of a table is a document; leave it out" in refusal(*command)


@pytest.mark.parametrize(
    "names, said",
    [
        (["train.jsonl", "test.jsonl"], "note: test.jsonl of another split become part of the corpus"),
        (["data/train-0.jsonl", "dev_0.jsonl", "val/0.jsonl"], "note: dev_0.jsonl, val/0.jsonl of another"),
        (["train/0.jsonl", "test/0.jsonl", "dataset_dict.json"], "to leave them out, use --source "),
        (["test.jsonl", "contest.jsonl"], None),
        (["train.jsonl", "latest.jsonl"], None),
    ],
)
def test_files_of_another_split_are_named(tmp_path, capsys, names, said):
    for name in names:
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / "src" / name, ["one", "two"])
    command = ["files", "--source", tmp_path / "src", "--output_dir", tmp_path / "out", "--tokenizer", "char"]
    prepare(*command, "--val_tokens", 1)
    printed = capsys.readouterr().out
    assert said in printed if said else "another split" not in printed


def test_one_document_cannot_be_split(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("the same")
    line = refusal("files", "--source", tmp_path, "--output_dir", tmp_path.parent / "out")
    assert line.endswith("two different documents are needed: add some, or split texts with --document_separator")


def test_rows_without_text_explain_an_empty_split(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": None}] * 3)
    line = refusal("files", "--source", tmp_path / "a.jsonl", "--output_dir", tmp_path / "out")
    assert "got no document with --val_fraction 0.005, and 3 rows skipped (no text or not JSON); " in line


def test_verify_needs_a_prepared_directory(tmp_path):
    assert "is empty; fill it with `python prepare_data.py CORPUS" in refusal("--verify", tmp_path)
    (tmp_path / "train_00000.npy").write_bytes(b"")
    assert "no manifest.json, as if not all of it was copied; copy that file too" in refusal("--verify", tmp_path)
    (tmp_path / "preparing.json").write_text("{}")
    assert "unfinished" in refusal("--verify", tmp_path)
    assert "does not exist" in refusal("--verify", tmp_path / "missing")


def test_verify_finds_damage(command, tmp_path):
    prepare(*command, "--output_dir", tmp_path)
    with (tmp_path / "train_00001.npy").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\xff")
    assert "train_00001.npy is damaged" in refusal("--verify", tmp_path)


# ---- damaged directories, changing corpora ----


@pytest.mark.parametrize("damage", ["missing", "cut", "a folder"])
def test_a_damaged_directory_does_not_count_as_prepared(command, tmp_path, damage):
    prepare(*command, "--output_dir", tmp_path)
    path = tmp_path / "train_00001.npy"
    data = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "a folder":
        path.mkdir()
    (line,) = refusal(*command, "--output_dir", tmp_path).splitlines()
    assert "train_00001.npy is missing or has another size" in line and f"delete {tmp_path} and repeat" in line
    for flag in ("--verify", "--describe"):
        assert "train_00001.npy" in refusal(flag, tmp_path)


def test_a_missing_tokenizer_does_not_count_as_prepared(command, tmp_path):
    prepare(*command, "--output_dir", tmp_path)
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    (line,) = refusal(*command, "--output_dir", tmp_path).splitlines()
    assert "tokenizer.json is missing; prepare the data again" in line


@pytest.mark.parametrize("content", ["[]", "null", "{", '{"format_version": 1}', '{"format_version": 1, "splits": []}'])
def test_a_damaged_manifest_is_one_line(command, tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    for args in (["--verify", tmp_path], ["--describe", tmp_path], [*command, "--output_dir", tmp_path]):
        (line,) = refusal(*args).splitlines()
        assert str(tmp_path) in line


@pytest.mark.parametrize("name", ["manifest.json", "train_00000.npy", "tokenizer.json", "a.jsonl", "preparing.json"])
def test_what_may_not_be_read_is_not_damaged(tmp_path, monkeypatch, name):
    """Root may read everything, so that opening is replaced."""
    source, out = write_jsonl(tmp_path / "a.jsonl", ["one", "two"]), tmp_path / "out"
    command = ["files", "--source", source, "--output_dir", out, "--tokenizer", "char", "--val_tokens", 1]
    prepare(*command)
    calls = {"manifest.json": [["--verify", out], ["--describe", out], command]}
    calls |= {"train_00000.npy": [["--verify", out], ["--describe", out]], "tokenizer.json": [["--verify", out]]}
    if name == "preparing.json":
        (out / "manifest.json").rename(out / name)
    open_file = io.open

    def refuse(file, *args, **kwargs):
        if str(file).endswith(name):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return open_file(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    for args in calls.get(name, [command]):
        (line,) = refusal(*args).splitlines()
        assert f"{name}" in line and "Permission denied" in line and "delete" not in line and "damaged" not in line


def test_every_file_of_the_tokenizer_is_verified(command, tmp_path):
    prepare(*command, "--output_dir", tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    names = {path.name for path in (tmp_path / "tokenizer").iterdir()}
    assert set(manifest["tokenizer_files"]) == names >= {"tokenizer.json", "tokenizer_config.json"}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("[]")
    assert "tokenizer_config.json is damaged" in refusal("--verify", tmp_path)
    assert "no tokenizer can be loaded" in refusal("--describe", tmp_path)


def dataset(folder, texts):
    """A local folder in the Hub's format."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "data" / "train-0.parquet", row_group_size=5)
    return folder


@pytest.mark.parametrize("kind", ["files", "dataset"])
def test_a_corpus_that_changes_is_noticed(tmp_path, monkeypatch, kind):
    """An unfinished preparation notices it even if the files' sizes stay the same; a finished one by the sizes."""
    monkeypatch.setattr(readers, "PART_BYTES", 100)
    texts = [f"document {n:02d} " + "word " * 9 for n in range(20)]
    folder = dataset(tmp_path / "source", texts)
    corpus = ["files", "--source", folder] if kind == "files" else [folder]
    command = [*corpus, "--output_dir", tmp_path / "out", "--val_tokens", 9]
    with monkeypatch.context() as patch:
        patch.setattr(parts, "finalize_shards", None)  # fails once all parts are made
        with pytest.raises(TypeError):
            prepare(*command)
    before = (folder / "data" / "train-0.parquet").stat()
    dataset(folder, [text.replace("word", "work") for text in texts])
    assert (folder / "data" / "train-0.parquet").stat().st_size == before.st_size
    assert "its modification times changed" in refusal(*command)
    dataset(folder, texts)
    os.utime(folder / "data" / "train-0.parquet", ns=(before.st_atime_ns, before.st_mtime_ns))
    prepare(*command)
    prepare(*command)  # already prepared
    dataset(folder, texts + ["another"] * 50)
    assert "its list of files" in refusal(*command)


def test_files_of_the_same_name_are_distinguished(tmp_path):
    for folder, count in (("a", 3), ("b", 5)):
        (tmp_path / "source" / folder).mkdir(parents=True)
        (tmp_path / "source" / folder / "x.jsonl").write_text('{"text": "some words"}\n' * count)
    command = ["files", "--source", tmp_path / "source", "--output_dir", tmp_path / "out", "--val_tokens", 5]
    prepare(*command)
    files = json.loads((tmp_path / "out" / "manifest.json").read_text())["corpus"]["files"]
    assert [file["name"] for file in files] == ["a/x.jsonl", "b/x.jsonl"]


def test_characters_are_collected_from_every_document(tmp_path):
    texts = ["abc"] * 30 + ["xyz"]
    write_jsonl(tmp_path / "a.jsonl", texts)
    command = ["files", "--source", tmp_path / "a.jsonl", "--output_dir", tmp_path / "out", "--tokenizer", "char"]
    prepare(*command, "--val_tokens", 3, "--tokenizer_documents", 5)
    manifest, train = load(tmp_path / "out", "train")
    assert manifest["tokenizer"]["vocab_size"] == 6 and len(train) == 3 * 30


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_characters_of_documents_beyond_the_limit_are_not_needed(tmp_path, monkeypatch, num_workers):
    """Neither of those in the same batch, nor of those in a part that another process would begin meanwhile."""
    monkeypatch.setattr(readers, "PART_BYTES", 100)
    write_jsonl(tmp_path / "a.jsonl", ["abc", "cba", "aXb"] + ["Y"] * 99)
    command = ["files", "--source", tmp_path / "a.jsonl", "--output_dir", tmp_path / "out", "--tokenizer", "char"]
    prepare(*command, "--val_tokens", 3, "--max_documents", 2, "--num_workers", num_workers)
    manifest, train = load(tmp_path / "out", "train")
    assert manifest["tokenizer"]["vocab_size"] == 3 and train.tolist() == [2, 1, 0]
    assert load(tmp_path / "out", "val")[1].tolist() == [0, 1, 2]


@pytest.mark.parametrize("tokenizer", ["bpe:300", "char"])
def test_tokenizers_are_trained_on_repaired_text(tmp_path, tokenizer):
    texts = ["half \ud800 " + "some words to learn from, and some more of them " * 3, "whole"]
    write_jsonl(tmp_path / "a.jsonl", texts)
    command = ["files", "--source", tmp_path / "a.jsonl", "--output_dir", tmp_path / "out", "--val_tokens", 3]
    prepare(*command, "--tokenizer", tokenizer if tokenizer == "char" else "bpe:270")
    assert load(tmp_path / "out", "val")[0]["repaired_documents"] == 1


def test_skipped_rows_are_counted_in_the_manifest(tmp_path):
    rows = ['{"text": null}', '{"text": "one"}', '{"text": "tw', '{"text": "three"}', '{"text": null}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    prepare("files", "--source", tmp_path / "a.jsonl", "--output_dir", tmp_path / "out", "--val_tokens", 1)
    manifest = load(tmp_path / "out", "train")[0]
    assert manifest["skipped_documents"] == {"no text": 2, "no JSON": 1}
    assert sum(split["documents"] for split in manifest["splits"].values()) == 2


def test_the_tokenizer_is_kept_for_a_resume(command, tmp_path, monkeypatch):
    """Unless a setting or one of its files changes."""
    built = []
    build = prepare_data.build_tokenizer
    monkeypatch.setattr(prepare_data, "build_tokenizer", lambda *args: built.append(1) or build(*args))
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(workers, "prepare_parts", None)  # fails once the tokenizer is built
        for change, count in (([], 1), ([], 1), (["--shard_tokens", 700], 2), ([], 3)):
            with pytest.raises(TypeError):
                prepare(*command, *change, "--output_dir", out)
            assert len(built) == count
        (out / "tokenizer" / "tokenizer_config.json").write_text("{}")
        with pytest.raises(TypeError):
            prepare(*command, "--output_dir", out)
        assert len(built) == 4
    prepare(*command, "--output_dir", out)
    assert len(built) == 4
    prepare("--verify", out)


def test_a_source_that_fails_while_the_tokenizer_is_trained(command, tmp_path, monkeypatch):
    """It is retried, as it is while the footers of tables are read."""
    failures, cut_parquet, texts = [1, 1], readers.cut_parquet, corpora.Corpus.texts
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: None)

    def fail():
        if failures:
            failures.pop()
            raise retries.RemoteError("the line is dead")

    def failing(corpus):
        for text in texts(corpus):
            yield text
            fail()

    monkeypatch.setattr(corpora.Corpus, "texts", failing)
    prepare(*command, "--output_dir", tmp_path / "out")
    assert not failures
    failures += [1, 1]
    monkeypatch.setattr(readers, "cut_parquet", lambda *args: fail() or cut_parquet(*args))
    prepare(dataset(tmp_path / "source", ["one", "two"]), "--output_dir", tmp_path / "tables", "--val_tokens", 1)
    assert not failures


@pytest.mark.parametrize("place", ["file/out", "x" * 300])
def test_an_impossible_output_directory_is_one_line(command, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    (line,) = refusal(*command, "--output_dir", tmp_path / place).splitlines()
    assert "choose another --output_dir" in line


def test_remedies_that_help(tmp_path, texts, shared):
    source = dataset(tmp_path / "source", texts)
    assert "is a folder, which has no revisions; leave it out" in refusal(
        source, "--revision", "main", "--output_dir", tmp_path / "out"
    )
    shakespeare = ["shakespeare-char", "--source", shared / "tinyshakespeare.txt", "--output_dir", tmp_path / "out"]
    line = refusal(*shakespeare, "--max_tokens", 1000)
    assert line.endswith("allow more than --max_tokens 1000")
    (tmp_path / "a.txt").write_bytes(b"\xff")
    line = refusal("files", "--source", tmp_path / "a.txt", "--output_dir", tmp_path / "out2")
    assert "network" not in line and "fix the file" in line


def test_the_estimated_disk_space_covers_ids_of_four_bytes_and_deduplication(tmp_path, capsys):
    corpus = corpora.Corpus([readers.Piece("text", bytes=4 * 10**9)], {})
    said = []
    for vocab_size, dedup in ((65_536, None), (65_537, None), (65_536, "url")):
        options = ["--dedup", dedup] if dedup else []
        args = prepare_data.parse_arguments(["x/y", "--output_dir", str(tmp_path), *options])
        with contextlib.suppress(UserError):
            check_space(OutputDirectory(tmp_path), corpus, vocab_size, prepare_data.request_of(args))
        said.append(capsys.readouterr().out.split(" GB")[0])
    assert said == [f"needs about {need}" for need in ("2.0", "4.0", "5.0")]


# ---- the start of a process ----


@pytest.mark.slow
def test_a_worker_process_imports_neither_torch_nor_transformers():
    """Every worker imports prepare_data.py, and would take seconds longer to start."""
    code = "import sys, prepare_data; print({'torch', 'transformers', 'datasets'} & sys.modules.keys())"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout == "set()\n"


@pytest.mark.parametrize("change", [lambda path: path.write_text("other\n" * 99), lambda path: os.utime(path, (1, 1))])
def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, texts, monkeypatch, change):
    """Neither the manifest's sizes nor its tokens would be those of the source."""
    source = write_jsonl(tmp_path / "source.jsonl", texts)
    check = prepare_data.refuse_empty_splits
    monkeypatch.setattr(prepare_data, "refuse_empty_splits", lambda *args: (check(*args), change(source)))
    flags = ("files", "--source", source, "--tokenizer", "char", "--output_dir", tmp_path / "data")
    assert "is not the one that" in refusal(*flags) and not (tmp_path / "data" / "manifest.json").exists()
