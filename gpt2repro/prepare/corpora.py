"""Corpora: which exist, and how each becomes pieces that processes read independently of each other.

To add one, enter it in LOCAL_CORPORA or HUB_CORPORA, at the end of this file.
"""

import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2repro.errors import UserError
from gpt2repro.prepare import built_in, readers
from gpt2repro.prepare.boundaries import WIKITEXT_TITLE, Boundary
from gpt2repro.prepare.local_files import Listing, describe_left_out, first_names, list_files
from gpt2repro.prepare.readers import Piece
from gpt2repro.prepare.retries import HUB_REMEDY, reading, with_retries
from gpt2repro.prepare.validation import DEFAULT_SPLIT, SMALL_CORPUS_SPLIT, ValidationSplit


if TYPE_CHECKING:
    from datasets import DatasetBuilder

READABLE = ".txt, .jsonl, .json or .parquet (or .md, .ndjson, .csv, .tsv, .arrow)"
OTHER_SPLITS = {"test", "val", "valid", "validation", "dev", "eval"}  # words of file names
LINES_NOTE = (
    "note: each line of its text files is a document, as `datasets` reads them; for one document per file use "
    "`files --source {name}`, for several lines per document --document_separator"
)


@dataclass(frozen=True)
class CorpusQuery:
    """Which documents are asked for.

    name: a key of LOCAL_CORPORA or HUB_CORPORA, or a dataset's Hub id (or a local folder in the Hub's format).
    source: for `files`, a file or folder; for shakespeare, a local copy of the text.
    text_column: the column of documents in tables.
    hub_config, split, revision: select the data of a Hub dataset.
    document_separator: what separates the documents of a text file, or of rows that are lines; see boundaries.py.
    """

    name: str
    source: str | None = None
    text_column: str = "text"
    hub_config: str | None = None
    split: str = "train"
    revision: str | None = None
    document_separator: str | None = None

    @property
    def boundary(self) -> Boundary | None:
        return None if self.document_separator is None else Boundary(separator=self.document_separator)


@dataclass(frozen=True)
class Corpus:
    """Documents and their provenance.

    pieces: the files in order, cut where their format allows it.
    facts: the manifest's record of the origin (Hub id, configuration, commit; or files and their sizes).
    single_text: the corpus is one long text, which is split for validation by position, not by document.
    default_split: used if the user gives neither --val_tokens nor --val_fraction.
    default_tokenizer: a name that build_tokenizer understands.
    modified: modification times of its local files, in nanoseconds since 1970. A preparation resumes only with the same
        ones; they are not part of the facts, because a copy of the data has others.
    left_out: reason -> names of the files in its folder that are not read.
    notes: lines to print if its documents may not be what the user takes for them.
    """

    pieces: list[Piece]
    facts: dict
    single_text: bool = False
    default_split: ValidationSplit = DEFAULT_SPLIT
    default_tokenizer: str = "gpt2"
    modified: list[int] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def texts(self) -> Iterator[str]:
        """All texts, in order; every call starts a fresh pass."""
        return chain.from_iterable(piece.texts() for piece in self.pieces)

    def parts(self) -> list[tuple[Piece, ...]]:
        """Neighbouring pieces joined into parts of about readers.PART_BYTES of text: a function of the corpus alone,
        independent of the number of processes."""
        parts: list[list[Piece]] = [[]]
        size = 0
        for piece in self.pieces:
            if parts[-1] and size + piece.bytes > readers.PART_BYTES:
                parts.append([])
                size = 0
            parts[-1].append(piece)
            size += piece.bytes
        return [tuple(part) for part in parts]


def open_corpus(query: CorpusQuery) -> Corpus:
    """The corpus that is asked for; nothing large is read yet.

    Raises:
        UserError: unknown name, missing source, unreadable or unreachable data.
    """
    if query.name in LOCAL_CORPORA:
        if query.document_separator and query.name != "files":
            raise UserError(f"--document_separator: {query.name} knows its documents; leave it out")
        return LOCAL_CORPORA[query.name](query)
    if query.name in HUB_CORPORA:
        known = HUB_CORPORA[query.name]
        hub_query = replace(query, name=known.hub_id, hub_config=query.hub_config or known.config)
        return _open_hub(hub_query, known.default_split, query.boundary or known.boundary)
    if "/" in query.name or Path(query.name).is_dir():
        same = [known.boundary for known in HUB_CORPORA.values() if known.hub_id == query.name]
        return _open_hub(query, DEFAULT_SPLIT, query.boundary or next(iter(same), None))
    raise UserError(f"unknown corpus {query.name!r}; {_suggestion(query.name)}")


