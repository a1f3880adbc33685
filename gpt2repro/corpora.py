"""Corpora: where documents come from. A corpus is a list of parts, which processes read independently of each other,
and the facts that its manifest records."""

import ast
import difflib
import glob
import gzip
import json
import sys
import sysconfig
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain
from pathlib import Path

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
TEXT_SUFFIXES = {".txt"}
TABLE_SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # suffix -> builder of datasets


PART_BYTES = 2**28  # of text in a part: a minute of tokenizing, which is what a failure costs


@dataclass(frozen=True)
class Piece:
    """A stretch of one file.

    reader: name of the function in READERS that turns it into texts.
    path: the file: local, or a URL that fsspec opens (hf://datasets/...).
    bytes: of its text, or an estimate of them.
    start, stop: row groups of a parquet file, or bytes of a .jsonl file; None: the whole file.
    column: of the texts, in tables.
    builder: of datasets, for formats that it reads.
    """

    reader: str
    path: str = ""
    bytes: int = 0
    start: int | None = None
    stop: int | None = None
    column: str = "text"
    builder: str = ""

    def texts(self) -> Iterator[str]:
        return READERS[self.reader](self)


@dataclass(frozen=True)
class Corpus:
    """Documents and what is known of them.

    pieces: the files in their order, cut where they can be cut.
    facts: what the manifest records of the origin (Hub id, configuration, commit; or files and their sizes).
    single_text: the corpus is one long text, which is split for validation by position, not by document.
    default_split: val_tokens or val_fraction where the user asks for neither, as the best-known recipe on it has it.
    default_tokenizer: as build_tokenizer names it.
    """

    pieces: list[Piece]
    facts: dict
    single_text: bool = False
    default_split: dict = field(default_factory=lambda: {"val_fraction": 0.005})
    default_tokenizer: str = "gpt2"

    def documents(self) -> Iterator[str]:
        """All texts, in order; every call starts a fresh pass."""
        return chain.from_iterable(piece.texts() for piece in self.pieces)

    def parts(self) -> list[tuple[Piece, ...]]:
        """Neighbouring pieces put together until a part has about PART_BYTES of text; the division is a function of
        the corpus alone, whoever works on it."""
        parts, size = [[]], 0
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
    files = [path for path in candidates if _suffix(path) in TEXT_SUFFIXES | TABLE_SUFFIXES.keys()]
    if not files:
        raise UserError(
            f"--source {source} holds no file that ends in .txt, .jsonl, .json or .parquet (or those + .gz)"
        )

    pieces = [piece for path in files for piece in _pieces_of_file(path, text_column)]
    facts = {"files": [{"name": path.name, "bytes": path.stat().st_size} for path in files]}
    single_text = len(files) == 1 and _suffix(files[0]) in TEXT_SUFFIXES
    return Corpus(pieces, facts, single_text, {"val_fraction": 0.1 if single_text else 0.005})


