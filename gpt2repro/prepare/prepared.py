"""The directory that prepare_data.py makes: what lies where, whether it is what was asked for, and who may write there.

    manifest.json, train_*.npy, val_*.npy, tokenizer/    the result; see gpt2repro/data/manifest.py
    deduplicated/                                        with --dedup: what was kept and removed

and while it is unfinished

    preparing.json       what is being prepared (Unfinished)
    parts/               finished parts: part_00003.json and the shards that it names; logs/ of Slurm's tasks
    .lock                held by the process that is preparing it
"""

import contextlib
import dataclasses
import errno
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from gpt2repro.data.manifest import MANIFEST, Manifest, TokenizerRecord, refuse_damage
from gpt2repro.data.shards import SPLITS, token_dtype
from gpt2repro.errors import UserError, first_line, os_error_number
from gpt2repro.files import acquire_lock, file_problem, holds_only, write_json
from gpt2repro.prepare.corpora import Corpus, open_corpus
from gpt2repro.prepare.executors import SLURM_JOBS
from gpt2repro.prepare.plan import PartRecord
from gpt2repro.prepare.readers import SKIP_REASONS
from gpt2repro.prepare.request import Request, refuse_other_settings
from gpt2repro.prepare.validation import ValidationSplit, fitting_fraction, fitting_tokens


LOOKED_AT = 100_000  # documents, to find a fraction that suits them
FACT_NAMES = {"files": "list of files", "modified": "modification times"}  # other facts are named like their flags


@dataclass(frozen=True)
class SavedTokenizer:
    """The tokenizer in the output directory.

    record: of the manifest.
    files: sha256 of each of its files, by name.
    """

    record: TokenizerRecord
    files: dict[str, str]


@dataclass(frozen=True)
class Unfinished:
    """preparing.json: what an unfinished directory is being made into.

    settings: of the request.
    corpus_facts, modified: of the corpus, which must be the same when the preparation resumes.
    tokenizer: None until it is built and saved.
    """

    settings: dict
    corpus_facts: dict
    modified: list[int] | None
    tokenizer: SavedTokenizer | None = None

    @classmethod
    def read(cls, path: Path) -> "Unfinished | None":
        """None if there is no such file of ours."""
        try:
            settings = dict(json.loads(path.read_text()))
            corpus_facts, modified = settings.pop("corpus_facts", {}), settings.pop("modified", None)
            record, files = settings.pop("tokenizer_facts", None), settings.pop("tokenizer_files", None)
            tokenizer = SavedTokenizer(TokenizerRecord.from_dict(record), files) if files else None
        except PermissionError:  # it may well be ours
            raise
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return cls(settings, corpus_facts, modified, tokenizer)

    def write(self, path: Path) -> None:
        content = self.settings | {"corpus_facts": self.corpus_facts, "modified": self.modified}
        if self.tokenizer:
            content |= {"tokenizer_facts": self.tokenizer.record.to_dict(), "tokenizer_files": self.tokenizer.files}
        write_json(path, content)


