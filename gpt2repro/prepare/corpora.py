"""Corpora: where documents come from. A corpus is a list of parts, which processes read independently of each other,
and the facts that its manifest records."""

import ast
import difflib
import gzip
import json
import os
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from gpt2repro.errors import UserError, first_line


SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

HUB_CORPORA = {  # name -> Hub id, configuration
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT"),
    "openwebtext": ("Skylion007/openwebtext", None),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "tinystories": ("roneneldan/TinyStories", None),
}
DEFAULT_SPLITS = {  # of build-nanogpt and llm.c, nanoGPT; the last two have validation sets of their own on the Hub
    "fineweb-edu": {"val_tokens": 100_000_000},
    "fineweb": {"val_tokens": 100_000_000},
    "openwebtext": {"val_fraction": 0.0005},
    "wikitext-103": {"val_fraction": 0.005},
    "tinystories": {"val_fraction": 0.005},
}
LOCAL_CORPORA = ("python-docs", "shakespeare", "shakespeare-char", "files")
SUFFIXES = {".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet"}
PART_BYTES = 400_000_000  # of text in a part: some 90 million tokens, two minutes of work, which a failure costs
ATTEMPTS = 6  # at what the network fails at
FIRST_DELAY = 1.0  # seconds before the second attempt; it doubles with each
SKIPPED = ("no text", "no JSON")  # rows that are left out and counted: null, and lines that cannot be read
NOTES = ("repaired", *SKIPPED)  # of documents, which are counted


class Document(NamedTuple):
    """A row of a corpus.

    text: can be written in UTF-8; None where the row is left out.
    url: of its page, if it has one.
    note: one of NOTES, "repaired" where U+FFFD stands for halves of surrogate pairs; or "".
    """

    text: str | None
    url: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Piece:
    """A stretch of one file.

    reader: name of the function in READERS that turns it into texts.
    path: the file: local, or a URL that fsspec opens (hf://datasets/...).
    bytes: of its text, or an estimate of them.
    start, stop: row groups of a parquet file, or bytes of a .jsonl file; None: the whole file.
    column: of the texts, in tables.
    builder: of datasets, for formats that it reads.
    url_column: of the documents' URLs, for whoever wants them.
    """

    reader: str
    path: str = ""
    bytes: int = 0
    start: int | None = None
    stop: int | None = None
    column: str = "text"
    builder: str = ""
    url_column: str | None = None

    def rows(self) -> Iterator[dict | None]:
        """The rows as they are, of parquet the columns that are asked for; None for a line that cannot be read."""
        return READERS[self.reader](self)

    def documents(self) -> Iterator[Document]:
        """A document for each row.

        Raises:
            UserError: no such column, or something else than text in it; or most lines cannot be read.
        """
        for row in self.rows():
            if row is None:
                yield Document(None, note="no JSON")
                continue
            text = _column(self, row)
            if text is None:
                yield Document(None, note="no text")
                continue
            if not isinstance(text, str):
                raise UserError(
                    f"{self.path}: column {self.column!r} holds {type(text).__name__}, not text; choose with "
                    "--text_column"
                )
            url, repaired = row.get(self.url_column), encodable(text)
            url = url if isinstance(url, str) and url.strip() else None
            yield Document(repaired, url, "" if repaired is text else "repaired")

    def texts(self) -> Iterator[str]:
        return (document.text for document in self.documents() if document.text is not None)


