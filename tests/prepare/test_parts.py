"""Preparation in parts: the same bytes for any number of processes, wherever they are interrupted, killed or run out of
disk; exact limits; files cut into pieces."""

import contextlib
import ctypes
import itertools
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import preparer_faults as faults
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from preparer import Preparer, alive, documents_of, manifest_of, tokens_of
from support import contents, prepare, wait_until, write_jsonl

from gpt2repro.data.shards import Split
from gpt2repro.errors import UserError
from gpt2repro.prepare import readers, retries
from gpt2repro.prepare.corpora import CorpusQuery, open_corpus
from gpt2repro.prepare.parts import Counts, Job
from gpt2repro.prepare.plan import PartRecord, Quota, plan
from gpt2repro.prepare.prepared import OutputDirectory
from gpt2repro.prepare.readers import Piece
from gpt2repro.prepare.request import Execution
from gpt2repro.prepare.workers import prepare_parts


PART_BYTES = 10_000
SMALL_PARTS = partial(faults.small_parts, PART_BYTES)


@pytest.fixture(scope="module")
def source(texts, tmp_path_factory):
    """A folder of the documents, in order; it makes half a dozen parts."""
    folder = tmp_path_factory.mktemp("source")
    write_jsonl(folder / "a.jsonl", texts[:150])
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[150:]}), folder / "b.parquet", row_group_size=10)
    return folder


@pytest.fixture(scope="module")
def tokenizer(source, tmp_path_factory):
    """A small tokenizer that loads at once."""
    folder = tmp_path_factory.mktemp("bpe")
    prepare("files", "--source", source, "--output_dir", folder, "--tokenizer", "bpe:400", "--val_fraction", 0.1)
    return folder / "tokenizer"


@pytest.fixture(scope="module")
def command(source, tokenizer):
    return ["files", "--source", source, "--tokenizer", tokenizer, "--shard_tokens", 2000, "--val_fraction", 0.1]


@pytest.fixture(scope="module")
def preparer(tmp_path_factory):
    with Preparer(tmp_path_factory.mktemp("printed")) as preparer:
        yield preparer


