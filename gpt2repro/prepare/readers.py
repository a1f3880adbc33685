"""Readers: from files to documents.

A file is cut into pieces, between row groups of Parquet or anywhere in a .jsonl, so that several processes can read one
file; READERS turns each piece into rows, and Piece.documents turns rows into documents.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

from gpt2repro.errors import UserError, first_line
from gpt2repro.prepare import built_in
from gpt2repro.prepare.retries import reading


PART_BYTES = 400_000_000  # of text in a part: about 90 million tokens, two minutes of work that a failure may cost
SUFFIXES = {".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet"}
GZIP_RATIO = 4  # estimated bytes of text for each byte of a compressed file
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SKIP_REASONS = ("no text", "no JSON")  # of rows that are skipped and counted: the text is null, the line is not JSON
DOCUMENT_NOTES = ("repaired", *SKIP_REASONS)  # what is counted
NOT_JSON = object()  # a row that could not be parsed; None is the row `null`


class Document(NamedTuple):
    """A row of a corpus.

    text: encodable as UTF-8; None if the row is skipped.
    url: of its page, if it has one.
    note: one of DOCUMENT_NOTES, "repaired" if lone surrogates were replaced by U+FFFD; or "".
    """

    text: str | None
    url: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Piece:
    """A section of one file.

    reader: key in READERS.
    path: the file: local, or a URL that fsspec opens (hf://datasets/...).
    bytes: of its text, possibly estimated.
    start, stop: row groups of a Parquet file, or bytes of a .jsonl file; None: the whole file.
    column: of the texts, in tables.
    builder: of `datasets`, for the formats that it reads.
    url_column: of the documents' URLs, if they are wanted.
    """

    reader: str
    path: str = ""
    bytes: int = 0
    start: int | None = None
    stop: int | None = None
    column: str = "text"
    builder: str = ""
    url_column: str | None = None

    def rows(self) -> Iterator[object]:
        """The rows as they are in the file, of Parquet only the columns needed; NOT_JSON for a line that is not JSON.
        Rows of JSON files that are not objects are not documents, but may occur."""
        return READERS[self.reader](self)

    def documents(self) -> Iterator[Document]:
        """One document for each row.

        Raises:
            UserError: a row is not an object or lacks the column, the column is not text, or most lines are not JSON.
        """
        return (self._document(row) for row in self.rows())

    def texts(self) -> Iterator[str]:
        return (document.text for document in self.documents() if document.text is not None)

    def _document(self, row: object) -> Document:
        if row is NOT_JSON:
            return Document(None, note="no JSON")
        if not isinstance(row, dict):
            raise UserError(
                f"{self.path}: the row {json.dumps(row):.40} is not an object with a column {self.column!r}; fix the "
                "file, or leave it out"
            )
        if self.column not in row:
            names = ", ".join(row)
            raise UserError(f"{self.path} has no column {self.column!r} but {names}; choose with --text_column")
        text = row[self.column]
        if text is None:
            return Document(None, note="no text")
        if not isinstance(text, str):
            raise UserError(
                f"{self.path}: column {self.column!r} holds {type(text).__name__}, not text; choose with --text_column"
            )
        url = row.get(self.url_column)
        has_url = isinstance(url, str) and url.strip()
        repaired = encodable(text)
        return Document(repaired, url if has_url else None, "" if repaired is text else "repaired")


def encodable(text: str) -> str:
    """The text itself; or, with lone surrogates, which UTF-8 cannot encode, replaced by U+FFFD, as tiktoken does it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# ---- cutting files into pieces ----


def file_suffix(path: Path) -> str:
    """The suffix that names the format, e.g. `.json.gz`."""
    count = 2 if path.suffix.lower() == ".gz" else 1
    return "".join(path.suffixes[-count:]).lower()


def cut_file(path: Path, column: str) -> list[Piece]:
    """A local file as pieces of at most PART_BYTES, if its format can be cut; [] for a Parquet file without rows."""
    suffix = file_suffix(path)
    size = path.stat().st_size
    compressed = suffix.endswith(".gz")
    text_bytes = size * GZIP_RATIO if compressed else size
    if suffix == ".parquet":
        return cut_parquet(str(path), column) if size else []
    if suffix.startswith(".txt"):
        return [Piece("text", str(path), text_bytes)]
    if suffix in (".json", ".json.gz") and _is_json_list(path):
        return [Piece("json list", str(path), text_bytes, column=column)]
    if compressed:
        return [Piece("json lines", str(path), text_bytes, column=column)]
    cuts = [*range(0, max(size, 1), PART_BYTES), size]
    return [Piece("json lines", str(path), stop - start, start, stop, column) for start, stop in pairwise(cuts)]


def cut_parquet(path: str, column: str) -> list[Piece]:
    """A Parquet file, cut between row groups into pieces of about PART_BYTES."""
    sizes = _row_group_sizes(path, column)
    cuts, filled = [0], 0
    for group, size in enumerate(sizes):
        if filled and filled + size > PART_BYTES:
            cuts.append(group)
            filled = 0
        filled += size
    cuts.append(len(sizes))
    return [Piece("parquet", path, sum(sizes[a:b]), a, b, column) for a, b in pairwise(cuts) if a < b]


def _row_group_sizes(path: str, column: str) -> list[int]:
    """Bytes of the column's values in each row group; [] if the file has no rows."""
    with _open_parquet(path) as file:
        _check_column(path, column, file.schema_arrow)
        if not file.metadata.num_rows:
            return []
        leaves = [file.schema.column(i).path for i in range(len(file.schema))]  # a column of structs has several
        index = leaves.index(column)
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        return [group.column(index).total_uncompressed_size for group in groups]


def _is_json_list(path: Path) -> bool:
    with reading(str(path)), _open_bytes(path) as file:
        return file.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")


# ---- opening files ----


def _open_bytes(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _open_parquet(path: str):
    import fsspec
    import pyarrow.parquet

    with reading(path):
        if "://" in path:  # few and large requests
            return pyarrow.parquet.ParquetFile(fsspec.open(path, "rb").open(), pre_buffer=True)
        # Not a whole row group at once, which may be a gigabyte. And without a Python file object: pyarrow would lose a
        # Ctrl-C that arrives in its methods, or take it for a closed file.
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


# ---- readers, one per format ----


def _read_python_docs(piece: Piece) -> Iterator[dict]:
    return ({piece.column: text} for text in built_in.python_docs())


def _read_shakespeare(piece: Piece) -> Iterator[dict]:
    yield {piece.column: built_in.shakespeare(piece.path)}


def _read_text(piece: Piece) -> Iterator[dict]:
    with reading(piece.path), _open_bytes(Path(piece.path)) as file:
        text = file.read().decode()
    yield {piece.column: text}


def _read_json_list(piece: Piece) -> Iterator[object]:
    with reading(piece.path), _open_bytes(Path(piece.path)) as file:
        rows = json.loads(file.read().removeprefix(BYTE_ORDER_MARK))
    yield from rows


def _read_json_lines(piece: Piece) -> Iterator[object]:
    parsed = broken = 0
    complaint = ""  # about the first broken line
    for position, line in _lines(piece):
        try:
            row = json.loads(line)
            parsed += 1
        except (ValueError, RecursionError) as error:
            row = NOT_JSON
            broken += 1
            complaint = complaint or f"the line at byte {position:,}: {first_line(error)}"
        yield row
    if broken > parsed:  # a damaged file, or another format
        raise UserError(
            f"{piece.path}: {broken:,} lines are not JSON and {parsed:,} are ({complaint}); fix the file, or leave it "
            "out"
        )


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(position, line) of the lines that begin in the piece, the last of which may end beyond it; no blank lines."""
    with reading(piece.path):
        file = _open_bytes(Path(piece.path))
    with file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()  # the rest of a line that began before the piece
        position = file.tell()
        while piece.stop is None or position < piece.stop:
            with reading(f"{piece.path}, the line at byte {position:,}"):
                line = file.readline()
            if not line:
                return
            line = line.removeprefix(BYTE_ORDER_MARK)
            if line.strip():
                yield position, line
            position = file.tell()


def _read_parquet(piece: Piece) -> Iterator[dict]:
    columns = {piece.column: "--text_column"}
    if piece.url_column:
        columns[piece.url_column] = "--url_column"
    with _open_parquet(piece.path) as file:
        for column, flag in columns.items():
            _check_column(piece.path, column, file.schema_arrow, flag)
        groups = range(file.num_row_groups)[piece.start : piece.stop]
        batches = file.iter_batches(256, row_groups=groups, columns=list(columns), use_threads=False)
        for batch in _each(piece.path, batches):
            yield from batch.to_pylist()


def _read_table(piece: Piece) -> Iterator[dict]:
    import datasets

    with reading(piece.path):
        rows = datasets.load_dataset(piece.builder, data_files=piece.path, split="train", streaming=True)
    yield from _each(piece.path, iter(rows))


def _each(origin: str, items: Iterator) -> Iterator:
    """The items; whatever their iterator raises names the origin."""
    while True:
        with reading(origin):
            item = next(items, None)
        if item is None:
            return
        yield item


READERS: dict[str, Callable[[Piece], Iterator[object]]] = {
    "python-docs": _read_python_docs,
    "shakespeare": _read_shakespeare,
    "text": _read_text,
    "json lines": _read_json_lines,
    "json list": _read_json_list,
    "parquet": _read_parquet,
    "table": _read_table,
}