def _suffix(path: Path) -> str:
    """The suffix that tells the format: `a.json.gz` is `.json`."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _pieces_of_file(path: Path, column: str) -> list[Piece]:
    suffix, size = _suffix(path), path.stat().st_size
    compressed = path.suffix.lower() == ".gz"
    if suffix in TEXT_SUFFIXES:
        return [Piece("text", str(path), size * (4 if compressed else 1))]
    if suffix == ".jsonl":
        if compressed:
            return [Piece("json lines", str(path), size * 4, column=column)]
        cuts = [*range(0, max(size, 1), PART_BYTES), size]
        return [Piece("json lines", str(path), b - a, a, b, column) for a, b in zip(cuts, cuts[1:])]
    if suffix == ".parquet" and not compressed:
        return _row_groups(str(path), column) if size else []
    return [Piece("table", glob.escape(str(path)), size, column=column, builder=TABLE_SUFFIXES[suffix])]


def _hub(hub_id, config, split, revision, column, default_split) -> Corpus:
    import datasets
    from huggingface_hub import HfApi

    if not Path(hub_id).is_dir():  # pin the commit, so that the manifest says exactly what was read
        revision = _reading(hub_id, HfApi().dataset_info, hub_id, revision=revision).sha
    builder = _reading(hub_id, datasets.load_dataset_builder, hub_id, config, revision=revision)
    files = builder.config.data_files or {}
    if split not in files:
        raise UserError(f"{hub_id} has no split {split!r} but {', '.join(files)}; choose with --split")
    kind = type(builder).__module__.split(".")[-1]  # of datasets.packaged_modules
    if kind == "parquet":
        with ThreadPoolExecutor(16) as pool:  # the footer of each file says where it can be cut
            pieces = list(chain.from_iterable(pool.map(lambda path: _row_groups(path, column), files[split])))
    else:
        pieces = [Piece("table", path, PART_BYTES, column=column, builder=kind) for path in files[split]]
    facts = {"hub_id": hub_id, "config": config, "split": split, "revision": revision, "text_column": column}
    return Corpus(pieces, facts, False, default_split)


def _row_groups(path: str, column: str) -> list[Piece]:
    """A parquet file cut between row groups into pieces of about PART_BYTES."""
    with _reading(path, _open_parquet, path) as file:
        _check_column(path, column, file.schema_arrow)
        index = file.schema_arrow.names.index(column)
        sizes = [file.metadata.row_group(i).column(index).total_uncompressed_size for i in range(file.num_row_groups)]
    pieces, start = [], 0
    for stop in range(1, len(sizes) + 1):
        if stop == len(sizes) or sum(sizes[start : stop + 1]) > PART_BYTES:
            pieces.append(Piece("parquet", path, sum(sizes[start:stop]), start, stop, column))
            start = stop
    return pieces


def _open_parquet(path: str):
    import fsspec
    import pyarrow.parquet

    # A local file without Python in between: Ctrl-C there would be lost, or taken for a file that was closed.
    source = fsspec.open(path, "rb").open() if "://" in path else path
    return pyarrow.parquet.ParquetFile(source, pre_buffer=True)


def _check_column(path: str, column: str, schema) -> None:
    import pyarrow

    if column not in schema.names:
        raise UserError(f"{path} has no column {column!r} but {', '.join(schema.names)}; choose with --text_column")
    kind = schema.field(column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)):
        raise UserError(f"{path}: column {column!r} holds {kind}, not text; choose with --text_column")


# ---- readers of pieces ----


def _read_text(piece: Piece) -> Iterator[str]:
    path = Path(piece.path)
    data = _reading(piece.path, path.read_bytes)
    yield _reading(piece.path, lambda: (gzip.decompress(data) if path.suffix.lower() == ".gz" else data).decode())


def _read_parquet(piece: Piece) -> Iterator[str]:
    with _reading(piece.path, _open_parquet, piece.path) as file:
        batches = file.iter_batches(
            256, row_groups=range(piece.start, piece.stop), columns=[piece.column], use_threads=False
        )
        while (batch := _reading(piece.path, next, batches, None)) is not None:
            for text in batch.column(0).to_pylist():
                yield _text(piece, text)


def _read_json_lines(piece: Piece) -> Iterator[str]:
    """The lines that begin in the piece's bytes; a line that reaches over its end belongs to it."""
    opener = gzip.open if piece.start is None else open
    with _reading(piece.path, opener, piece.path, "rb") as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()  # the rest of a line that began before
        while piece.stop is None or file.tell() < piece.stop:
            where = f"{piece.path}, the line at byte {file.tell():,}"
            line = _reading(where, file.readline)
            if not line:
                return
            if line.strip():
                yield _text(piece, _column(piece, _reading(where, json.loads, line)))


def _read_table(piece: Piece) -> Iterator[str]:
    import datasets

    if piece.builder == "json" and not piece.bytes:  # no rows; datasets takes it for a broken file
        return
    rows = _reading(
        piece.path, datasets.load_dataset, piece.builder, data_files=piece.path, split="train", streaming=True
    )
    iterator = iter(rows)
    while (row := _reading(piece.path, next, iterator, None)) is not None:
        yield _text(piece, _column(piece, row))


def _column(piece: Piece, row: dict) -> object:
    if not isinstance(row, dict) or piece.column not in row:
        names = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise UserError(f"{piece.path} has no column {piece.column!r} but {names}; choose with --text_column")
    return row[piece.column]


def _text(piece: Piece, value: object) -> str:
    if not isinstance(value, str):
        raise UserError(f"{piece.path}: column {piece.column!r} holds {type(value).__name__}, not text")
    return value


READERS: dict[str, Callable[[Piece], Iterator[str]]] = {
    "python-docs": lambda piece: python_docs(),
    "shakespeare": lambda piece: iter([_shakespeare(piece.path)]),
    "text": _read_text,
    "json lines": _read_json_lines,
    "parquet": _read_parquet,
    "table": _read_table,
}


class SourceError(UserError):
    """A remote source could not be read, which may pass."""


def _reading(origin: str, function: Callable, *args, **kwargs):
    """Call a reader of somebody else's data; whatever it raises becomes one line that names the origin."""
    try:
        return function(*args, **kwargs)
    except Exception as error:  # network, Hub, format and configuration errors share no base class
        kind = SourceError if "://" in origin else UserError
        raise kind(
            f"cannot read {origin}: {first_line(error)}; check the name, --hub_config, --split, --revision and the "
            "network (a folder that holds a copy of the data does as well)"
        ) from error
