"""Corpora: their documents, in order, and the error messages for unreadable ones."""

import bz2
import gzip
import hashlib
import inspect
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics as language_reference

import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest
from support import ROOT

from gpt2repro.errors import UserError
from gpt2repro.prepare import built_in, corpora, readers
from gpt2repro.prepare.corpora import CorpusQuery, HubCorpus, ValidationSplit


ROWS = [{"text": "one"}, {"text": "two\r\n\0 zwei"}, {"text": ""}, {"text": "three 👋"}]
TEXTS = [row["text"] for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def open_corpus(*args, **kwargs):
    return corpora.open_corpus(CorpusQuery(*args, **kwargs))


def compressed(data, suffix):
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    pack["zst"] = lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True)
    return pack[suffix](data)


def parquet(rows):
    return parquet_of(pyarrow.Table.from_pylist(rows))


def parquet_of(table, **options):
    buffer = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, buffer, **options)
    return buffer.getvalue().to_pybytes()


def write_files(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def read(name, *args, **kwargs):
    return list(open_corpus(name, *args, **kwargs).texts())


def mistake(name, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        read(name, *args, **kwargs)
    (line,) = str(caught.value).splitlines()
    return line


# ---- python-docs ----


@pytest.mark.slow
def test_python_docs_are_a_corpus(python_docs):
    assert len(python_docs) > 300
    assert sum(map(len, python_docs)) > 1_000_000
    assert all(document.strip() and document.endswith("\n") for document in python_docs)


def test_python_docs_start_with_the_language_reference(python_docs):
    names = sorted(language_reference)
    assert python_docs[: len(names)] == [language_reference[name].strip() + "\n" for name in names]
    assert python_docs[len(names)].startswith("Module ")
    assert any('The "with" statement\n' in document for document in python_docs)


def test_python_docs_hold_the_docstrings(python_docs):
    """Of modules, functions, classes and methods, indented as pydoc does."""
    (document,) = [document for document in python_docs if document.startswith("Module json\n")]
    assert inspect.getdoc(json) in document
    signature = "\ndumps(obj, *, skipkeys=False, ensure_ascii=True, "
    body = "".join(f"    {line}".rstrip() + "\n" for line in inspect.getdoc(json.dumps).splitlines())
    assert signature in document and body in document

    (document,) = [document for document in python_docs if document.startswith("Module json.decoder\n")]
    method = inspect.getdoc(json.JSONDecoder.raw_decode).splitlines()[0]
    assert "\nclass JSONDecoder" in document
    assert f"\n    raw_decode(self, s, idx=0)\n        {method}\n" in document


@pytest.mark.slow
def test_python_docs_are_the_same_in_another_process(python_docs):
    """Whatever the order of its sets: PYTHONHASHSEED differs."""
    code = "import hashlib; from gpt2repro.prepare.built_in import python_docs as docs; "
    code += "print(hashlib.sha256('\\x00'.join(docs()).encode()).hexdigest())"
    command = [sys.executable, "-W", "ignore", "-c", code]
    other = subprocess.check_output(command, text=True, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "7"})
    assert other.strip() == hashlib.sha256("\0".join(python_docs).encode()).hexdigest()


# ---- files ----


TABLES = {
    "jsonl": ("a.jsonl", LINES),
    "jsonl called json": ("a.json", LINES),
    "json list": ("a.json", json.dumps(ROWS).encode()),
    "jsonl.gz": ("a.jsonl.gz", gzip.compress(LINES)),
    "json.gz": ("a.json.gz", gzip.compress(LINES)),
    "parquet": ("a.parquet", parquet(ROWS)),
    "capitals": ("A.JSONL", LINES),
    "hidden folder": (".hidden/with space/ü.jsonl", LINES),
    "brackets": ("copy [1].jsonl", LINES),
}


@pytest.mark.parametrize("name, content", TABLES.values(), ids=TABLES)
def test_tables(tmp_path, name, content):
    write_files(tmp_path, {name: content})
    corpus = open_corpus("files", str(tmp_path / name))
    assert list(corpus.texts()) == TEXTS
    assert list(corpus.texts()) == TEXTS  # the tokenizer takes a pass of its own
    assert not corpus.single_text
    assert corpus.facts == {"files": [{"name": Path(name).name, "bytes": len(content)}]}


@pytest.mark.parametrize("name, pack", [("a.txt", bytes), ("a.txt.gz", gzip.compress)])
def test_a_text_file_is_one_document(tmp_path, name, pack):
    text = "eins\r\nzwei\n\n\0 👋 \ufeff"
    write_files(tmp_path, {name: pack(text.encode())})
    corpus = open_corpus("files", str(tmp_path / name))
    assert list(corpus.texts()) == [text]
    assert corpus.single_text and corpus.default_split == ValidationSplit(fraction=0.1)


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    files = {
        "b.txt": b"5",
        "a/z.jsonl": b'{"text": "3"}\n{"text": "4"}\n',
        "a/b/c.txt": b"2",
        "a.txt": b"1",
        "readme.md": b"not read",
        "c.parquet": parquet([{"text": "6"}]),
        "d.txt.gz": gzip.compress(b"7"),
    }
    corpus = open_corpus("files", str(write_files(tmp_path, files)))
    names = [file["name"] for file in corpus.facts["files"]]
    paths = [path.relative_to(tmp_path) for path in sorted(map(tmp_path.__truediv__, files)) if path.suffix != ".md"]
    assert names == [path.as_posix() for path in paths]
    by_name = {"a.txt": "1", "a/b/c.txt": "2", "a/z.jsonl": "34", "b.txt": "5", "c.parquet": "6", "d.txt.gz": "7"}
    assert "".join(corpus.texts()) == "".join(by_name[name] for name in names)
    assert not corpus.single_text


def test_an_empty_table_has_no_documents(tmp_path):
    write_files(tmp_path, {"a.jsonl": LINES, "b.jsonl": b"", "c.jsonl": LINES})
    assert read("files", str(tmp_path)) == TEXTS * 2


def test_the_text_column_is_chosen(tmp_path):
    rows = [{"text": "no", "content": "yes", "id": 1}]
    write_files(tmp_path, {"a.jsonl": json.dumps(rows[0]).encode(), "b.parquet": parquet(rows)})
    assert read("files", str(tmp_path), text_column="content") == ["yes", "yes"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "list.json", "list.json.gz", "list.jsonl"])
