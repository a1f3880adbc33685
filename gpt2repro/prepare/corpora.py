"""Corpora: which exist, and how each becomes pieces that processes read independently of each other."""

import difflib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from gpt2repro.errors import UserError
from gpt2repro.prepare import built_in, readers
from gpt2repro.prepare.readers import Piece
from gpt2repro.prepare.retries import HUB_REMEDY, reading, with_retries


@dataclass(frozen=True)
class HubCorpus:
    """A dataset of the Hub under a name of its own, with the validation split of its best-known recipe."""

    hub_id: str
    config: str | None
    default_split: dict


LOCAL_CORPORA = ("python-docs", "shakespeare", "shakespeare-char", "files")
HUB_CORPORA = {
    "fineweb-edu": HubCorpus("HuggingFaceFW/fineweb-edu", "sample-10BT", {"val_tokens": 100_000_000}),  # build-nanogpt
    "fineweb": HubCorpus("HuggingFaceFW/fineweb", "sample-10BT", {"val_tokens": 100_000_000}),  # llm.c
    "openwebtext": HubCorpus("Skylion007/openwebtext", None, {"val_fraction": 0.0005}),  # nanoGPT
    # The last two have validation sets of their own on the Hub.
    "wikitext-103": HubCorpus("Salesforce/wikitext", "wikitext-103-raw-v1", {"val_fraction": 0.005}),
    "tinystories": HubCorpus("roneneldan/TinyStories", None, {"val_fraction": 0.005}),
}


@dataclass(frozen=True)
class Corpus:
    """Documents and their provenance.

    pieces: the files in order, cut where their format allows it.
    facts: the manifest's record of the origin (Hub id, configuration, commit; or files and their sizes).
    single_text: the corpus is one long text, which is split for validation by position, not by document.
    default_split: val_tokens or val_fraction, used if the user asks for neither.
    default_tokenizer: a name that build_tokenizer understands.
    modified: modification times of its local files, in nanoseconds since 1970. A preparation resumes only with the same
        ones; they are not part of the facts, because a copy of the data has others.
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


def open_corpus(
    name: str,
    source: str | None = None,
    text_column: str = "text",
    hub_config: str | None = None,
    split: str = "train",
    revision: str | None = None,
) -> Corpus:
    """The corpus called `name`; nothing large is read yet.

    Args:
        name: one of LOCAL_CORPORA or HUB_CORPORA, or a dataset's Hub id (or a local folder in the Hub's format).
        source: for `files`, a file or folder; for shakespeare, a local copy of the text.
        text_column: the column of documents in tables.
        hub_config, split, revision: select the data of a Hub dataset.
    Raises:
        UserError: unknown name, missing source, unreadable or unreachable data.
    """
    if name == "python-docs":
        facts = {"python": sys.version.split()[0]}
        return Corpus([Piece("python-docs")], facts, False, {"val_fraction": 0.1}, "bpe:2048")
    if name in ("shakespeare", "shakespeare-char"):
        return _shakespeare(name, source)
    if name == "files":
        return _files(source, text_column)
    if name in HUB_CORPORA:
        known = HUB_CORPORA[name]
        return _hub(known.hub_id, hub_config or known.config, split, revision, text_column, known.default_split)
    if "/" in name or Path(name).is_dir():
        return _hub(name, hub_config, split, revision, text_column, {"val_fraction": 0.005})
    raise UserError(f"unknown corpus {name!r}; {_suggestion(name)}")


def _suggestion(name: str) -> str:
    known = [*LOCAL_CORPORA, *HUB_CORPORA]
    nearest = difflib.get_close_matches(name, known, n=1)
    if nearest:
        return f"did you mean {nearest[0]}?"
    return f"use one of {', '.join(known)}, or a Hub id such as owner/name"


def _shakespeare(name: str, source: str | None) -> Corpus:
    built_in.shakespeare(source)  # fails now if it is unavailable
    tokenizer = "char" if name == "shakespeare-char" else "gpt2"
    facts = {"url": built_in.SHAKESPEARE_URL, "sha256": built_in.SHAKESPEARE_SHA256}
    return Corpus([Piece("shakespeare", source or "")], facts, True, {"val_fraction": 0.1}, tokenizer)


def _files(source: str | None, text_column: str) -> Corpus:
    if source is None:
        raise UserError("the corpus `files` needs --source FILE_OR_FOLDER")
    root = Path(source)
    if not root.exists():
        raise UserError(f"--source {source} does not exist")
    candidates = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]
    files = [path for path in candidates if readers.file_suffix(path) in readers.SUFFIXES]
    if not files:
        raise UserError(
            f"--source {source} holds no file that ends in .txt, .jsonl, .json or .parquet (or the first three + .gz)"
        )

    pieces = list(chain.from_iterable(readers.cut_file(path, text_column) for path in files))
    single_text = len(files) == 1 and bool(pieces) and pieces[0].reader == "text"
    split = {"val_fraction": 0.1 if single_text else 0.005}
    facts = _file_facts(files, root if root.is_dir() else root.parent)
    return Corpus(pieces, facts, single_text, split, modified=_modification_times(files))


def _file_facts(files: list[Path], root: Path) -> dict:
    names = [Path(os.path.relpath(path, root)).as_posix() for path in files]
    return {"files": [{"name": name, "bytes": path.stat().st_size} for name, path in zip(names, files)]}


def _modification_times(files: list[Path]) -> list[int]:
    return [path.stat().st_mtime_ns for path in files]


def _hub(hub_id: str, config: str | None, split: str, revision: str | None, column: str, default_split: dict) -> Corpus:
    """A dataset of the Hub, pinned to a commit, or a local folder in the Hub's format."""
    import datasets
    from huggingface_hub import HfApi

    local = Path(hub_id).is_dir()
    if local and revision:
        raise UserError(f"--revision {revision}: {hub_id} is a folder, which has no revisions; leave it out")
    with reading(hub_id, HUB_REMEDY):
        if not local:  # pin the commit, so that the manifest says exactly what was read
            revision = HfApi().dataset_info(hub_id, revision=revision).sha
        builder = datasets.load_dataset_builder(hub_id, config, revision=revision)
    files = builder.config.data_files or {}
    if split not in files:
        raise UserError(f"{hub_id} has no split {split!r} but {', '.join(files)}; choose with --split")

    facts = {"hub_id": hub_id, "config": config, "split": split, "revision": revision, "text_column": column}
    kind = type(builder).__module__.split(".")[-1]  # of datasets.packaged_modules
    pieces = _cut_hub_files(files[split], kind, column)
    if not local:
        return Corpus(pieces, facts, default_split=default_split)
    paths = [Path(path) for path in files[split]]
    facts |= _file_facts(paths, Path(hub_id))
    return Corpus(pieces, facts, default_split=default_split, modified=_modification_times(paths))


def _cut_hub_files(paths: list[str], kind: str, column: str) -> list[Piece]:
    if kind != "parquet":
        return [Piece("table", path, readers.PART_BYTES, column=column, builder=kind) for path in paths]
    with ThreadPoolExecutor(16) as pool:  # the footer of each file says where it can be cut
        cut = pool.map(lambda path: with_retries(readers.cut_parquet, path, column), paths)
        return list(chain.from_iterable(cut))