def encodable(text: str) -> str:
    """The text itself; or with U+FFFD for halves of surrogate pairs, which UTF-8 cannot hold, as tiktoken does it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@dataclass(frozen=True)
class Corpus:
    """Documents and what is known of them.

    pieces: the files in their order, cut where they can be cut.
    facts: what the manifest records of the origin (Hub id, configuration, commit; or files and their sizes).
    modified: when its local files were changed, in nanoseconds since 1970: a preparation that goes on must find the
        same, a copy of the data has others.
    single_text: the corpus is one long text, which is split for validation by position, not by document.
    default_split: val_tokens or val_fraction where the user asks for neither, as the best-known recipe on it has it.
    default_tokenizer: as build_tokenizer names it.
    """

    pieces: list[Piece]
    facts: dict
    single_text: bool = False
    default_split: dict = field(default_factory=lambda: {"val_fraction": 0.005})
    default_tokenizer: str = "gpt2"
    modified: list[int] = field(default_factory=list)

    def texts(self) -> Iterator[str]:
        """All texts, in order; every call starts a fresh pass."""
        return chain.from_iterable(piece.texts() for piece in self.pieces)

    def parts(self) -> list[tuple[Piece, ...]]:
        """Neighbouring pieces put together until a part has about PART_BYTES of text; the division is a function of
        the corpus alone, whoever works on it."""
        parts: list[list[Piece]] = [[]]
        size = 0
        for piece in self.pieces:
            if parts[-1] and size + piece.bytes > PART_BYTES:
                parts.append([])
                size = 0
            parts[-1].append(piece)
            size += piece.bytes
        return [tuple(part) for part in parts]


def open_corpus(
    name: str,
    source: str | None = None,
    text_column: str = "text",
    hub_config: str | None = None,
    split: str = "train",
    revision: str | None = None,
) -> Corpus:
    """The corpus of that name; nothing large is read yet.

    Args:
        name: one of LOCAL_CORPORA or HUB_CORPORA, or a dataset's Hub id (or local folder in the Hub's format).
        source: for `files`, a file or folder; for shakespeare, a local copy of the text.
        text_column: the column of documents in tables.
        hub_config, split, revision: which part of a Hub dataset.
    Raises:
        UserError: unknown name, missing source, unreadable or unreachable data.
    """
    if name == "python-docs":
        facts = {"python": sys.version.split()[0]}
        return Corpus([Piece("python-docs")], facts, False, {"val_fraction": 0.1}, "bpe:2048")
    if name in ("shakespeare", "shakespeare-char"):
        _shakespeare(source)  # whether it can be had
        tokenizer = "char" if name == "shakespeare-char" else "gpt2"
        facts = {"url": SHAKESPEARE_URL, "sha256": SHAKESPEARE_SHA256}
        return Corpus([Piece("shakespeare", source or "")], facts, True, {"val_fraction": 0.1}, tokenizer)
    if name == "files":
        return _files(source, text_column)
    if name in HUB_CORPORA:
        hub_id, default_config = HUB_CORPORA[name]
        return _hub(hub_id, hub_config or default_config, split, revision, text_column, DEFAULT_SPLITS[name])
    if "/" in name or Path(name).is_dir():
        return _hub(name, hub_config, split, revision, text_column, {"val_fraction": 0.005})
    known = [*LOCAL_CORPORA, *HUB_CORPORA]
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = (
        f"did you mean {nearest[0]}?" if nearest else f"use one of {', '.join(known)}, or a Hub id such as owner/name"
    )
    raise UserError(f"unknown corpus {name!r}; {hint}")


# ---- the text that every CPython carries ----


def python_docs() -> Iterator[str]:
    """The language reference (pydoc_data.topics), then the documentation strings of each standard library module, laid
    out as pydoc does. The order is fixed: topics by name, then modules by path."""
    from pydoc_data.topics import topics  # half a megabyte that only this corpus needs

    for name in sorted(topics):
        yield topics[name].strip() + "\n"
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()):
        parts = path.relative_to(library).with_suffix("").parts
        if skipped.isdisjoint(parts) and (text := _module_docs(".".join(parts).removesuffix(".__init__"), path)):
            yield text


def _module_docs(name: str, path: Path) -> str | None:
    """The documented classes and functions of a module, or None where nothing is documented."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # some files of the library are broken on purpose
        return None
    lines = [f"Module {name}", ""]
    if doc := ast.get_docstring(tree):
        lines += [doc, ""]
    entries = list(_entries(tree, indent=""))
    return "\n".join(lines + entries).rstrip() + "\n" if doc or entries else None