def test_rows_without_text(tmp_path, name):
    """Null, rows without the column and broken lines are skipped, lone surrogates are repaired, and all are counted."""
    rows = [
        {},
        {"id": 1},
        None,
        {"text": None},
        {"text": "half \ud83d"},
        {"text": ""},
        {"id": 2},
        {"text": "two"},
        None,
    ]
    content = "\n".join(map(json.dumps, rows)) + '\n{"text": "broken\n'
    notes = ["no text"] * 4 + ["repaired", "", "no text", "", "no text", "no JSON"]
    if name.startswith("list"):
        content, notes = json.dumps(rows), notes[:-1]
    content = b"\xef\xbb\xbf" + content.encode()
    write_files(tmp_path, {name: gzip.compress(content) if name.endswith(".gz") else content})
    corpus = open_corpus("files", str(tmp_path / name))
    assert list(corpus.texts()) == ["half \ufffd", "", "two"]
    assert [document.note for piece in corpus.pieces for document in piece.documents()] == notes


def test_rows_without_the_column_at_the_start_of_a_piece(tmp_path, monkeypatch):
    """The file has the column, so the flag is right."""
    monkeypatch.setattr(readers, "PART_BYTES", 40)
    rows = [{"text": "one"}, *({"id": number} for number in range(200)), {"text": "two"}]
    write_files(tmp_path, {"a.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()})
    corpus = open_corpus("files", str(tmp_path))
    assert list(corpus.texts()) == ["one", "two"] and len(corpus.pieces) > 30


@pytest.mark.parametrize("rows", [["a list"], [["x"], ["y"]]])
def test_lines_that_are_lists_are_not_one_list(tmp_path, rows):
    write_files(tmp_path, {"a.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()})
    assert "a.jsonl, row 1: " in mistake("files", str(tmp_path))


def test_texts_of_a_csv_that_look_like_numbers(tmp_path):
    """A second file of a dataset may hold nothing else; the first decides what load_dataset makes of it."""
    write_files(tmp_path, {"a.csv": b"text\nhello\nNA\n", "b.csv": b"text,id\n1984,1\n007,2\n,3\nTrue,4\n"})
    for query in ([str(tmp_path)], ["files", str(tmp_path)]):
        assert read(*query) == ["hello", "1984", "007", "True"]


def test_separators_at_the_ends_of_lines(tmp_path):
    """pandas alone would take the ids for an index and the texts for ids."""
    write_files(tmp_path, {"a.csv": b"id,text\n1,one,\n2,two,\n"})
    assert read("files", str(tmp_path)) == ["one", "two"]


def test_a_dictionary_encoded_column_is_text(tmp_path):
    table = pyarrow.table({"text": pyarrow.array(["b", "a", "b", None]).dictionary_encode()})
    write_files(tmp_path, {"a.parquet": parquet_of(table)})
    assert read("files", str(tmp_path)) == ["b", "a", "b"]


def test_a_column_is_measured_behind_a_column_of_structs(tmp_path, monkeypatch):
    """A struct is several columns of the file; measuring the wrong one made a whole corpus a single part."""
    rows = [{"meta": {"a": 1, "b": 2, "c": 3}, "text": "".join(map(chr, range(n, n + 2000)))} for n in range(300, 320)]
    table = pyarrow.Table.from_pylist(rows)
    write_files(tmp_path, {"a.parquet": parquet_of(table, row_group_size=2, use_dictionary=False)})
    monkeypatch.setattr(readers, "PART_BYTES", 20_000)
    pieces = open_corpus("files", str(tmp_path)).pieces
    text_bytes = sum(len(row["text"].encode()) for row in rows)
    assert sum(piece.bytes for piece in pieces) == pytest.approx(text_bytes, rel=0.1)
    assert len(pieces) > 3 and all(piece.bytes <= 20_000 for piece in pieces)
    assert [text for piece in pieces for text in piece.texts()] == [row["text"] for row in rows]


UNREADABLE = {
    "other columns": (
        "a.jsonl",
        b'{"content": "x", "id": 1}\n',
        ["a.jsonl", "no column 'text' but content, id", "--text_column"],
    ),
    "other columns of parquet": (
        "a.parquet",
        parquet([{"content": "x", "id": 1}]),
        ["a.parquet", "content, id", "--text_column"],
    ),
    "lists": (
        "a.jsonl",
        b'["x"]\n',
        ['a.jsonl, row 1: ["x"] is not an object', "fix the row, or leave the file out"],
    ),
    "rows inside an object": (
        "a.json",
        b'{"version": 1, "data": [{"text": "x"}, {"text": "y"}]}',
        ["a.json is one object whose 'data' holds the rows; write them one a line, or", "README says `field: data`"],
    ),
    "columns of an object": (
        "a.json",
        b'{"text": ["x", "y"], "id": [1, 2]}',
        ["'text' holds list, not text; write each text as a row of its own"],
    ),
    "no columns": ("a.jsonl", b"{}\n{}\n", ["a.jsonl has rows without any column; fix the file"]),
    "another separator": ("a.csv", b"id;text\n1;x\n", ["a.csv is read as one column, 'id;text'", "README says `sep`"]),
    "numbers": ("a.jsonl", b'{"text": 3}\n', ["a.jsonl", "'text' holds int, not text"]),
    "mostly broken lines": (
        "a.jsonl",
        b'{"text": "x"}\n{"text": "y"\n{"text": "z"\n',
        ["a.jsonl: 2 lines are not JSON and 1 are", "the line at byte 14", "Expecting ',' delimiter", "fix the file"],
    ),
    "no UTF-8": ("a.jsonl", b'{"text": "x\xff"}\n', ["a.jsonl", "utf-8"]),
    "an unquoted separator": (
        "a.csv",
        b"id,text\n1,Hello, world\n2,Good, bye\n",
        ["a.csv: its rows have more fields than its header; quote texts that contain the separator"],
    ),
    "an unquoted tab": ("a.tsv", b"text\nHello\tworld\n", ["a.tsv: its rows have more fields than its header"]),
    "NUL at the start of a line": ("a.jsonl", b'{\0"text": "x"}\n', ["1 lines are not JSON", "line 1 column 2"]),
    "cut list": ("a.json", b'[{"text": "x"}, {"te', ["cannot read", "a.json", "fix the file"]),
    "two columns of text": (
        "a.parquet",
        parquet_of(pyarrow.table([["x"], ["y"]], names=["text", "text"])),
        ["a.parquet has two columns 'text'", "--text_column"],
    ),
    "no UTF-8 text": ("a.txt", b"abc\xff", ["a.txt", "'utf-8' codec can't decode byte 0xff in position 3"]),
    "no gzip": ("a.txt.gz", b"abc", ["a.txt.gz", "Not a gzipped file"]),
    "no parquet": ("a.parquet", b"abc", ["a.parquet", "Parquet"]),
    "pdf": ("a.pdf", b"%PDF", ["a.pdf", ".txt, .jsonl, .json or .parquet"]),
    "no text file": ("nothing/here.pdf", b"", ["nothing", ".txt, .jsonl, .json or .parquet", "1 of other formats"]),
    "a later number": (
        "a.jsonl",
        b'{"text": "x"}\n{"text": 3}\n',
        ["a.jsonl, row 2: column 'text' holds int, not text; fix the row, or leave the file out"],
    ),
    "zstd cut short": ("a.txt.zst", compressed(b"x" * 10**5, "zst")[:-4], ["a.txt.zst", "Truncated"]),
    "xz cut short": ("a.txt.xz", compressed(b"x" * 10**5, "xz")[:-4], ["a.txt.xz", "ended before"]),
}


@pytest.mark.parametrize("name, content, complaint", UNREADABLE.values(), ids=UNREADABLE)
def test_files_that_cannot_be_read(tmp_path, name, content, complaint):
    write_files(tmp_path, {name: content})
    line = mistake("files", str(tmp_path / name.split("/")[0]))
    assert [words for words in complaint if words not in line] == []


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.txt", "a.md.xz", "a.csv"])
def test_utf_16_is_named(tmp_path, name, encoding):
    content = f"\ufeff{json.dumps(ROWS[0])}\n{json.dumps(ROWS[1])}\n".encode(encoding)
    suffix = name.rpartition(".")[2]
    write_files(tmp_path, {name: compressed(content, suffix) if suffix in ("gz", "xz") else content})
    assert mistake("files", str(tmp_path)) == f"{tmp_path / name} is UTF-16, as PowerShell writes it; save it as UTF-8"


def test_files_need_a_source(tmp_path):
    assert "--source FILE_OR_FOLDER" in mistake("files")
    assert "missing does not exist" in mistake("files", str(tmp_path / "missing"))


def test_pipes_devices_and_links_that_lead_nowhere(tmp_path):
    folder = write_files(tmp_path / "src", {"a.txt": b"a", "b.txt": b"b"})
    os.mkfifo(folder / "pipe.txt")
    os.mkfifo(tmp_path / "elsewhere")
    links = {"loop": "loop", "there": "back", "back": "there", "null": os.devnull, "linked": tmp_path / "elsewhere"}
    for name, target in links.items():
        (folder / f"{name}.txt").symlink_to(f"{target}.txt" if target in links else target)
    corpus = open_corpus("files", str(folder))
    assert list(corpus.texts()) == ["a", "b"]
    assert {reason: sorted(names) for reason, names in corpus.left_out.items()} == {
        "broken links": ["back.txt", "loop.txt", "there.txt"],
        "no ordinary files": ["linked.txt", "null.txt", "pipe.txt"],
    }
    assert "pipe.txt is a pipe or device" in mistake("files", str(folder / "pipe.txt"))


# ---- the Hub ----


@pytest.fixture
def dataset(tmp_path):
    """A dataset repository in the Hub's layout: data files by split, and a card that lists configurations."""
    card = "---\nconfigs:\n- config_name: small\n  data_files: small/*.parquet\n- config_name: default\n  data_files:\n"
    card += "  - split: train\n    path: data/train-*\n  - split: test\n    path: data/test-*\n  default: true\n---\n"
    files = {
        "README.md": card.encode(),
        "small/a.parquet": parquet([{"text": "small"}]),
        "data/train-00000-of-00002.parquet": parquet(ROWS[:3]),
        "data/train-00001-of-00002.parquet": parquet(ROWS[3:]),
        "data/test-00000-of-00001.parquet": parquet([{"text": "test"}]),
    }
    return str(write_files(tmp_path / "dataset", files))


def test_a_dataset_in_the_hubs_format(dataset):
    corpus = open_corpus(dataset)
    assert list(corpus.texts()) == TEXTS == list(corpus.texts())
    assert corpus.facts["hub_id"] == dataset and corpus.facts["split"] == "train"
    assert read(dataset, split="test") == ["test"]
    assert read(dataset, hub_config="small") == ["small"]


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"split": "nosuch"}, "no split 'nosuch' but train, test; choose one with --split"),
        ({"split": "train[:50%]"}, "no split 'train[:50%]' but train, test; choose one with --split, and a part of"),
        ({"hub_config": "nosuch"}, "nosuch"),
        ({"text_column": "content"}, "no column 'content' but text; choose with --text_column"),
    ],
)
def test_a_missing_part_of_a_dataset_is_named(dataset, options, complaint):
    assert complaint in mistake(dataset, **options)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_empty_tables_of_a_dataset_are_left_out(tmp_path, suffix):
    content = {"jsonl": b'{"text": "x"}\n', "csv": b"text\nx\n"}[suffix]
    write_files(tmp_path, {f"{name}.{suffix}": content if name == "b" else b"" for name in "abc"})
    corpus = open_corpus(str(tmp_path))
    assert list(corpus.texts()) == ["x"]
    assert corpus.left_out == {"empty": [f"a.{suffix}", f"c.{suffix}"]}


