"""No text is lost in silence: a dataset is read as `datasets.load_dataset` reads it, a folder of files whole, and what
is left out is named and counted."""

import json
import pickle
import shutil

import datasets
import pyarrow
import pytest
from preparer import manifest_of
from support import refusal
from test_corpora import compressed, mistake, open_corpus, parquet, parquet_of, read, write_files

import prepare_data
from gpt2repro.prepare import readers
from gpt2repro.prepare.corpora import HUB_CORPORA
from gpt2repro.prepare.local_files import describe_left_out
from gpt2repro.prepare.prepared import Unfinished


pytestmark = pytest.mark.slow  # every case is prepared whole, beside load_dataset

TEXTS = [f'document {number}; it\'s "quoted", with\ttabs | pipes' for number in range(12)]
ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]


def card(**options):
    config = {"config_name": "default", **options}
    return f"---\nconfigs:\n- {json.dumps(config)}\n---\n".encode()


def table(separator, header="id{}text\n"):
    quoted = [text.replace('"', '""') for text in TEXTS]
    rows = [f'{number}{separator}"{text}"\n' for number, text in enumerate(quoted)]
    return (header.format(separator) + "".join(rows)).encode()


# ---- datasets ----

LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PARAGRAPHS = "\n\n".join(f"{text}\nsecond line" for text in TEXTS).encode()
FEATURES = {"features": [{"name": "id", "dtype": "string"}, {"name": "text", "dtype": "string"}]}
DATASETS = {
    "tsv": {"train.tsv": table("\t")},
    "csv": {"train.csv": table(",")},
    "csv.gz": {"train.csv.gz": compressed(table(","), "gz")},
    "two files of csv": {"train-0.csv": table(","), "train-1.csv": table(",")},
    "sep": {"README.md": card(data_files="a.csv", sep="|"), "a.csv": table("|")},
    "names without a header": {
        "README.md": card(data_files="a.csv", header=None, names=["id", "text"]),
        "a.csv": table(",", header=""),
    },
    "skiprows": {"README.md": card(data_files="a.csv", skiprows=2), "a.csv": b"about\nit\n" + table(",")},
    "field": {
        "README.md": card(data_files="a.json", field="data"),
        "a.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    },
    "sample_by paragraph": {"README.md": card(data_files="a.txt", sample_by="paragraph"), "a.txt": PARAGRAPHS},
    "sample_by document": {"README.md": card(data_files="a.txt", sample_by="document"), "a.txt": PARAGRAPHS},
    "lines": {"a.txt": PARAGRAPHS},
    "filters": {"README.md": card(data_files="a.parquet", filters=[["id", ">", 5]]), "a.parquet": parquet(ROWS)},
    "brackets": {"train [1].jsonl": LINES, "train [ab].jsonl": LINES},
    "null": {"train-0.jsonl": LINES, "train-1.jsonl": b'{"id": 1, "text": null}\n{"id": 2, "text": null}\n'},
    "objects": {f"{number}.json": json.dumps(row, indent=2).encode() for number, row in enumerate(ROWS)},
}


@pytest.mark.parametrize("files", DATASETS.values(), ids=DATASETS)
def test_a_dataset_is_read_as_load_dataset_reads_it(tmp_path, files):
    folder = str(write_files(tmp_path / "ds", files))
    expected = [row["text"] for row in datasets.load_dataset(folder, split="train", streaming=True)]
    corpus = open_corpus(folder)
    assert list(corpus.texts()) == [text for text in expected if text is not None]
    assert expected
    again = pickle.loads(pickle.dumps(corpus.pieces))  # as another process gets them
    assert [text for piece in again for text in piece.texts()] == list(corpus.texts())


def test_many_small_tables_are_one_part(tmp_path, capsys):
    files = {f"train-{number:03}.csv": table(",") for number in range(60)}
    folder = write_files(tmp_path / "ds", files)
    corpus = open_corpus(str(folder))
    assert len(corpus.parts()) == 1 and sum(piece.bytes for piece in corpus.pieces) == 60 * len(table(","))
    prepare(folder, tmp_path / "out", "--val_fraction", 0.2)
    assert "needs about 0.0 GB" in capsys.readouterr().out
    assert manifest_of(tmp_path / "out")["splits"]["train"]["shards"][1:] == []


def test_the_size_of_a_compressed_table_is_estimated(tmp_path):
    packed = compressed(table(",") * 50, "xz")
    (piece,) = open_corpus("files", str(write_files(tmp_path, {"a.csv.xz": packed}))).pieces
    assert piece.bytes == len(packed) * readers.COMPRESSION_RATIO


def test_lines_as_documents_are_said(tmp_path, capsys):
    folder = write_files(tmp_path / "ds", {f"{name}.txt": PARAGRAPHS for name in "abc"})
    prepare(folder, tmp_path / "out", "--val_fraction", 0.2)
    printed = capsys.readouterr().out
    assert "each line of its text files is a document" in printed
    assert f"`files --source {folder}`" in printed and "--document_separator" in printed
    prepare("files", tmp_path / "whole", "--source", folder, "--val_fraction", 0.5, "--document_separator", "blank")
    assert "each line" not in capsys.readouterr().out


def test_a_missing_zstandard_is_named(tmp_path, monkeypatch):
    folder = write_files(tmp_path / "ds", {"a.jsonl.zst": compressed(LINES, "zst")})
    monkeypatch.setattr(readers.importlib.util, "find_spec", lambda name: None)
    assert mistake(str(folder)).endswith(
        'a.jsonl.zst: `datasets` needs zstandard to read it; pip install "gpt2repro[zstd]"'
    )


def prepare(corpus, output_dir, *args):
    prepare_data.main([str(arg) for arg in (corpus, "--output_dir", output_dir, *args)])


# ---- documents of several lines ----


def test_wikitext_is_articles(tmp_path):
    """Titles have one equals sign and stand after a blank line; sections have more."""
    rows = ["", " = First = \n", "", " One paragraph . \n", "", " = = Section = = \n", "", " x \n", " = 2 = \n"]
    rows += ["", " = Second = Title = \n", "", " Another . \n"]
    folder = write_files(tmp_path / "ds", {"a.parquet": parquet([{"text": row} for row in rows])})
    corpus = open_corpus(str(folder))
    boundary = HUB_CORPORA["wikitext-103"].boundary
    assert [text for text, _ in boundary.documents(corpus.texts(), str)] == [
        " = First = \n\n One paragraph . \n\n = = Section = = \n\n x \n = 2 = ",
        " = Second = Title = \n\n Another . ",
    ]


SEPARATED = {
    "<|endoftext|>": ["one\ntwo<|endoftext|>three\n", "<|endoftext|>\nfour\n\nfive\n<|endoftext|>\n"],
    "blank": ["one\ntwo\n \t\nthree\n\n\n\nfour\r\n\r\nfive", ""],
}
SEPARATE_TEXTS = {
    "<|endoftext|>": ["one\ntwo", "three", "four\n\nfive"],
    "blank": ["one\ntwo", "three", "four", "five"],
}


@pytest.mark.parametrize("separator", SEPARATED)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_text_file_of_many_documents(tmp_path, separator, suffix):
    text = ("\ufeff" + "".join(SEPARATED[separator])).encode()
    write_files(tmp_path, {f"a.txt{suffix}": compressed(text, suffix[1:]) if suffix else text})
    corpus = open_corpus("files", str(tmp_path / f"a.txt{suffix}"), document_separator=separator)
    assert list(corpus.texts()) == SEPARATE_TEXTS[separator]
    assert not corpus.single_text


def test_lines_of_a_dataset_are_joined(tmp_path):
    folder = write_files(tmp_path / "ds", {"a.txt": b"one\ntwo\n\nthree", "b.txt": b"four"})
    assert read(str(folder), document_separator="blank") == ["one\ntwo", "three", "four"]


@pytest.mark.parametrize("separator", ["", "\n\n", "\\n\\n"])
def test_separators_that_cannot_be(tmp_path, separator):
    (tmp_path / "a.txt").write_text("x")
    assert "blank for blank lines" in mistake("files", str(tmp_path), document_separator=separator)
    assert "leave it out" in mistake("python-docs", document_separator="blank")


def test_a_separator_asked_for_later_is_another_preparation(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree\n\n" * 9)
    prepare("files", tmp_path / "out", "--source", tmp_path / "a.txt")
    with pytest.raises(prepare_data.UserError, match="other settings .document_separator."):
        prepare("files", tmp_path / "out", "--source", tmp_path / "a.txt", "--document_separator", "blank")


# ---- folders of files ----


def test_every_format_of_a_folder_is_read(tmp_path):
    line = b'{"text": "%s"}\n'
    files = {
        "a.csv": b"text\ncsv\n",
        "b.tsv": b"id\ttext\n1\ttsv, tabs\n",
        "c.txt": b"txt",
        "d.ndjson": line % b"ndjson",
    }
    files |= {"e [1].csv": b"text\nbrackets\n", "f.json": json.dumps({"text": "object"}, indent=1).encode()}
    for suffix in ("gz", "bz2", "xz", "zst"):
        files[f"{suffix}.jsonl.{suffix}"] = compressed(line % suffix.encode(), suffix)
        files[f"{suffix}.txt.{suffix}"] = compressed(suffix.encode() + b" text", suffix)
    folder = write_files(tmp_path / "src", files)
    corpus = open_corpus("files", str(folder))
    assert sorted(corpus.texts()) == sorted(
        ["csv", "tsv, tabs", "txt", "ndjson", "brackets", "object"]
        + ["gz", "bz2", "xz", "zst", "gz text", "bz2 text", "xz text", "zst text"]
    )
    assert corpus.left_out == {}


def test_markdown_is_text_among_texts_and_a_note_beside_tables(tmp_path):
    folder = write_files(tmp_path / "src", {"a.md": b"# A", "b.txt": b"b", "c.md.xz": compressed(b"c", "xz")})
    assert read("files", str(folder)) == ["# A", "b", "c"]
    write_files(folder, {"d.jsonl": b'{"text": "d"}\n'})
    corpus = open_corpus("files", str(folder))
    assert list(corpus.texts()) == ["b", "d"]
    assert corpus.left_out == {"Markdown beside tables": ["a.md", "c.md.xz"]}


def test_all_frames_of_a_zst_file_are_read(tmp_path):
    """As `zstd` appends and as `pzstd` writes."""
    frames = [compressed(json.dumps(row).encode() + b"\n", "zst") for row in ROWS]
    assert read("files", str(write_files(tmp_path, {"a.jsonl.zst": b"".join(frames)}))) == TEXTS


def test_what_is_left_out_is_said_and_counted(tmp_path, capsys):
    files = {f"{number}.txt": b"text %d" % number for number in range(9)}
    hidden = {".cache/huggingface/old.jsonl": b"{}", ".ipynb_checkpoints/a.txt": b"x", "a/.DS_Store": b""}
    other = {"a.pdf": b"", "b.zip": b"", "README.md": b"# Data", "a/README.md": b"a chapter"}
    folder = write_files(tmp_path / "src", files | hidden | other)
    prepare("files", tmp_path / "out", "--source", folder, "--val_fraction", 0.5)
    assert capsys.readouterr().out.splitlines()[0] == (
        "left out 6 files: 3 hidden (.cache/huggingface/old.jsonl, .ipynb_checkpoints/a.txt, a/.DS_Store); "
        "2 of other formats (a.pdf, b.zip); 1 README (README.md)"
    )
    recorded = manifest_of(tmp_path / "out")
    assert recorded["left_out_files"] == {"hidden": 3, "of other formats": 2, "README": 1}
    assert sum(split["documents"] for split in recorded["splits"].values()) == 10


def test_a_mixed_dataset_names_what_its_builder_leaves_out(tmp_path):
    files = {"a.jsonl": LINES, "b.jsonl": LINES, "c.csv": table(","), "README.md": b"about"}
    corpus = open_corpus(str(write_files(tmp_path / "ds", files)))
    assert corpus.left_out == {"that are not data files of the dataset": ["c.csv"]}
    assert describe_left_out(corpus.left_out) == "left out 1 file: 1 that are not data files of the dataset (c.csv)"


def test_links_are_followed_once(tmp_path):
    folder = write_files(tmp_path / "src", {"2020/a.txt": b"2020", "z.txt": b"z"})
    write_files(tmp_path / "elsewhere", {"2021/b.txt": b"2021", "one.txt": b"one"})
    links = {
        "2021": "../elsewhere/2021",
        "again": "../elsewhere/2021",
        "2020/loop": "..",
        "up": "../..",
        "a-copy": "2020",
        "linked.txt": "../elsewhere/one.txt",
        "broken.txt": "nowhere.txt",
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (tmp_path / "elsewhere/2021/back").symlink_to(folder)
    corpus = open_corpus("files", str(folder))
    assert list(corpus.texts()) == ["2020", "2021", "one", "z"]
    assert {reason: sorted(names) for reason, names in corpus.left_out.items()} == {
        "links to what is read already": ["2020/loop", "2021/back", "a-copy", "again", "up"],
        "broken links": ["broken.txt"],
    }


def test_a_saved_dataset_is_read_without_its_records(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved" / "cache", ignore_errors=True)
    corpus = open_corpus("files", str(tmp_path / "saved"))
    assert list(corpus.texts()) == TEXTS
    assert sorted(corpus.left_out["records of `datasets`"]) == ["dataset_info.json", "state.json"]


# ---- rows ----


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.md", "a.csv", "ds/a.txt"])
def test_a_byte_order_mark_is_dropped(tmp_path, name):
    content = {"jsonl": b'{"text": "x"}\n', "json": b'[{"text": "x"}]', "csv": b"text\nx\n"}.get(
        name.split(".")[1], b"x"
    )
    write_files(tmp_path, {name: b"\xef\xbb\xbf" + content})
    query = (str(tmp_path / "ds"),) if name.startswith("ds/") else ("files", str(tmp_path))
    assert read(*query) == ["x"]


def test_nan_is_no_text(tmp_path):
    files = {"a.jsonl": b'{"text": "x"}\n{"text": NaN}\n', "b.json": b'[{"text": NaN}, {"text": "y"}]'}
    corpus = open_corpus("files", str(write_files(tmp_path, files | {"c.csv": b"text,id\n,1\nz,2\n"})))
    assert list(corpus.texts()) == ["x", "y", "z"]
    notes = [document.note for piece in corpus.pieces for document in piece.documents()]
    assert notes == ["", "no text", "no text", "", "no text", ""]


def test_a_column_of_nulls_is_empty(tmp_path):
    nothing = pyarrow.table({"text": pyarrow.nulls(3), "id": [1, 2, 3]})
    files = {"a.parquet": parquet_of(nothing), "b.parquet": parquet(ROWS), "c.csv": b"text,id\n,1\n,2\n"}
    corpus = open_corpus("files", str(write_files(tmp_path, files)))
    assert list(corpus.texts()) == TEXTS
    documents = [document for piece in corpus.pieces for document in piece.documents()]
    assert sum(document.note == "no text" for document in documents) == 5


@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_of_one_object(tmp_path, indent):
    files = {f"{number:02}.json": json.dumps(row, indent=indent).encode() for number, row in enumerate(ROWS)}
    assert read("files", str(write_files(tmp_path, files))) == TEXTS


def test_parts_of_tables_from_an_older_version_are_not_continued(tmp_path):
    """It made each table a part; today small ones share one."""
    (tmp_path / "ds").mkdir()
    for name in ("a", "b"):
        (tmp_path / "ds" / f"{name}.csv").write_text("text\n" + "".join(f"row {name} {i}\n" for i in range(40)))
    command = [tmp_path / "ds", tmp_path / "out", "--tokenizer", "bpe:300", "--val_fraction", 0.2]
    prepare(*command)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (tmp_path / "out" / "manifest.json").unlink()
    settings = {key: value for key, value in manifest["settings"].items() if key != "special_tokens"}
    facts = {key: value for key, value in manifest["corpus"].items() if key != "name"}
    modified = [path.stat().st_mtime_ns for path in sorted((tmp_path / "ds").iterdir())]
    Unfinished(settings, facts, modified).write(tmp_path / "out" / "preparing.json")
    prepare(*command)  # no part was finished
    (tmp_path / "out" / "manifest.json").unlink()
    Unfinished(settings, facts, modified).write(tmp_path / "out" / "preparing.json")
    (tmp_path / "out" / "parts").mkdir()
    (tmp_path / "out" / "parts" / "part_00000.json").write_text("{}")
    assert "was started by an older version, which divided tables into other parts" in refusal(
        command[0], "--output_dir", *command[1:]
    )