def _entries(node: ast.AST, indent: str) -> Iterator[str]:
    for child in getattr(node, "body", []):
        if isinstance(child, ast.ClassDef):
            bases = ", ".join(map(ast.unparse, child.bases))
            signature = f"class {child.name}({bases})" if bases else f"class {child.name}"
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            signature = f"{child.name}({ast.unparse(child.args)})"
        else:
            continue
        doc = ast.get_docstring(child)
        members = list(_entries(child, indent + "    ")) if isinstance(child, ast.ClassDef) else []
        if doc or members:
            yield indent + signature
            yield from (f"{indent}    {line}".rstrip() for line in (doc or "").splitlines())
            yield ""
            yield from members


# ---- Tiny Shakespeare ----


def _shakespeare(source: str | None) -> str:
    """Tiny Shakespeare's text, from a local copy or by download; its hash is checked either way."""
    try:
        if source:
            data = Path(source).read_bytes()
        else:
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=60) as response:
                data = response.read()
    except OSError as error:
        raise UserError(
            f"cannot read Tiny Shakespeare from {source or SHAKESPEARE_URL} ({error}); "
            "give a local copy of the file with --source FILE"
        ) from error
    if sha256(data).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(
            f"{source or SHAKESPEARE_URL} is not Tiny Shakespeare: its sha256 is not {SHAKESPEARE_SHA256}; "
            "to prepare another text use the corpus `files`"
        )
    return data.decode()


# ---- local files and the Hub ----


def _files(source: str | None, text_column: str) -> Corpus:
    if source is None:
        raise UserError("the corpus `files` needs --source FILE_OR_FOLDER")
    root = Path(source)
    if not root.exists():
        raise UserError(f"--source {source} does not exist")
    candidates = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]
    files = [path for path in candidates if _suffix(path) in SUFFIXES]
    if not files:
        raise UserError(
            f"--source {source} holds no file that ends in .txt, .jsonl, .json or .parquet (or the first three + .gz)"
        )

    pieces = [piece for path in files for piece in _pieces_of_file(path, text_column)]
    single_text = len(files) == 1 and pieces != [] and pieces[0].reader == "text"
    split = {"val_fraction": 0.1 if single_text else 0.005}
    facts, modified = _facts_of_files(files, root if root.is_dir() else root.parent)
    return Corpus(pieces, facts, single_text, split, modified=modified)


def _facts_of_files(files: list[Path], root: Path) -> tuple[dict, list[int]]:
    """What Corpus has as facts, and as modified."""
    found = [(os.path.relpath(path, root), path.stat()) for path in files]
    facts = {"files": [{"name": Path(name).as_posix(), "bytes": stat.st_size} for name, stat in found]}
    return facts, [stat.st_mtime_ns for _, stat in found]


def _suffix(path: Path) -> str:
    """The suffix that tells the format, `.json.gz` of a.json.gz."""
    return "".join(path.suffixes[-2 if path.suffix.lower() == ".gz" else -1 :]).lower()


def _pieces_of_file(path: Path, column: str) -> list[Piece]:
    suffix, size = _suffix(path), path.stat().st_size
    compressed = suffix.endswith(".gz")
    if suffix == ".parquet":
        return _row_groups(str(path), column) if size else []
    if suffix.startswith(".txt"):
        return [Piece("text", str(path), size * (4 if compressed else 1))]
    if suffix.startswith(".json") and not suffix.startswith(".jsonl") and _reading(str(path), _is_json_list, path):
        return [Piece("json list", str(path), size * (4 if compressed else 1), column=column)]
    if compressed:
        return [Piece("json lines", str(path), size * 4, column=column)]
    cuts = [*range(0, max(size, 1), PART_BYTES), size]
    return [Piece("json lines", str(path), b - a, a, b, column) for a, b in zip(cuts, cuts[1:])]