def test_configurations_of_which_none_is_the_default(tmp_path):
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab")
    write_files(tmp_path, {"README.md": f"---\nconfigs:\n{configs}---\n".encode(), "a.jsonl": LINES, "b.jsonl": LINES})
    assert mistake(str(tmp_path)) == f"{tmp_path} has the configurations 'a', 'b'; choose one with --hub_config"


@pytest.mark.parametrize("split", ["nosuch", "train+test", "all"])
def test_a_missing_split_of_a_folder_without_a_readme(tmp_path, split):
    write_files(tmp_path, {"train.jsonl": LINES, "test.jsonl": LINES})
    assert f"no split {split!r} but train, test; choose one with --split" in mistake(str(tmp_path), split=split)


def test_an_unreachable_hub_is_one_line(run_script, tmp_path):
    command = ["prepare_data.py", "fineweb-edu", "--output_dir", tmp_path / "out"]
    process = run_script(*command, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    (line,) = process.stderr.splitlines()
    assert process.returncode == 2
    assert line.startswith("error: cannot read HuggingFaceFW/fineweb-edu: ") and "network" in line
    assert not (tmp_path / "out").exists()


def test_offline_mode_is_one_line(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert mistake("owner/dataset").startswith("cannot read owner/dataset: ")


def test_hub_corpora_of_the_recipes(monkeypatch):
    """Ids, configurations and splits are those of build-nanogpt's fineweb.py and nanoGPT's data/openwebtext."""
    seen = {}

    def record(query, split, boundary):
        seen[query.name] = (query.hub_config, query.split, query.revision, query.text_column, split.to_dict())

    monkeypatch.setattr(corpora, "_open_hub", record)
    for name in corpora.HUB_CORPORA:
        open_corpus(name)
    assert seen == {
        "HuggingFaceFW/fineweb-edu": ("sample-10BT", "train", None, "text", {"val_tokens": 100_000_000}),
        "HuggingFaceFW/fineweb": ("sample-10BT", "train", None, "text", {"val_tokens": 100_000_000}),
        "Skylion007/openwebtext": (None, "train", None, "text", {"val_fraction": 0.0005}),
        "Salesforce/wikitext": ("wikitext-103-raw-v1", "train", None, "text", {"val_fraction": 0.005}),
        "roneneldan/TinyStories": (None, "train", None, "text", {"val_fraction": 0.005}),
    }


def test_a_corpus_is_added_by_one_entry(dataset, monkeypatch):
    mine = corpora.Corpus([], {"origin": "mine"})
    monkeypatch.setitem(corpora.LOCAL_CORPORA, "mine", lambda query: mine)
    monkeypatch.setitem(corpora.HUB_CORPORA, "theirs", HubCorpus(dataset, "small"))
    assert open_corpus("mine") is mine
    assert read("theirs") == ["small"]
    assert mistake("minee").endswith("did you mean mine?")


@pytest.mark.parametrize(
    "name, hint",
    [
        ("fineweb-eduu", "did you mean fineweb-edu?"),
        ("pythondocs", "did you mean python-docs?"),
        ("shakespear", "did you mean shakespeare?"),
        ("zzzz", "use one of python-docs, shakespeare, "),
        ("README.md", "text of your own is `files --source README.md`"),
    ],
)
def test_an_unknown_corpus(name, hint, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert mistake(name).startswith(f"unknown corpus '{name}'; {hint}")


# ---- Tiny Shakespeare ----


def test_shakespeare_from_a_local_copy(shared):
    source = shared / "tinyshakespeare.txt"
    for name, tokenizer in (("shakespeare", "gpt2"), ("shakespeare-char", "char")):
        corpus = open_corpus(name, str(source))
        assert list(corpus.texts()) == [source.read_text()]
        assert corpus.single_text and corpus.default_tokenizer == tokenizer
        assert corpus.default_split == ValidationSplit(fraction=0.1)


@pytest.mark.parametrize("content", [b"", b"To be, or not to be"])
def test_another_text_is_not_shakespeare(tmp_path, content):
    write_files(tmp_path, {"a.txt": content})
    line = mistake("shakespeare", str(tmp_path / "a.txt"))
    assert "is not Tiny Shakespeare" in line and "sha256" in line and "`files`" in line


def test_unavailable_shakespeare_names_the_remedy(tmp_path, monkeypatch):
    assert "--source FILE" in mistake("shakespeare", str(tmp_path / "missing.txt"))
    monkeypatch.setattr(built_in, "SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")
    line = mistake("shakespeare-char")
    assert "http://127.0.0.1:9/input.txt" in line and "--source FILE" in line