def _suggestion(name: str) -> str:
    if Path(name).exists():
        return f"text of your own is `files --source {shlex.quote(name)}`"
    known = [*LOCAL_CORPORA, *HUB_CORPORA]
    nearest = difflib.get_close_matches(name, known, n=1)
    if nearest:
        return f"did you mean {nearest[0]}?"
    return f"use one of {', '.join(known)}, or a Hub id such as owner/name"


# ---- local corpora ----


def _open_python_docs(query: CorpusQuery) -> Corpus:
    return Corpus(
        pieces=[Piece("python-docs")],
        facts={"python": sys.version.split()[0]},
        default_split=SMALL_CORPUS_SPLIT,
        default_tokenizer="bpe:2048",
    )


def _open_shakespeare(query: CorpusQuery) -> Corpus:
    built_in.shakespeare(query.source)  # fails now if it is unavailable
    return Corpus(
        pieces=[Piece("shakespeare", query.source or "")],
        facts={"url": built_in.SHAKESPEARE_URL, "sha256": built_in.SHAKESPEARE_SHA256},
        single_text=True,
        default_split=SMALL_CORPUS_SPLIT,
    )


def _open_shakespeare_char(query: CorpusQuery) -> Corpus:
    return replace(_open_shakespeare(query), default_tokenizer="char")


def _open_files(query: CorpusQuery) -> Corpus:
    if query.source is None:
        raise UserError("the corpus `files` needs --source FILE_OR_FOLDER")
    root = Path(query.source)
    if not root.exists():
        raise UserError(f"--source {query.source} does not exist")
    if not root.is_dir() and not root.is_file():
        raise UserError(f"--source {query.source} is a pipe or device, which cannot be read twice; save it to a file")
    listing = list_files(root) if root.is_dir() else Listing(root.parent, [root])
    listing.keep(filter(readers.is_readable, listing.files), "of other formats")
    if root.is_dir():
        listing.keep([path for path in listing.files if path != listing.readme], "README")
    suffixes = {path: readers.file_suffix(path) for path in listing.files}
    if not set(suffixes.values()) <= set(readers.TEXT_SUFFIXES):  # then Markdown is about the data, not data
        listing.keep([path for path in listing.files if suffixes[path] != ".md"], "Markdown beside tables")
    files = listing.files
    if not files:
        also = f" ({describe_left_out(listing.left_out)})" if root.is_dir() and listing.left_out else ""
        raise UserError(
            f"--source {query.source} holds no file that ends in {READABLE}, compressed or not{also}; choose another "
            "--source"
        )

    pieces = list(chain.from_iterable(readers.cut_file(path, query.text_column) for path in files))
    notes = _notes_about_splits(files, listing.root)
    if query.boundary:
        pieces = [readers.separated(piece, query.boundary) for piece in pieces]
        tables = [piece.path for piece in pieces if piece.boundary is None]
        if tables and len(tables) == len(pieces):
            raise UserError(
                f"--document_separator {query.document_separator!r} is for text files, and {query.source} holds none: "
                "a row of a table is a document; leave it out"
            )
        if tables:
            notes.append(
                f"note: --document_separator leaves {len(set(tables)):,} tables as they are: a row is a document"
            )
    single_text = len(files) == 1 and bool(pieces) and pieces[0].reader == "text"
    return Corpus(
        pieces=pieces,
        facts=_file_facts(files, listing.root),
        single_text=single_text,
        default_split=SMALL_CORPUS_SPLIT if single_text else DEFAULT_SPLIT,
        modified=_modification_times(files),
        left_out=listing.left_out,
        notes=notes,
    )


def _notes_about_splits(files: list[Path], root: Path) -> list[str]:
    """A note if files beside those for training look like those of other splits."""
    words = {path: set(re.split(r"[^a-z]+", path.relative_to(root).as_posix().lower())) for path in files}
    others = [path.relative_to(root).as_posix() for path in files if words[path] & OTHER_SPLITS]
    if not others or not any("train" in words[path] for path in files):
        return []
    is_saved = (root / "dataset_dict.json").exists()  # by save_to_disk, which load_dataset does not read
    alone = f"use --source {root / 'train'}" if is_saved else f"use the dataset {root} instead of `files`"
    return [f"note: {first_names(others)} of another split become part of the corpus; to leave them out, {alone}"]


def _file_facts(files: list[Path], root: Path) -> dict:
    names = [Path(os.path.relpath(path, root)).as_posix() for path in files]
    return {"files": [{"name": name, "bytes": path.stat().st_size} for name, path in zip(names, files)]}


def _modification_times(files: list[Path]) -> list[int]:
    return [path.stat().st_mtime_ns for path in files]


# ---- the Hub ----