def _open_bytes(path: Path):
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")


def _is_json_list(path: Path) -> bool:
    with _open_bytes(path) as file:
        return file.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")


def _hub(hub_id, config, split, revision, column, default_split) -> Corpus:
    import datasets
    from huggingface_hub import HfApi

    local = Path(hub_id).is_dir()
    if local and revision:
        raise UserError(f"--revision {revision}: {hub_id} is a folder, which has no revisions; leave it out")
    if not local:  # pin the commit, so that the manifest says exactly what was read
        revision = _reading(hub_id, HfApi().dataset_info, hub_id, revision=revision, remedy=HUB_REMEDY).sha
    builder = _reading(hub_id, datasets.load_dataset_builder, hub_id, config, revision=revision, remedy=HUB_REMEDY)
    files = builder.config.data_files or {}
    if split not in files:
        raise UserError(f"{hub_id} has no split {split!r} but {', '.join(files)}; choose with --split")
    kind = type(builder).__module__.split(".")[-1]  # of datasets.packaged_modules
    if kind == "parquet":
        with ThreadPoolExecutor(16) as pool:  # the footer of each file says where it can be cut
            cut = pool.map(lambda path: with_attempts(_row_groups, path, column), files[split])
            pieces = list(chain.from_iterable(cut))
    else:
        pieces = [Piece("table", path, PART_BYTES, column=column, builder=kind) for path in files[split]]
    facts = {"hub_id": hub_id, "config": config, "split": split, "revision": revision, "text_column": column}
    of_files, modified = _facts_of_files([Path(path) for path in files[split]], Path(hub_id)) if local else ({}, [])
    return Corpus(pieces, facts | of_files, False, default_split, modified=modified)


def _row_groups(path: str, column: str) -> list[Piece]:
    """A parquet file cut between row groups into pieces of about PART_BYTES."""
    with _reading(path, _open_parquet, path) as file:
        _check_column(path, column, file.schema_arrow)
        if not file.metadata.num_rows:
            return []
        leaves = [file.schema.column(i).path for i in range(len(file.schema))]  # a column of structs is several
        index = leaves.index(column)
        sizes = [file.metadata.row_group(i).column(index).total_uncompressed_size for i in range(file.num_row_groups)]
    cuts, filled = [0], 0
    for group, size in enumerate(sizes):
        if filled and filled + size > PART_BYTES:
            cuts.append(group)
            filled = 0
        filled += size
    cuts.append(len(sizes))
    return [Piece("parquet", path, sum(sizes[a:b]), a, b, column) for a, b in zip(cuts, cuts[1:]) if a < b]


def _open_parquet(path: str):
    import fsspec
    import pyarrow.parquet

    if "://" in path:  # few and large requests
        return pyarrow.parquet.ParquetFile(fsspec.open(path, "rb").open(), pre_buffer=True)
    # Not a whole row group at once, which may be a gigabyte. And without Python in between: Ctrl-C there would be lost,
    # or taken for a file that was closed.
    return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20)


def _check_column(path: str, column: str, schema, flag: str = "--text_column") -> None:
    from pyarrow import types

    if schema.names.count(column) != 1:
        number = "two columns" if column in schema.names else "no column"
        raise UserError(f"{path} has {number} {column!r} but {', '.join(schema.names)}; choose with {flag}")
    kind = schema.field(column).type
    values = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(values) or types.is_large_string(values) or types.is_string_view(values)):
        raise UserError(f"{path}: column {column!r} holds {kind}, not text; choose with {flag}")


# ---- readers of pieces ----

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def _read_text(piece: Piece) -> Iterator[dict]:
    def read() -> str:
        with _open_bytes(Path(piece.path)) as file:
            return file.read().decode()

    yield {piece.column: _reading(piece.path, read)}


