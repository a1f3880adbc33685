"""One part of the corpus, from documents to shards and a record; then the shards of all parts under their final names.

Each part is read, tokenized, written and recorded by one process, so no token crosses a process border. At the end the
train shards of all parts are renamed into place; the validation shards, which are small, are merged.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2repro.data.shards import SPLITS, Shard, ShardWriter, Split, has_tokens, token_dtype
from gpt2repro.data.token_stream import TokenStream
from gpt2repro.data.tokenization import KEEP, load_encoder
from gpt2repro.errors import UserError
from gpt2repro.files import flush, write_json
from gpt2repro.prepare.plan import PartRecord, Quota
from gpt2repro.prepare.prepared import OutputDirectory, explain_disk_errors
from gpt2repro.prepare.readers import DOCUMENT_NOTES, Piece
from gpt2repro.prepare.validation import takes_document


BATCH_DOCUMENTS = 64  # tokenized at a time


@dataclass(frozen=True)
class Job:
    """What all parts have in common.

    directory: the output; its tokenizer/ exists already.
    tokenizer, vocab_size, eot_id: of build_tokenizer's result.
    shard_tokens: tokens in a shard, at most.
    val_fraction: share of the documents that go to validation, chosen by hash; 0: none.
    single_text: the only document is cut by position instead.
    special_tokens: one of tokenization.SPECIAL_TOKEN_CHOICES.
    """

    directory: OutputDirectory
    tokenizer: str
    vocab_size: int
    eot_id: int | None
    shard_tokens: int
    val_fraction: float = 0.0
    single_text: bool = False
    special_tokens: str = KEEP

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.vocab_size)

    def shard_writer(self, name: str) -> ShardWriter:
        """A writer of shards in parts/ whose names begin with `name`."""
        return ShardWriter(self.directory.parts, name, self.dtype, self.shard_tokens, self.eot_id)

    def final_path(self, split: str, number: int) -> Path:
        """Where a shard ends up."""
        return self.directory.path / f"{split}_{number:05d}.npy"


class Counts(NamedTuple):
    """How much is tokenized."""

    documents: int
    tokens: int
    bytes: int


class SplitDocument(NamedTuple):
    """A document and the split that its hash or position puts it in."""

    split: str
    text: str
    note: str


# ---- one part ----


def prepare_part(
    number: int, pieces: tuple[Piece, ...], job: Job, quota: Quota, progress: Callable[[Counts], None]
) -> PartRecord:
    """Tokenize a part, write its shards, then its record, which it returns.

    Args:
        progress: called after each batch with the counts of the part so far.
    Raises:
        UserError: the source is not text, or the disk is full.
    """
    record_path = job.directory.record(number)
    record_path.unlink(missing_ok=True)
    encode = load_encoder(job.tokenizer, job.directory.tokenizer, job.special_tokens)
    with explain_disk_errors(job.directory.path), PartWriter(number, job, quota) as writer:
        for batch in _batches(split_documents(pieces, job, writer.notes)):
            wanted = batch[: writer.documents_left]  # a vocabulary of characters may lack those of later documents
            writer.add(wanted, encode([document.text for document in wanted]))
            writer.complete &= len(wanted) == len(batch)
            progress(writer.counts)
            if not writer.complete:
                break
        record = writer.finish()
        write_json(record_path, record.to_dict())
    return record


def _batches(documents: Iterator[SplitDocument]) -> Iterator[list[SplitDocument]]:
    while batch := list(islice(documents, BATCH_DOCUMENTS)):
        yield batch


def split_documents(pieces: tuple[Piece, ...], job: Job, notes: dict[str, int]) -> Iterator[SplitDocument]:
    """The documents of a part; skipped rows are counted in `notes`.

    A single text is cut by position, as nanoGPT's data/shakespeare*/prepare.py does; many documents are split by hash.
    """
    for document in (document for piece in pieces for document in piece.documents()):
        if document.text is None:
            notes[document.note] += 1
        elif not job.val_fraction:
            yield SplitDocument("train", document.text, document.note)
        elif job.single_text:
            cut = int(len(document.text) * (1 - job.val_fraction))
            yield SplitDocument("train", document.text[:cut], document.note)
            yield SplitDocument("val", document.text[cut:], "")
        else:
            split = "val" if takes_document(job.val_fraction, document.text) else "train"
            yield SplitDocument(split, document.text, document.note)


class PartWriter:
    """Writes the documents of a part to its shards.

    complete: False once the quota cut the part short.
    """

    def __init__(self, number: int, job: Job, quota: Quota):
        self.job, self.quota = job, quota
        self.writers = {split: job.shard_writer(f"part_{number:05d}_{split}") for split in SPLITS}
        self.notes = dict.fromkeys(DOCUMENT_NOTES, 0)
        self.val_lengths: list[int] = []
        self.complete = True

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *error) -> None:
        for writer in self.writers.values():
            writer.discard()

    @property
    def counts(self) -> Counts:
        train, val = self.writers["train"], self.writers["val"]
        return Counts(
            documents=train.documents + val.documents,
            tokens=train.tokens + val.tokens,
            bytes=train.bytes + val.bytes,
        )

    @property
    def documents_left(self) -> int | None:
        """How many more the quota takes; None: any number."""
        return None if self.quota.documents is None else self.quota.documents - self.counts.documents

    def add(self, documents: Sequence[SplitDocument], tokens: Sequence) -> None:
        """Append documents, no more than documents_left, given the token ids of each."""
        for document, ids in zip(documents, tokens):
            length = len(ids) + (self.job.eot_id is not None)
            if self._exceeds_tokens(length):
                self.complete = False
                return
            val_is_full = self.writers["val"].tokens >= self.quota.val_tokens
            split = document.split if val_is_full else "val"
            self.writers[split].add(ids, len(document.text.encode()))
            if split == "val":
                self.val_lengths.append(length)
            if document.note:
                self.notes[document.note] += 1

    def _exceeds_tokens(self, length: int) -> bool:
        return self.quota.tokens is not None and self.counts.tokens + length > self.quota.tokens

    def finish(self) -> PartRecord:
        splits = {split: writer.finish() for split, writer in self.writers.items()}
        return PartRecord(self.quota, self.complete, self.notes, splits, self.val_lengths)


def finished_parts(job: Job) -> dict[int, PartRecord]:
    """number -> record of the parts whose shards all exist, under their own names or already under their final ones;
    other records, damaged ones too, are removed."""
    records = {}
    first_shard = dict.fromkeys(SPLITS, 0)  # the final number of the part's first shard
    for path in job.directory.part_records():
        record = PartRecord.read(path)
        if record is None:
            path.unlink()
            continue
        if all(_shards_exist(record, split, first_shard[split], job) for split in SPLITS):
            records[int(path.stem.removeprefix("part_"))] = record
        else:
            path.unlink()
        for split in SPLITS:
            first_shard[split] += len(record.splits[split].shards)
    return records


def _shards_exist(record: PartRecord, split: str, first_shard: int, job: Job) -> bool:
    for number, shard in enumerate(record.splits[split].shards, start=first_shard):
        places = job.directory.parts / shard.file, job.final_path(split, number)
        if not any(has_tokens(path, shard.tokens, job.dtype) for path in places):
            return False
    return True


# ---- the final shards ----


def finalize_shards(records: list[PartRecord], job: Job) -> dict[str, Split]:
    """Move the shards of all parts to their final names; returns the splits that they form.

    Can be interrupted and repeated: each shard is found under its old name or its new one.
    """
    splits = {split: _finalize_split(split, records, job) for split in SPLITS}
    flush(job.directory.path)
    return splits


def _finalize_split(split: str, records: list[PartRecord], job: Job) -> Split:
    parts = [record.splits[split] for record in records]
    found = [shard for part in parts for shard in part.shards]
    several = sum(bool(part.documents) for part in parts) > 1
    if split == "val" and several:  # one small shard from each part
        found = _merge_validation(records, job)
    final = [_move_into_place(shard, job.final_path(split, number), job) for number, shard in enumerate(found)]
    return Split(
        tokens=sum(shard.tokens for shard in final),
        # Not of the parts: without an opening id, all documents of a part may be empty, and in no shard.
        documents=sum(shard.documents or 0 for shard in final),
        bytes=sum(part.bytes or 0 for part in parts),
        shards=tuple(final),
    )


def _move_into_place(shard: Shard, final: Path, job: Job) -> Shard:
    path = job.directory.parts / shard.file
    if path.exists():
        path.replace(final)
    elif not final.exists():
        raise UserError(f"{path} is missing; repeat the command, which makes it again")
    return replace(shard, file=final.name)


def _merge_validation(records: list[PartRecord], job: Job) -> list[Shard]:
    """The validation documents in as few shards as possible; the parts' own remain until the manifest is written."""
    writer = job.shard_writer("val")
    with explain_disk_errors(job.directory.path), contextlib.ExitStack() as stack:
        stack.callback(writer.discard)
        for record in records:
            for ids in _validation_documents(record, job):
                writer.add(ids, text_bytes=0)
        return list(writer.finish().shards)


def _validation_documents(record: PartRecord, job: Job) -> Iterable[np.ndarray]:
    """The token ids of a part's validation documents, without the opening ids."""
    found = record.splits["val"].shards
    stream = TokenStream(
        tuple(job.directory.parts / shard.file for shard in found),
        tuple(shard.tokens for shard in found),
        (None,) * len(found),
        job.vocab_size,
    )
    opening = 0 if job.eot_id is None else 1
    start = 0
    for length in record.val_lengths:
        yield stream.read(start + opening, length - opening)
        start += length