def _open_hub(query: CorpusQuery, default_split: ValidationSplit, boundary: Boundary | None = None) -> Corpus:
    """A dataset of the Hub, pinned to a commit, or a local folder in the Hub's format."""
    import datasets
    from huggingface_hub import HfApi

    hub_id, revision = query.name, query.revision
    local = Path(hub_id).is_dir()
    if local and revision:
        raise UserError(f"--revision {revision}: {hub_id} is a folder, which has no revisions; leave it out")
    with reading(hub_id, HUB_REMEDY):
        if not local:  # pin the commit, so that the manifest says exactly what was read
            revision = HfApi().dataset_info(hub_id, revision=revision).sha
        try:
            builder = datasets.load_dataset_builder(hub_id, query.hub_config, revision=revision)
        except ValueError as error:  # which names the configurations on a later line
            if not (found := re.search(r"available configs: \[(.+)\]", str(error))):
                raise
            raise UserError(f"{hub_id} has the configurations {found[1]}; choose one with --hub_config") from error
    files = builder.config.data_files or {}
    if query.split not in files:
        part = ", and a part of it with --max_documents" if "[" in query.split else ""
        raise UserError(
            f"{hub_id} has no split {query.split!r} but {', '.join(map(str, files))}; choose one with --split{part}"
        )

    facts = {
        "hub_id": hub_id,
        "config": query.hub_config,
        "split": query.split,
        "revision": revision,
        "text_column": query.text_column,
    }
    pieces = _cut_hub_files(builder, query.split, query.text_column)
    empty = [Path(piece.path).name for piece in pieces if piece.reader == "table" and not piece.bytes]
    pieces = [replace(piece, boundary=boundary) for piece in pieces if piece.reader != "table" or piece.bytes]
    corpus = Corpus(pieces, facts, default_split=default_split, left_out={"empty": empty} if empty else {})
    if boundary is None and _is_read_line_by_line(builder):
        corpus = replace(corpus, notes=[LINES_NOTE.format(name=query.name)])
    if not local:
        return corpus
    paths = [Path(path) for path in files[query.split]]
    listing = list_files(Path(hub_id))
    data_files = {Path(path).resolve() for split in files for path in files[split]}
    known = [path for path in listing.files if path.resolve() in data_files or path == listing.readme]
    listing.keep(known, "that are not data files of the dataset")
    return replace(
        corpus,
        facts=facts | _file_facts(paths, Path(hub_id)),
        modified=_modification_times(paths),
        left_out=corpus.left_out | listing.left_out,
    )


def _cut_hub_files(builder: "DatasetBuilder", split: str, column: str) -> list[Piece]:
    if not _is_plain_parquet(builder):
        return readers.cut_tables(builder, split, column)
    paths = builder.config.data_files[split]
    with ThreadPoolExecutor(16) as pool:  # the footer of each file says where it can be cut
        cut = pool.map(lambda path: with_retries(readers.cut_parquet, path, column), paths)
        return list(chain.from_iterable(cut))


def _is_plain_parquet(builder: "DatasetBuilder") -> bool:
    """Whether the files are Parquet and all their rows belong to the dataset."""
    return readers.builder_kind(builder) == "parquet" and not builder.config.filters


def _is_read_line_by_line(builder: "DatasetBuilder") -> bool:
    return readers.builder_kind(builder) == "text" and builder.config.sample_by == "line"


# ---- the registries ----


@dataclass(frozen=True)
class HubCorpus:
    """A dataset of the Hub under a name of its own, with the validation split of its best-known recipe."""

    hub_id: str
    config: str | None = None
    default_split: ValidationSplit = DEFAULT_SPLIT
    boundary: Boundary | None = None  # None: a row is a document


LOCAL_CORPORA: dict[str, Callable[[CorpusQuery], Corpus]] = {
    "python-docs": _open_python_docs,
    "shakespeare": _open_shakespeare,
    "shakespeare-char": _open_shakespeare_char,
    "files": _open_files,
}
HUB_CORPORA = {
    # The validation splits of build-nanogpt, llm.c and nanoGPT.
    "fineweb-edu": HubCorpus("HuggingFaceFW/fineweb-edu", "sample-10BT", ValidationSplit(tokens=100_000_000)),
    "fineweb": HubCorpus("HuggingFaceFW/fineweb", "sample-10BT", ValidationSplit(tokens=100_000_000)),
    "openwebtext": HubCorpus("Skylion007/openwebtext", default_split=ValidationSplit(fraction=0.0005)),
    # These have validation sets of their own on the Hub.
    "wikitext-103": HubCorpus("Salesforce/wikitext", "wikitext-103-raw-v1", boundary=Boundary(title=WIKITEXT_TITLE)),
    "tinystories": HubCorpus("roneneldan/TinyStories"),
}