def _read_parquet(piece: Piece) -> Iterator[dict]:
    columns = [piece.column] + ([piece.url_column] if piece.url_column else [])
    with _reading(piece.path, _open_parquet, piece.path) as file:
        for column, flag in zip(columns, ("--text_column", "--url_column")):
            _check_column(piece.path, column, file.schema_arrow, flag)
        groups = range(file.num_row_groups)[piece.start : piece.stop]
        batches = file.iter_batches(256, row_groups=groups, columns=columns, use_threads=False)
        while (batch := _reading(piece.path, next, batches, None)) is not None:
            for values in zip(*(batch.column(column).to_pylist() for column in columns)):
                yield dict(zip(columns, values))


def _read_json_lines(piece: Piece) -> Iterator[dict | None]:
    """The lines that begin in the piece's bytes; a line that reaches over its end belongs to it."""
    read, broken, complaint = 0, 0, ""
    with _reading(piece.path, _open_bytes, Path(piece.path)) as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()  # the rest of a line that began before
        while piece.stop is None or file.tell() < piece.stop:
            where = f"the line at byte {file.tell():,}"
            line = _reading(f"{piece.path}, {where}", file.readline)
            if not line:
                break
            if not (line := line.removeprefix(BYTE_ORDER_MARK)).strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                row, broken, complaint = None, broken + 1, complaint or f"{where}: {first_line(error)}"
            else:
                read += 1
            yield row
    if broken > read:  # a damaged file, or of another format
        raise UserError(
            f"{piece.path}: {broken:,} lines are no JSON and {read:,} are ({complaint}); mend the file, or leave it out"
        )


def _read_json_list(piece: Piece) -> Iterator[dict]:
    def read() -> list:
        with _open_bytes(Path(piece.path)) as file:
            return json.loads(file.read().removeprefix(BYTE_ORDER_MARK))

    yield from _reading(piece.path, read)


def _read_table(piece: Piece) -> Iterator[dict]:
    import datasets

    rows = _reading(
        piece.path, datasets.load_dataset, piece.builder, data_files=piece.path, split="train", streaming=True
    )
    iterator = iter(rows)
    while (row := _reading(piece.path, next, iterator, None)) is not None:
        yield row


def _column(piece: Piece, row: object) -> object:
    if not isinstance(row, dict) or piece.column not in row:
        names = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise UserError(f"{piece.path} has no column {piece.column!r} but {names}; choose with --text_column")
    return row[piece.column]


READERS: dict[str, Callable[[Piece], Iterator[dict | None]]] = {
    "python-docs": lambda piece: ({piece.column: text} for text in python_docs()),
    "shakespeare": lambda piece: iter([{piece.column: _shakespeare(piece.path)}]),
    "text": _read_text,
    "json lines": _read_json_lines,
    "json list": _read_json_list,
    "parquet": _read_parquet,
    "table": _read_table,
}


# ---- what may fail ----

HUB_REMEDY = (
    "check the name, --hub_config, --split, --revision and the network (a folder that holds a copy of the data does as "
    "well)"
)


class SourceError(UserError):
    """A remote source could not be read, which may pass."""


def _reading(origin: str, function: Callable, *args, remedy: str = "mend the file, or leave it out", **kwargs):
    """Call a reader of somebody else's data; whatever it raises becomes one line that names the origin."""
    try:
        return function(*args, **kwargs)
    except Exception as error:  # network, Hub, format and configuration errors share no base class
        kind, remedy = (SourceError, HUB_REMEDY) if "://" in origin else (UserError, remedy)
        raise kind(f"cannot read {origin}: {first_line(error)}; {remedy}") from error


def with_attempts(function: Callable, *args):
    """Call it, again with growing pauses where a remote source fails for reasons that may pass.

    Raises:
        UserError: it still failed.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return function(*args)
        except SourceError as error:
            if attempt == ATTEMPTS:
                raise UserError(
                    f"{error}; tried {ATTEMPTS} times. Finished parts are kept: repeat the command"
                ) from error
            time.sleep(FIRST_DELAY * 2 ** (attempt - 1))
    raise AssertionError
