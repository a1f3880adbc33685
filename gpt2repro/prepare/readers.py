"""Readers: from files to documents.

A file is cut into pieces, between row groups of Parquet or anywhere in a .jsonl, so that several processes can read one
file; READERS turns each piece into rows, and Piece.documents turns rows into documents.
"""

import bz2
import codecs
import copy
import glob
import gzip
import importlib.util
import io
import json
import lzma
import math
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gpt2repro.errors import UserError, first_line
from gpt2repro.prepare import built_in
from gpt2repro.prepare.boundaries import Boundary
from gpt2repro.prepare.retries import reading, with_retries


if TYPE_CHECKING:
    from datasets import DatasetBuilder


PART_BYTES = 400_000_000  # of text in a part: about 90 million tokens, two minutes of work that a failure may cost
TEXT_SUFFIXES = (".txt", ".md")  # a file is a document
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = {".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}  # -> the builder of `datasets` that reads them
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")  # after one of the others
COMPRESSION_RATIO = 4  # estimated bytes of text for each byte of a compressed file
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
SKIP_REASONS = ("no text", "no JSON")  # of rows that are skipped and counted: the text is null, the line is not JSON
DOCUMENT_NOTES = ("repaired", *SKIP_REASONS)  # what is counted
HEAD_ROWS = 100  # one of which must have the column of the texts; later rows without it are skipped
URL_FLAG = "--url_column, or leave url out of --dedup"
FIELDS_DROPPED = "Length of header or names does not match length of data"  # pandas' warning
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
    builder: of `datasets`, for the formats that it reads: of this file alone, with all options of its dataset.
    url_column: of the documents' URLs, if they are wanted.
    boundary: what separates documents, if rows are not documents but lines of them.
    """

    reader: str
    path: str = ""
    bytes: int = 0
    start: int | None = None
    stop: int | None = None
    column: str = "text"
    builder: "DatasetBuilder | None" = None
    url_column: str | None = None
    boundary: Boundary | None = None

    @property
    def has_columns(self) -> bool:
        """Whether its rows have columns, and each is a document: text files and joined lines have no URLs."""
        return self.reader not in ("text", "lines") and self.boundary is None

    def rows(self) -> Iterator[object]:
        """The rows as they are in the file, of Parquet only the columns needed; NOT_JSON for a line that is not JSON.
        Rows of JSON files that are not objects are not documents, but may occur."""
        return READERS[self.reader](self)

    def documents(self) -> Iterator[Document]:
        """One document for each row, or for the rows between two boundaries; one without text for each skipped row.

        Raises:
            UserError: a row is not an object, the file has no such column, the column is not text, or most lines are
                not JSON.
        """
        rows = (self._document(number, row) for number, row in enumerate(self._checked_rows(), start=1))
        return rows if self.boundary is None else self._joined(rows, self.boundary)

    def _checked_rows(self) -> Iterator[object]:
        """The rows, of which one of the first HEAD_ROWS of the file has the column."""
        rows = self.rows()
        head: list[object] = []
        for row in islice(rows, HEAD_ROWS):
            head.append(row)
            if isinstance(row, dict) and self.column in row:
                return chain(head, rows)
        objects = [row for row in head if isinstance(row, dict)]
        if objects and not self.start:
            raise UserError(self._why_no_column(objects))
        return chain(head, rows)

    def texts(self) -> Iterator[str]:
        return (document.text for document in self.documents() if document.text is not None)

    def _joined(self, rows: Iterator[Document], boundary: Boundary) -> Iterator[Document]:
        """The documents between boundaries, then the skipped rows."""
        skipped: list[Document] = []

        def lines() -> Iterator[Document]:
            for row in rows:
                if row.text is None:
                    skipped.append(row)
                else:
                    yield row

        for text, sources in boundary.documents(lines(), lambda row: row.text or ""):
            repaired = any(row.note for row in sources)
            yield Document(text, note="repaired" if repaired else "")
        yield from skipped

    def _document(self, number: int, row: object) -> Document:
        if row is NOT_JSON:
            return Document(None, note="no JSON")
        if row is None:
            return Document(None, note="no text")
        if not isinstance(row, dict):
            raise UserError(
                f"{self._place(number)}: {json.dumps(row):.40} is not an object with a column {self.column!r}; fix the "
                "row, or leave the file out"
            )
        first = number == 1 and not self.start  # then it is the flag that is wrong, not the row
        remedy = "choose with --text_column" if first else "fix the row, or leave the file out"
        place = self.path if first else self._place(number)
        text = row.get(self.column)
        if text is None or (isinstance(text, float) and math.isnan(text)):
            return Document(None, note="no text")
        if isinstance(text, list):
            remedy = f"write each text as a row of its own, or {remedy}"
        if not isinstance(text, str):
            raise UserError(f"{place}: column {self.column!r} holds {type(text).__name__}, not text; {remedy}")
        url = row.get(self.url_column)
        has_url = isinstance(url, str) and url.strip()
        repaired = encodable(text)
        return Document(repaired, url if has_url else None, "" if repaired is text else "repaired")

    def _why_no_column(self, rows: list[dict]) -> str:
        """The message for a file that begins with these rows."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        if not names:
            return f"{self.path} has rows without any column; fix the file, or leave it out"
        if len(rows) == 1:
            for name, value in rows[0].items():
                if isinstance(value, list) and value and isinstance(value[0], dict):
                    return (
                        f"{self.path} is one object whose {name!r} holds the rows; write them one a line, or prepare "
                        f"its folder as a dataset whose README says `field: {name}`"
                    )
        if self.column in re.split(r"[,;|\t]", names[0]):
            return (
                f"{self.path} is read as one column, {names[0]!r}, by another separator than its own; prepare it as a "
                "dataset whose README says `sep`, or a mixture of .csv and .tsv as `files`"
            )
        return f"{self.path} has no column {self.column!r} but {', '.join(names)}; choose with --text_column"

    def _place(self, number: int) -> str:
        """Where a row is, for messages."""
        if not self.start:
            return f"{self.path}, row {number:,}"
        unit = "row group" if self.reader == "parquet" else "byte"
        return f"{self.path}, row {number:,} from {unit} {self.start:,} on"


def encodable(text: str) -> str:
    """The text itself; or, with lone surrogates, which UTF-8 cannot encode, replaced by U+FFFD, as tiktoken does it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# ---- cutting files into pieces ----


def file_suffix(path: str | Path) -> str:
    """The suffix that names the format, in lower case and without that of a compression."""
    path = Path(path)
    return Path(path.stem if is_compressed(path) else path).suffix.lower()


def is_compressed(path: str | Path) -> bool:
    return Path(path).suffix.lower() in COMPRESSED_SUFFIXES


def is_readable(path: Path) -> bool:
    """Whether the name of a file says that cut_file can read it."""
    suffix = file_suffix(path)
    if suffix == ".parquet" or suffix == ".arrow":
        return not is_compressed(path)
    return suffix in (*TEXT_SUFFIXES, *JSON_SUFFIXES, *TABLE_SUFFIXES)


def cut_file(path: Path, column: str) -> list[Piece]:
    """A local file as pieces of at most PART_BYTES, if its format can be cut; [] for a Parquet file without rows."""
    suffix = file_suffix(path)
    size = path.stat().st_size
    text_bytes = size * COMPRESSION_RATIO if is_compressed(path) else size
    if suffix == ".parquet":
        return cut_parquet(str(path), column) if size else []
    if suffix in TABLE_SUFFIXES:
        return cut_tables(open_tables(path), "train", column) if size else []
    if suffix in TEXT_SUFFIXES:
        return [Piece("text", str(path), text_bytes)]
    first = _first_line(path)
    has_lines = _has_json_lines(first) if suffix == ".json" else not re.match(rb"\[\s*(\{|$)", first)
    if not has_lines:
        return [Piece("json", str(path), text_bytes, column=column)]
    if is_compressed(path):
        return [Piece("json lines", str(path), text_bytes, column=column)]
    cuts = [*range(0, max(size, 1), PART_BYTES), size]
    return [Piece("json lines", str(path), stop - start, start, stop, column) for start, stop in pairwise(cuts)]


def separated(piece: Piece, boundary: Boundary) -> Piece:
    """The piece; a text file with its lines as rows, of which the boundary makes documents."""
    return replace(piece, reader="lines", boundary=boundary) if piece.reader == "text" else piece


def open_tables(path: Path) -> "DatasetBuilder":
    """The builder of `datasets` for a table of TABLE_SUFFIXES, with its defaults."""
    import datasets

    suffix = file_suffix(path)
    options = {"sep": "\t"} if suffix == ".tsv" else {}
    escaped = glob.escape(str(path))  # `datasets` takes brackets in a name for a pattern
    with reading(str(path)):
        if suffix != ".arrow":
            _open_bytes(path).close()  # its builder would take UTF-16 for damaged UTF-8
        return datasets.load_dataset_builder(TABLE_SUFFIXES[suffix], data_files={"train": [escaped]}, **options)


def cut_tables(builder: "DatasetBuilder", split: str, column: str) -> list[Piece]:
    """The files of a dataset, each read by a builder of its own that has all options of `builder`: those of the README
    (sep, field, header, names, sample_by ...) and those that `datasets` derives from a suffix."""
    paths = builder.config.data_files[split]
    _check_zstandard(paths)
    with ThreadPoolExecutor(16) as pool:
        sizes = pool.map(lambda path: with_retries(_text_bytes, path), paths)
    return [
        Piece("table", path, size, column=column, builder=_for_one_file(builder, path, column))
        for path, size in zip(paths, sizes)
    ]


def builder_kind(builder: "DatasetBuilder") -> str:
    """Its format: csv, json, parquet, text, ..."""
    return type(builder).__module__.split(".")[-1]  # of datasets.packaged_modules


def _for_one_file(builder: "DatasetBuilder", path: str, column: str) -> "DatasetBuilder":
    alone = copy.copy(builder)
    alone.config = config = copy.copy(builder.config)
    config.data_files = {"train": [path]}  # names, not patterns
    if builder_kind(builder) == "csv":
        if config.index_col is None:
            config.index_col = False  # or pandas takes the first field of rows that have one too many for an index
        if not (config.features or config.na_values) and config.keep_default_na:
            config.converters = {column: _text_or_null}  # or a file of years has numbers for texts
    return alone


def _text_or_null(field: str) -> str | None:
    from pandas._libs.parsers import STR_NA_VALUES

    return None if field in STR_NA_VALUES else field


def _text_bytes(path: str) -> int:
    """The size of a file, local or remote; PART_BYTES if its server does not say."""
    import fsspec

    with reading(path):
        filesystem, name = fsspec.url_to_fs(path)
        size = filesystem.size(name)
    if size is None:
        return PART_BYTES
    return size * COMPRESSION_RATIO if is_compressed(path) or path.endswith(".zip") else size


def _check_zstandard(paths: list[str]) -> None:
    compressed = [path for path in paths if path.endswith((".zst", ".zstd"))]
    if compressed and importlib.util.find_spec("zstandard") is None:
        raise UserError(f'{compressed[0]}: `datasets` needs zstandard to read it; pip install "gpt2repro[zstd]"')


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


def _first_line(path: Path) -> bytes:
    """The first line of a file that is not blank; b"" if there is none."""
    with reading(str(path)), _open_bytes(path) as file:
        lines = (line.strip() for line in _without_byte_order_mark(file))
        return next(filter(None, lines), b"")


def _has_json_lines(first: bytes) -> bool:
    """Whether a .json file of this first line has a value on each, rather than one list or object that fills it."""
    if not first or first.startswith(b"["):
        return not first
    try:
        _parse_json(first)
    except json.JSONDecodeError as error:
        return error.pos < len(first.decode(errors="replace"))  # broken within the line, rather than continued below
    except (ValueError, RecursionError):
        pass
    return True


# ---- opening files ----


def _open_bytes(path: Path) -> io.BufferedIOBase:
    """The decompressed content of a file of UTF-8."""
    file = _decompressed(path)
    if file.peek(2)[:2] in UTF_16_MARKS:
        raise UserError(f"{path} is UTF-16, as PowerShell writes it; save it as UTF-8")
    return file


def _parse_json(content: bytes) -> object:
    """json.loads itself takes bytes with a NUL near their start for UTF-16."""
    return json.loads(content.decode("utf-8", "surrogatepass"))


def _decompressed(path: Path) -> io.BufferedReader | gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow

        # Reads all frames, and raises if the last is cut; zstandard's reader ends silently after the first.
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    openers = {".gz": gzip.GzipFile, ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile}
    return openers[suffix](path) if suffix in openers else path.open("rb")


def _without_byte_order_mark(file: io.BufferedIOBase) -> Iterator[bytes]:
    """The lines of a file, without the mark at its start."""
    yield file.readline().removeprefix(BYTE_ORDER_MARK)
    yield from file


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
    if not (
        types.is_null(values)
        or types.is_string(values)
        or types.is_large_string(values)
        or types.is_string_view(values)
    ):
        raise UserError(f"{path}: column {column!r} holds {kind}, not text; choose with {flag}")


# ---- readers, one per format ----


def _read_python_docs(piece: Piece) -> Iterator[dict]:
    return ({piece.column: text} for text in built_in.python_docs())


def _read_shakespeare(piece: Piece) -> Iterator[dict]:
    yield {piece.column: built_in.shakespeare(piece.path)}


def _read_text(piece: Piece) -> Iterator[dict]:
    with reading(piece.path), _open_bytes(Path(piece.path)) as file:
        text = file.read().removeprefix(BYTE_ORDER_MARK).decode()
    yield {piece.column: text}


def _read_lines(piece: Piece) -> Iterator[dict]:
    with reading(piece.path):
        file = _open_bytes(Path(piece.path))
    with file:
        for line in _each(piece.path, _without_byte_order_mark(file)):
            with reading(piece.path):
                text = line.decode()
            yield {piece.column: text}


def _read_json(piece: Piece) -> Iterator[object]:
    with reading(piece.path), _open_bytes(Path(piece.path)) as file:
        content = _parse_json(file.read().removeprefix(BYTE_ORDER_MARK))
    yield from content if isinstance(content, list) else [content]


def _read_json_lines(piece: Piece) -> Iterator[object]:
    parsed = broken = 0
    complaint = ""  # about the first broken line
    for position, line in _lines(piece):
        try:
            row = _parse_json(line)
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
        position = file.tell() if piece.start else 0
        while piece.stop is None or position < piece.stop:
            with reading(f"{piece.path}, the line at byte {position:,}"):
                line = file.readline()
            if not line:
                return
            text = line.removeprefix(BYTE_ORDER_MARK)
            if text.strip():
                yield position, text
            position += len(line)  # not file.tell(), which a compressed file may lack


def _read_parquet(piece: Piece) -> Iterator[dict]:
    columns = {piece.column: "--text_column"}
    if piece.url_column:
        columns[piece.url_column] = URL_FLAG
    with _open_parquet(piece.path) as file:
        for column, flag in columns.items():
            _check_column(piece.path, column, file.schema_arrow, flag)
        groups = range(file.num_row_groups)[piece.start : piece.stop]
        batches = file.iter_batches(256, row_groups=groups, columns=list(columns), use_threads=False)
        for batch in _each(piece.path, batches):
            yield from batch.to_pylist()


def _read_table(piece: Piece) -> Iterator[dict]:
    assert piece.builder is not None, "a table is read by a builder"
    with reading(piece.path):
        rows = _without_loss(piece.path, iter(piece.builder.as_streaming_dataset("train")))
    for number, row in enumerate(_each(piece.path, rows)):
        text = row.get(piece.column)
        if number == 0 and isinstance(text, str):
            row[piece.column] = text.removeprefix("\ufeff")  # the byte order mark, which its builder of text keeps
        yield row


def _without_loss(path: str, rows: Iterator[dict]) -> Iterator[dict]:
    """The rows of a table, unless pandas drops fields of them, of which it only warns."""
    warnings.filterwarnings("error", FIELDS_DROPPED)
    try:
        yield from rows
    except Warning as warning:
        raise UserError(
            f"{path}: its rows have more fields than its header; quote texts that contain the separator"
        ) from warning


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
    "lines": _read_lines,
    "json": _read_json,
    "json lines": _read_json_lines,
    "parquet": _read_parquet,
    "table": _read_table,
}