@pytest.fixture(scope="module")
def uninterrupted(preparer, command, tmp_path_factory):
    """The output of an undisturbed command with one process."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    run = preparer.run(*command, "--output_dir", directory, before=[SMALL_PARTS])
    assert run.status == 0, run.lines
    return contents(directory)


def parts_done(directory):
    return len(list((directory / "parts").glob("part_*.json")))


# ---- the plan, with a fake part maker ----


def take(documents, quota):
    """What a plain loop over documents (split by hash, tokens) takes: the definition of all limits. Returns the
    documents with their final splits, and whether all were taken."""
    taken = []
    for split, tokens in documents:
        if sum(size for name, size in taken if name == "val") < quota.val_tokens:
            split = "val"
        if len(taken) == quota.documents:
            return taken, False
        if quota.tokens is not None and sum(size for _, size in taken) + tokens > quota.tokens:
            return taken, False
        taken.append((split, tokens))
    return taken, True


@dataclass(frozen=True)
class FakeRecord(PartRecord):
    taken: list


def fake_record(documents, quota):
    taken, complete = take(documents, quota)
    splits = {
        split: Split(sum(n for s, n in taken if s == split), sum(s == split for s, _ in taken), 0)
        for split in ("train", "val")
    }
    return FakeRecord(quota, complete, {}, splits, [], taken)


def random_case(generator):
    sizes = [generator.randrange(4) for _ in range(generator.randrange(1, 6))]  # documents of each part
    splits = ("train", "val", "train") if generator.random() < 0.5 else ("train",)  # by hash, or by val_tokens
    parts = [[(generator.choice(splits), generator.randrange(1, 5)) for _ in range(size)] for size in sizes]
    quota = Quota(
        generator.choice([0, generator.randrange(1, 15)]) if splits == ("train",) else 0,
        generator.choice([None, generator.randrange(1, 25)]),
        generator.choice([None, generator.randrange(1, 10)]),
    )
    return parts, quota


def check_end(parts, quota, records, used):
    expected, _ = take(list(itertools.chain.from_iterable(parts)), quota)
    assert [document for number in range(used) for document in records[number].taken] == expected


@pytest.mark.parametrize("num_workers", [1, 2, 3, 8])
def test_parts_in_any_order_equal_the_plain_loop(num_workers):
    """Parts finish in any order; sometimes everything is killed and restarted with the finished ones."""
    generator = random.Random(num_workers)
    for _ in range(1500):
        parts, quota = random_case(generator)
        records, running, made = {}, {}, 0
        while True:
            used, todo = plan(len(parts), records, quota)
            if not todo:
                break
            for number, part_quota in todo:
                if len(running) < num_workers and number not in running:
                    running[number] = part_quota
            if generator.random() < 0.1:
                running = {}
                continue
            number = generator.choice(list(running))
            records[number] = fake_record(parts[number], running.pop(number))
            made += 1
        check_end(parts, quota, records, used)
        assert made <= 2 * len(parts)  # speculatively, and again


def test_every_order_of_the_parts():
    """As above, for every order in which two processes can finish their parts."""
    generator = random.Random(0)
    orders = 0

    def explore(parts, quota, records, running):
        nonlocal orders
        used, todo = plan(len(parts), records, quota)
        if not todo:
            orders += 1
            check_end(parts, quota, records, used)
            return
        running = dict(running)
        for number, part_quota in todo:
            if len(running) < 2 and number not in running:
                running[number] = part_quota
        for number, part_quota in running.items():
            others = {other: q for other, q in running.items() if other != number}
            explore(parts, quota, records | {number: fake_record(parts[number], part_quota)}, others)

    for _ in range(300):
        explore(*random_case(generator), {}, {})
    assert orders > 2000


@pytest.mark.parametrize("quota", [Quota(), Quota(0, 1000, None), Quota(0, None, 1000)])
def test_no_part_is_made_twice_unless_a_limit_is_reached(quota):
    parts = [[("train", 1)] * 3] * 6
    for order in itertools.permutations(range(6)):
        records = {}
        for number in order:
            _, todo = plan(6, records, quota)
            assert number in dict(todo)
            records[number] = fake_record(parts[number], dict(todo)[number])
        assert plan(6, records, quota) == (6, [])


def test_while_validation_takes_the_beginning_the_end_is_made():
    """Few parts are made on a wrong guess."""
    numbers = [number for number, _ in plan(5, {}, Quota(val_tokens=10))[1]]
    assert numbers == [0, 4, 3, 2, 1]
    assert [number for number, _ in plan(5, {}, Quota(val_tokens=10, tokens=99))[1]] == [0, 1, 2, 3, 4]


# ---- the limits, with real parts ----


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(readers, "PART_BYTES", PART_BYTES)


@pytest.fixture(scope="module")
def lengths(texts, tokenizer):
    """Tokens of each document, its opening id included."""
    backend = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    backend.encode_special_tokens = True
    return [len(backend.encode(text, add_special_tokens=False).ids) + 1 for text in texts]


def test_the_source_is_cut_into_parts(source, texts, small_parts):
    corpus = open_corpus(CorpusQuery("files", str(source)))
    parts = corpus.parts()
    assert len(parts) > 4
    assert all(len(part) == 1 or sum(piece.bytes for piece in part) <= PART_BYTES for part in parts)
    assert [text for part in parts for piece in part for text in piece.texts()] == texts == list(corpus.texts())


@pytest.mark.parametrize("documents", [0, 1, 60, 149, 150])
def test_validation_takes_the_first_documents_over_several_parts(
    source, tokenizer, texts, lengths, tmp_path, small_parts, documents
):
    """Exactly the tokens up to this document; one token more takes the next document."""
    for more in (0, 1):
        val_tokens = sum(lengths[: documents + 1]) + more
        output_dir = tmp_path / f"{more}"
        prepare(
            *("files", "--source", source, "--tokenizer", tokenizer, "--output_dir", output_dir),
            *("--val_tokens", val_tokens),
        )
        assert documents_of(output_dir, "val") == texts[: documents + 1 + more]
        assert documents_of(output_dir, "train") == texts[documents + 1 + more :]
        prepare("--verify", output_dir)


@pytest.mark.parametrize(
    "limit",
    [{"documents": 12}, {"documents": 97}, {"documents": 250}, {"documents": 999}, {"tokens": 1}, {"tokens": 0}],
)
@pytest.mark.parametrize("split", ["val_tokens", "val_fraction"])
def test_limits_take_a_beginning_of_the_corpus(source, tokenizer, texts, lengths, tmp_path, small_parts, limit, split):
    """`tokens`: exactly those of the first 120 documents, or one less, so that the last does not fit."""
    if "documents" in limit:
        option, count = ["--max_documents", limit["documents"]], min(limit["documents"], 250)
    else:
        option, count = ["--max_tokens", sum(lengths[:120]) - limit["tokens"]], 120 - limit["tokens"]
    division = ["--val_tokens", 1] if split == "val_tokens" else ["--val_fraction", 0.5]
    prepare(
        *("files", "--source", source, "--tokenizer", tokenizer, "--output_dir", tmp_path / "out", *option, *division)
    )
    train, val = (documents_of(tmp_path / "out", split) for split in ("train", "val"))
    if split == "val_tokens":
        assert val + train == texts[:count]
    else:
        assert sorted(val + train) == sorted(texts[:count]) and not set(val) & set(train)
        assert train == [text for text in texts if text in set(train)]  # in their order
        assert val == [text for text in texts if text in set(val)]
    prepare("--verify", tmp_path / "out")
    manifest = manifest_of(tmp_path / "out")
    assert sum(split["documents"] for split in manifest["splits"].values()) == count
    assert sum(split["bytes"] for split in manifest["splits"].values()) == len("".join(texts[:count]).encode())


NASTY = [
    "👩‍👩‍👧 👋🏽 é e\u0301 \u202e abc \ufeff",
    "\0",
    "a\0\0b",
    "",
    "line\r\nline\r\n\r\n",
    "x" * 1_000_000,
    " " * 100_000 + "x",
    "<|endoftext|>",
    "half a pair \ud83d, the other half \udc4b.",
    "",
    "whole pair of halves \ud83d\udc4b",
    "\ud800" * 3,
    "1234567890" * 100,
    "\n" * 1000,
    "日本語のテキスト" * 50,
]


def test_tokens_are_tiktokens_one_by_one(topics, encoding, tmp_path, monkeypatch):
    """On real and on nasty text."""
    monkeypatch.setattr(readers, "PART_BYTES", 500_000)
    documents = NASTY[:8] + topics[:20] + NASTY[8:]
    write_jsonl(tmp_path / "a.jsonl", documents)
    assert len(open_corpus(CorpusQuery("files", str(tmp_path / "a.jsonl"))).parts()) == 3
    prepare("files", "--source", tmp_path / "a.jsonl", "--output_dir", tmp_path / "out", "--val_tokens", 30)

    expected = [[50256, *encoding.encode_ordinary(text)] for text in documents]
    val = tokens_of(tmp_path / "out", "val").tolist()
    train = tokens_of(tmp_path / "out", "train").tolist()
    assert val + train == list(itertools.chain.from_iterable(expected))
    manifest = manifest_of(tmp_path / "out")
    assert manifest["repaired_documents"] == 2  # JSON puts the whole pair together
    assert sum(split["documents"] for split in manifest["splits"].values()) == len(documents)


def test_only_documents_that_are_taken_count_as_repaired(tokenizer, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [f"{number} \ud800" for number in range(30)])
    prepare(
        *("files", "--source", tmp_path / "a.jsonl", "--output_dir", tmp_path / "out", "--tokenizer", tokenizer),
        *("--val_tokens", 1, "--max_documents", 7),
    )
    assert manifest_of(tmp_path / "out")["repaired_documents"] == 7


def test_characters_over_several_parts(source, texts, tmp_path, small_parts):
    """No id opens a document, so merging needs the recorded lengths of the validation documents."""
    prepare(
        *("files", "--source", source, "--output_dir", tmp_path / "out", "--tokenizer", "char"),
        *("--val_fraction", 0.3, "--shard_tokens", 500),
    )
    prepare("--verify", tmp_path / "out")
    manifest = manifest_of(tmp_path / "out")
    assert sum(split["documents"] for split in manifest["splits"].values()) == len(texts)
    assert sum(split["tokens"] for split in manifest["splits"].values()) == sum(map(len, texts))
    val = manifest["splits"]["val"]["shards"]
    assert [shard["tokens"] for shard in val[:-1]] == [500] * (len(val) - 1) and len(val) > 3


def test_a_part_of_empty_documents_only(tmp_path, monkeypatch):
    """Without an end-of-text token they have no tokens at all."""
    write_jsonl(tmp_path / "a.jsonl", ["ab"] * 50 + [""] * 500)
    monkeypatch.setattr(readers, "PART_BYTES", 1000)
    out = tmp_path / "out"
    prepare("files", "--source", tmp_path / "a.jsonl", "--output_dir", out, "--tokenizer", "char", "--val_tokens", 9)
    prepare("--verify", out)
    assert manifest_of(out)["splits"]["train"]["tokens"] == 90


def test_merged_validation_equals_what_one_part_writes(source, command, tmp_path, monkeypatch):
    for name, part_bytes in (("one", 2**28), ("many", 2000)):
        monkeypatch.setattr(readers, "PART_BYTES", part_bytes)
        prepare(*command, "--output_dir", tmp_path / name)
    one, many = (manifest_of(tmp_path / name)["splits"] for name in ("one", "many"))
    assert one["val"] == many["val"]
    assert contents(tmp_path / "one")["val_00000.npy"] == contents(tmp_path / "many")["val_00000.npy"]
    assert len(many["train"]["shards"]) > len(one["train"]["shards"])
    assert np.array_equal(tokens_of(tmp_path / "one", "train"), tokens_of(tmp_path / "many", "train"))


@pytest.mark.parametrize("renamed", [0, 1, 3])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_part_whose_shard_is_gone_is_made_again(
    source, command, uninterrupted, tmp_path, monkeypatch, renamed, damage
):
    """Before and while the shards are renamed into place."""
    monkeypatch.setattr(readers, "PART_BYTES", PART_BYTES)
    output_dir, replace, names = tmp_path / "out", Path.replace, []

    def stopping(path, target):
        if target.parent == output_dir and target.suffix == ".npy":
            names.append(target)
            if len(names) > renamed:
                raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", stopping)
        prepare(*command, "--output_dir", output_dir)
    shard = names[0] if renamed else output_dir / "parts" / "part_00002_train_00000.npy"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-2])
    else:
        shard.unlink()
    prepare(*command, "--output_dir", output_dir)
    assert contents(output_dir) == uninterrupted


# ---- files cut into pieces ----

LINES = (
    b'{"text": "one"}\n\n{"text": "zw\xc3\xb6lf"}\r\n   \n{"text": ""}\n{"text": "\xf0\x9f\x91\x8b"}\n'
    b'{"id": 1, "text": "last, without an end"}'
)
LINE_TEXTS = ["one", "zwölf", "", "👋", "last, without an end"]


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n\r\n"])
def test_each_line_is_read_once_wherever_the_file_is_cut(tmp_path, end):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES + end)
    size = len(LINES + end)

    def read(start, stop):
        return list(Piece("json lines", str(path), stop - start, start, stop).texts())

    ahead, behind = [read(0, cut) for cut in range(size + 1)], [read(cut, size) for cut in range(size + 1)]
    for cut in range(size + 1):
        assert ahead[cut] + behind[cut] == LINE_TEXTS
        for second in range(cut, size + 1, 3):
            assert ahead[cut] + read(cut, second) + behind[second] == LINE_TEXTS


@pytest.mark.parametrize("part_bytes", [1, 2, 7, 16, 50, 1000])
def test_lines_are_read_once_whatever_the_size_of_a_part(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr(readers, "PART_BYTES", part_bytes)
    (tmp_path / "a.jsonl").write_bytes(LINES)
    corpus = open_corpus(CorpusQuery("files", str(tmp_path / "a.jsonl")))
    assert len(corpus.pieces) == -(-len(LINES) // part_bytes)
    assert list(corpus.texts()) == LINE_TEXTS


@pytest.mark.parametrize("part_bytes", [1, 60, 100, 300, 10**6])
@pytest.mark.parametrize("row_group_size", [1, 2, 3, 7, 100])
def test_row_groups_are_read_once(tmp_path, monkeypatch, row_group_size, part_bytes):
    texts = [f"document {number} " + "word " * (number % 5) for number in range(40)]
    table = pyarrow.table({"id": list(range(40)), "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a [1].parquet", row_group_size=row_group_size)
    monkeypatch.setattr(readers, "PART_BYTES", part_bytes)
    corpus = open_corpus(CorpusQuery("files", str(tmp_path)))
    assert list(corpus.texts()) == texts
    groups = -(-40 // row_group_size)
    borders = [(piece.start, piece.stop) for piece in corpus.pieces]
    assert [start for start, _ in borders] == [0, *(stop for _, stop in borders[:-1])] and borders[-1][1] == groups
    assert all(stop == start + 1 or piece.bytes <= part_bytes for (start, stop), piece in zip(borders, corpus.pieces))
    assert len(borders) == {1: groups, 10**6: 1}.get(part_bytes, len(borders))


# ---- processes ----


@pytest.mark.parametrize(
    "options", [["--num_workers", 2], ["--num_workers", 2, "--max_tokens", 12_000, "--max_documents", 170]]
)
def test_the_number_of_processes_makes_no_difference(preparer, command, uninterrupted, tmp_path, options):
    command = [*command[:-2], "--val_tokens", 3000] if "--max_tokens" in options else command
    runs = [preparer.run(*command, *options, "--output_dir", tmp_path / "many", before=[SMALL_PARTS])]
    if "--max_tokens" in options:
        runs += [preparer.run(*command, *options[2:], "--output_dir", tmp_path / "one", before=[SMALL_PARTS])]
        uninterrupted = contents(tmp_path / "one")
    assert [run.status for run in runs] == [0] * len(runs), runs[0].lines
    assert contents(tmp_path / "many") == uninterrupted


@pytest.fixture(scope="module")
def large(topics, tokenizer, tmp_path_factory):
    """A command whose first two parts finish at once, while the others keep two processes busy for a while."""
    folder = tmp_path_factory.mktemp("large")
    for number in range(10):
        documents = topics[:40] if number > 1 else topics[:2]
        write_jsonl(folder / f"{number}.jsonl", [f"{number} {topic}" for topic in documents])
    return ["files", "--source", folder, "--tokenizer", tokenizer, "--shard_tokens", 100_000, "--val_fraction", 0.05]


@pytest.fixture(scope="module")
def large_contents(preparer, large, tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    run = preparer.run(*large, "--output_dir", directory, before=[faults.one_part_per_file])
    assert run.status == 0, run.lines
    return contents(directory)


def test_processes_that_are_killed(preparer, large, large_contents, tmp_path):
    """All of them; the command alone, whose workers neither survive nor disturb the next run; one of the workers."""
    output_dir, workers = tmp_path / "out", []
    for killed in ("all", "command", "worker"):
        before = parts_done(output_dir)
        run = preparer.start(*large, "--output_dir", output_dir, "--num_workers", 2, before=[faults.one_part_per_file])
        workers += run.wait_for_workers(2)
        run.wait_until(lambda n=before: parts_done(output_dir) > n)
        if killed == "all":
            os.killpg(run.pid, signal.SIGKILL)
        else:
            os.kill(run.pid if killed == "command" else workers[-1], signal.SIGKILL)
        assert run.wait() == (2 if killed == "worker" else -signal.SIGKILL)
        assert not (output_dir / "manifest.json").exists()
    (line,) = run.messages
    assert line.startswith("error: a process was killed") and "--num_workers" in line

    run = preparer.run(*large, "--output_dir", output_dir, before=[faults.one_part_per_file])
    assert run.status == 0, run.lines
    assert contents(output_dir) == large_contents
    wait_until(lambda: not any(map(alive, workers)))


def test_an_idle_worker_ends_with_the_command(preparer, topics, tokenizer, tmp_path):
    """It waits for work that will never come."""
    (tmp_path / "source").mkdir()
    write_jsonl(tmp_path / "source" / "0.jsonl", ["short"])
    write_jsonl(tmp_path / "source" / "1.jsonl", ["".join(topics)] * 100)
    command = ["files", "--source", tmp_path / "source", "--tokenizer", tokenizer, "--num_workers", 2]
    run = preparer.start(*command, "--output_dir", tmp_path / "out", before=[faults.one_part_per_file])
    workers = run.wait_for_workers(2)
    run.wait_until(lambda: parts_done(tmp_path / "out"))
    time.sleep(0.2)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    wait_until(lambda: not any(map(alive, workers)))
    assert parts_done(tmp_path / "out") == 1


# ---- kills ----


def test_thirty_kills(preparer, command, uninterrupted, tmp_path):
    """At random moments of first and resumed runs; the same files every time."""
    began = time.monotonic()
    preparer.run(*command, "--output_dir", tmp_path / "timed", before=[SMALL_PARTS])
    duration = time.monotonic() - began
    generator, kills, finished = random.Random(0), 0, 0
    while kills < 30 or not finished:
        output_dir = tmp_path / f"{finished}"
        run = preparer.start(*command, "--output_dir", output_dir, before=[SMALL_PARTS])
        if kills < 30:
            time.sleep(generator.uniform(0, duration))
            with contextlib.suppress(ProcessLookupError):
                run.kill()
        status = run.wait()
        kills += status == -signal.SIGKILL
        if status == 0:
            assert contents(output_dir) == uninterrupted
            finished += 1
        else:
            assert status == -signal.SIGKILL, run.lines
            if (output_dir / "manifest.json").exists():  # killed while it cleaned up, which has a test of its own
                finished += 1
    assert kills == 30


def kill_before_each_change(preparer, source, tokenizer, tmp_path, finished):
    """Kill a small preparation before its first, second, ... change of the directory; see sigkill_before_change.
    Yields what the same command then makes of the directory, and what it should."""
    command = ["files", "--source", source, "--tokenizer", tokenizer, "--val_fraction", 0.3]
    few_parts = partial(faults.small_parts, 2 * PART_BYTES)
    preparer.run(*command, "--output_dir", tmp_path / "expected", before=[few_parts])
    for number in itertools.count(1):
        output_dir = tmp_path / f"{number}"
        kill = partial(faults.sigkill_before_change, number, str(output_dir), finished)
        run = preparer.run(*command, "--output_dir", output_dir, before=[few_parts, kill])
        if run.status == 0:
            break
        assert run.status == -signal.SIGKILL, run.lines
        again = preparer.run(*command, "--output_dir", output_dir, before=[few_parts])
        assert again.status == 0, again.lines
        yield contents(output_dir), contents(tmp_path / "expected")


@pytest.mark.parametrize("finished, least_changes", [(False, 26), (True, 6)], ids=["at work", "cleaning up"])
def test_a_kill_before_each_change_of_the_directory(preparer, source, tokenizer, tmp_path, finished, least_changes):
    changes = 0
    for found, expected in kill_before_each_change(preparer, source, tokenizer, tmp_path, finished):
        changes += 1
        assert found == expected
    assert changes >= least_changes


# ---- Ctrl-C ----


def test_ctrl_c(preparer, command, uninterrupted, tmp_path):
    """At random moments of the tokenization."""
    generator, interrupted = random.Random(1), 0
    for number in range(8):
        output_dir = tmp_path / f"{number}"
        run = preparer.start(*command, "--output_dir", output_dir, before=[SMALL_PARTS])
        wait_until(lambda d=output_dir: parts_done(d) or (d / "manifest.json").exists())
        time.sleep(generator.uniform(0, 0.05))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGINT)
        status = run.wait()
        if not (output_dir / "manifest.json").exists():
            assert status == 130, run.lines
            assert run.messages == []
            assert preparer.run(*command, "--output_dir", output_dir, before=[SMALL_PARTS]).status == 0
            assert contents(output_dir) == uninterrupted
            interrupted += 1
    assert interrupted > 1


def test_no_python_runs_inside_the_reader_of_a_local_table(source, texts, monkeypatch):
    """pyarrow swallows a KeyboardInterrupt that is raised in Python code called by it."""
    monkeypatch.setattr(fsspec, "open", None)
    assert list(open_corpus(CorpusQuery("files", str(source / "b.parquet"))).texts()) == texts[150:]


@pytest.mark.parametrize("moment", ["while they start", "while they work"])
def test_ctrl_c_with_processes(preparer, large, large_contents, tmp_path, moment):
    run = preparer.start(
        *large, "--output_dir", tmp_path / "out", "--num_workers", 2, before=[faults.one_part_per_file]
    )
    workers = run.wait_for_workers(2)
    if moment == "while they work":
        run.wait_until(lambda: parts_done(tmp_path / "out"))
    else:
        for _ in range(10):  # during their imports; they leave it to the main process
            for worker in workers:
                os.kill(worker, signal.SIGINT)
            time.sleep(0.02)
        assert all(map(alive, workers))
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait() == 130
    assert run.messages == []
    assert not any(map(alive, workers))
    if moment == "while they work":
        assert preparer.run(*large, "--output_dir", tmp_path / "out", before=[faults.one_part_per_file]).status == 0
        assert contents(tmp_path / "out") == large_contents


# ---- two at once ----


def test_the_second_preparation_of_a_directory_refuses(preparer, command, uninterrupted, tmp_path):
    first = preparer.start(*command, "--output_dir", tmp_path / "out", before=[SMALL_PARTS])
    first.wait_until(lambda: parts_done(tmp_path / "out"))
    first.kill(signal.SIGSTOP)
    try:
        assert not (tmp_path / "out" / "manifest.json").exists()
        before = contents(tmp_path / "out")
        second = preparer.run(*command, "--output_dir", tmp_path / "out", before=[SMALL_PARTS])
        assert contents(tmp_path / "out") == before
    finally:
        first.kill(signal.SIGCONT)
    assert second.status == 2
    assert second.lines[-1].startswith("error: ") and "is being prepared by another process" in second.lines[-1]
    assert first.wait() == 0
    assert contents(tmp_path / "out") == uninterrupted


# ---- a full disk ----


@pytest.fixture(scope="module")
def uneven(topics, tmp_path_factory):
    """Three small files and a larger one."""
    folder = tmp_path_factory.mktemp("uneven")
    for number, documents in enumerate([topics[:3], topics[3:6], topics[6:60], topics[60:63]]):
        write_jsonl(folder / f"{number}.jsonl", "\n\n".join(documents).split("\n\n"))
    return folder


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_file_that_cannot_grow(preparer, uneven, tokenizer, tmp_path, num_workers):
    """EFBIG, in the middle of the third part; the first two are kept."""
    command = ["files", "--source", uneven, "--tokenizer", tokenizer, "--val_fraction", 0.02]
    limit = partial(faults.file_size_limit, 50_000)
    expected = preparer.run(*command, "--output_dir", tmp_path / "expected", before=[faults.one_part_per_file])
    assert expected.status == 0, expected.lines
    assert max(map(len, contents(tmp_path / "expected").values())) > 50_000

    output_dir = tmp_path / "out"
    before = [faults.one_part_per_file, limit]
    run = preparer.run(*command, "--output_dir", output_dir, "--num_workers", num_workers, before=before)
    assert run.status == 2
    (line,) = run.messages
    assert line.startswith(f"error: no space is left for {output_dir}; finished parts are kept")
    assert parts_done(output_dir) >= 1 if num_workers == 2 else parts_done(output_dir) == 2
    assert not list(output_dir.rglob("part_00002*"))
    assert preparer.run(*command, "--output_dir", output_dir, before=[faults.one_part_per_file]).status == 0
    assert contents(output_dir) == contents(tmp_path / "expected")


def test_a_full_disk(preparer, command, uninterrupted, small_disk):
    """Disks that fill up at various points; once there is space the same command resumes."""
    everything = sum(map(len, uninterrupted.values()))
    reached = []
    for share in (0.3, 0.5, 0.7, 0.9, 1.0, 1.1):
        disk = small_disk(int(share * everything) // 4096 * 4096)
        run = preparer.run(*command, "--output_dir", disk / "out", before=[SMALL_PARTS, faults.unlimited_free_space])
        if run.status:
            assert run.status == 2, run.lines
            (line,) = run.messages
            assert line.startswith("error: no space is left for ")
            assert not (disk / "out" / "manifest.json").exists()
            reached.append(parts_done(disk / "out"))
            small_disk(2**26, flags=32)  # MS_REMOUNT
            assert preparer.run(*command, "--output_dir", disk / "out", before=[SMALL_PARTS]).status == 0
        assert contents(disk / "out") == uninterrupted
        ctypes.CDLL(None).umount2(bytes(disk), 2)
    assert len(reached) > 2 and len(set(reached)) > 1


# ---- attempts ----


class Flaky:
    """A reader of a remote source that fails a number of times."""

    def __init__(self, failures, texts):
        self.failures, self.texts = failures, texts

    def __call__(self, piece):
        for number, text in enumerate(self.texts):
            if number == 2 and self.failures:
                self.failures -= 1
                raise retries.RemoteError("the line is dead")
            yield {"text": text}


@pytest.mark.parametrize("failures", [0, 1, retries.ATTEMPTS - 1, retries.ATTEMPTS])
def test_a_part_is_tried_again(monkeypatch, tmp_path, tokenizer, failures):
    delays, shown = [], []
    monkeypatch.setattr(retries.time, "sleep", delays.append)
    monkeypatch.setitem(readers.READERS, "flaky", Flaky(failures, ["one", "two", "three", "four"]))
    job = Job(OutputDirectory(tmp_path), str(tokenizer), 400, 399, 1000)
    shutil.copytree(tokenizer, tmp_path / "tokenizer")

    def make():
        return prepare_parts([(Piece("flaky"),)], job, Quota(3), Execution(), shown.append)

    if failures == retries.ATTEMPTS:
        with pytest.raises(UserError, match=rf"the line is dead; tried {failures} times.*repeat the command"):
            make()
        assert not list((tmp_path / "parts").iterdir())
        (record,) = make()
    else:
        (record,) = make()
    assert delays == [retries.FIRST_DELAY * 2**n for n in range(min(failures, retries.ATTEMPTS - 1))]
    assert record.total("documents") == 4
    assert shown[-1] == tuple(record.total(unit) for unit in Counts._fields)