@dataclass(frozen=True)
class OutputDirectory:
    """The directory of a preparation."""

    path: Path

    @property
    def manifest(self) -> Path:
        return self.path / MANIFEST

    @property
    def unfinished(self) -> Path:
        return self.path / "preparing.json"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def parts(self) -> Path:
        return self.path / "parts"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def deduplicated(self) -> Path:
        return self.path / "deduplicated"

    @property
    def logs(self) -> Path:
        return self.parts / "logs"

    def record(self, number: int) -> Path:
        """Where the record of a part goes."""
        return self.parts / f"part_{number:05d}.json"

    @property
    def has_parts(self) -> bool:
        """Whether parts are finished, or perhaps being made by Slurm at this moment."""
        return bool(self.part_records()) or (self.logs / SLURM_JOBS).exists()

    def part_records(self) -> list[Path]:
        """The records of finished parts, in order."""
        return sorted(self.parts.glob("part_*.json"))

    # ---- what was asked for, and what is there ----

    def already_prepared(self, request: Request) -> Manifest | None:
        """The manifest if the directory already holds exactly what is asked for; None if the preparation can start or
        resume here.

        Raises:
            UserError: the directory holds something else, which is never overwritten; or its files are damaged.
        """
        leftovers = {self.unfinished.name + ".tmp", self.lock.name}  # of a start that was killed at once
        if holds_only(self.path, leftovers):
            return None
        recorded = self._manifest_settings()
        if recorded is not None:
            refuse_other_settings(self.path, recorded, request.settings())
            return self._finished_manifest(request)
        unfinished = Unfinished.read(self.unfinished)
        if unfinished is not None:
            refuse_other_settings(self.path, unfinished.settings, self._fixed_settings(request))
            return None
        raise UserError(f"{self.path} exists and was not made by prepare_data.py; choose another --output_dir")

    def _manifest_settings(self) -> dict | None:
        """The settings that the manifest records; None if there is no manifest of ours."""
        try:
            return dict(json.loads(self.manifest.read_text())["settings"])
        except PermissionError:  # it may well be ours
            raise
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _fixed_settings(self, request: Request) -> dict:
        """The settings that finished work depends on; the others can still change."""
        if self.has_parts:
            return request.settings()
        has_deduplicated = not holds_only(self.deduplicated, set())  # a mistake found at once leaves it empty
        return request.deduplication_settings() if has_deduplicated else {}

    def _finished_manifest(self, request: Request) -> Manifest:
        """The manifest, after a quick check of the files and, if it is local, of the corpus."""
        if request.corpus == "files" or Path(request.corpus).is_dir():
            self.open_corpus(request)
        manifest = Manifest.read(self.path)
        refuse_damage(manifest.missing_files(self.path), self.path)
        self.tidy()  # in case it was killed just before
        return manifest

    def open_corpus(self, request: Request) -> Corpus:
        """The corpus that is asked for. A preparation that resumes reads the Hub commit that it started with.

        Raises:
            UserError: the corpus is unavailable, or differs from the one that the directory was started with.
        """
        recorded = self._recorded_corpus()
        corpus = open_corpus(request.corpus_query(recorded.get("revision")))
        facts = dict(corpus.facts)
        if "modified" in recorded:
            facts["modified"] = corpus.modified
        changed = [name for name in facts if recorded and recorded.get(name) != facts[name]]
        if changed:
            names = " and ".join(FACT_NAMES.get(name, name) for name in changed)
            raise UserError(
                f"the corpus is not the one that {self.path} was started with: its {names} changed; "
                "choose another --output_dir, or delete it"
            )
        self._refuse_other_parts(corpus)
        return corpus

    def _refuse_other_parts(self, corpus: Corpus) -> None:
        """Version 0.1.0 counted every table as a whole part, so its parts must not be mixed with today's. It recorded
        no special_tokens."""
        unfinished = Unfinished.read(self.unfinished)
        has_tables = any(piece.reader == "table" for piece in corpus.pieces)
        if unfinished is None or not has_tables or not self.part_records():
            return
        if "special_tokens" not in unfinished.settings:
            raise UserError(
                f"{self.path} was started by an older version, which divided tables into other parts; delete it and "
                "repeat the command"
            )

    def _recorded_corpus(self) -> dict:
        """The facts of the corpus that work in this directory came from; {} if there is none yet."""
        if self.manifest.exists():
            return Manifest.read(self.path).corpus
        unfinished = Unfinished.read(self.unfinished)
        if unfinished is None or not (self.deduplicated.exists() or self.has_parts):
            return {}
        return unfinished.corpus_facts | {"modified": unfinished.modified}

    def saved_tokenizer(self, unfinished: Unfinished) -> SavedTokenizer | None:
        """The tokenizer that an earlier attempt at the same preparation saved, if it is intact."""
        earlier = Unfinished.read(self.unfinished)
        if earlier is None or earlier.tokenizer is None:
            return None
        if dataclasses.replace(earlier, tokenizer=None) != unfinished:
            return None
        for name, sha256 in earlier.tokenizer.files.items():
            if file_problem(self.tokenizer / name, sha256):
                return None
        return earlier.tokenizer

    # ---- writing to it ----

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create the directory and lock it against other preparations; the lock of a killed process is released."""
        self.path.mkdir(parents=True, exist_ok=True)
        busy = f"{self.path} is being prepared by another process; wait for it, or choose another --output_dir"
        lock = acquire_lock(self.lock, busy)
        try:
            yield
        finally:
            self.lock.unlink(missing_ok=True)
            lock.release()
            with contextlib.suppress(OSError):
                self.path.rmdir()  # if nothing was written

    def discard_parts(self) -> None:
        """Delete the finished parts."""
        shutil.rmtree(self.parts, ignore_errors=True)

    def tidy(self) -> None:
        """Remove what only an unfinished directory needs."""
        self.discard_parts()
        temporary = [path.with_name(path.name + ".tmp") for path in (self.unfinished, self.manifest)]
        for path in (self.unfinished, *temporary, self.lock):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def explain_disk_errors(output_dir: Path) -> Iterator[None]:
    """Turn a full disk, and everything else that prevents writing there, into a UserError."""
    try:
        yield
    except Exception as error:
        if os_error_number(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"no space is left for {output_dir}; finished parts are kept: make space, repeat the command"
            ) from error
        if isinstance(error, OSError) and str(getattr(error, "filename", None)).startswith(str(output_dir)):
            raise UserError(
                f"{output_dir} cannot be used ({first_line(error)}); fix that, or choose another --output_dir"
            ) from error
        raise


# ---- refusals, before and after the work ----


def check_space(directory: OutputDirectory, corpus: Corpus, vocab_size: int, request: Request) -> None:
    """Print how much disk the preparation needs.

    Raises:
        UserError: there is less.
    """
    text_bytes = sum(piece.bytes for piece in corpus.pieces)
    bytes_per_token = 1 if request.tokenizer_of(corpus) == "char" else 4  # English has 4.2 to 4.8 with GPT-2's
    tokens = min(text_bytes // bytes_per_token, request.max_tokens or math.inf)
    # The deduplication keeps the text, compressed to a half or less, and 952 bytes per document of a few thousand.
    for_deduplication = 0.75 * text_bytes if request.dedup_methods else 0
    needed = (tokens * token_dtype(vocab_size).itemsize + for_deduplication) / 1e9
    written = sum(path.stat().st_size for path in directory.path.rglob("*") if path.is_file())
    free = (shutil.disk_usage(directory.path).free + written) / 1e9
    if tokens:
        print(f"needs about {needed:,.1f} GB of disk, {free:,.1f} GB are free", flush=True)
    if needed > free:
        raise UserError(
            f"{directory.path} needs about {needed:,.1f} GB, but only {free:,.1f} GB are free; choose another disk, or "
            "fewer tokens with --max_tokens"
        )


def refuse_empty_splits(
    directory: OutputDirectory,
    records: list[PartRecord],
    val_split: ValidationSplit,
    corpus: Corpus,
    request: Request,
) -> None:
    """Raise UserError if a split has no tokens; then the parts are discarded, so that the same directory takes other
    settings."""
    for name in SPLITS:
        if not any(record.splits[name].tokens for record in records):
            directory.discard_parts()
            remedy = _fitting_remedy(records, val_split, corpus, request)
            skipped = sum(record.notes[reason] for record in records for reason in SKIP_REASONS)
            also = f", and {_skipped_rows(skipped)}" if skipped else ""
            raise UserError(f"the {name} split got no document with {val_split}{also}; {remedy}")


def _fitting_remedy(records: list[PartRecord], val_split: ValidationSplit, corpus: Corpus, request: Request) -> str:
    """Flags with which no split is empty."""
    limits = {"max_tokens": request.max_tokens, "max_documents": request.max_documents}
    given = " and ".join(f"--{name} {limit}" for name, limit in limits.items() if limit)
    if corpus.single_text:
        return f"allow more than {given}" if given else "choose another --val_fraction, or a longer text"
    value: float | None
    if val_split.tokens:
        value = fitting_tokens([length for record in records for length in record.val_lengths])
        flag = f"--val_tokens {value}"
    else:
        documents = sum(record.total("documents") for record in records)
        value = fitting_fraction(islice(corpus.texts(), min(documents, LOOKED_AT)))
        flag = f"--val_fraction {value}"
    if value is not None:
        return f"use {flag}"
    separator = "another --document_separator" if request.document_separator else "--document_separator"
    more = f"allow more than {given}" if given else f"add some, or split texts with {separator}"
    return f"two different documents are needed: {more}"


def unused_separator(records: list[PartRecord], corpus: Corpus, request: Request) -> str | None:
    """A note if --document_separator, perhaps misspelt, made no more documents than there are files."""
    documents = sum(record.total("documents") for record in records)
    is_whole = all(piece.boundary for piece in corpus.pieces) and all(record.complete for record in records)
    if request.document_separator is None or not is_whole or documents > len(corpus.pieces):
        return None
    return f"note: --document_separator {request.document_separator!r} separates nothing: no file has two documents"


def uneven_split(records: list[PartRecord], val_split: ValidationSplit) -> str | None:
    """A note if validation has more than twice or less than half the tokens that the split stands for."""
    train, val = (sum(record.splits[name].tokens for record in records) for name in SPLITS)
    asked = val_split.tokens or val_split.fraction * (train + val)
    if asked / 2 <= val <= asked * 2:
        return None
    share = f"{val / (train + val):.1%} of the tokens" if val_split.fraction else f"{val:,} tokens"
    return (
        f"note: validation has {share} with {val_split}, as it takes whole documents; choose another number, or cut "
        "large texts (--document_separator blank --val_fraction 0.1), in another --output_dir"
    )


def summary(directory: str | Path, manifest: Manifest) -> str:
    """One line about a prepared directory."""
    sentences = [
        f"{name} {split.tokens:,} tokens, {split.documents:,} documents, {len(split.shards)} shards"
        for name, split in manifest.splits.items()
    ]
    skipped = sum(manifest.preparation.get("skipped_documents", {}).values())
    if skipped:
        sentences.append(_skipped_rows(skipped))
    tokenizer = manifest.tokenizer
    return f"{directory}: {'; '.join(sentences)}; tokenizer {tokenizer.name}, {tokenizer.vocab_size:,} ids"


def _skipped_rows(number: int) -> str:
    return f"{number:,} rows skipped (no text or not JSON)"
