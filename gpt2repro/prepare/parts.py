"""Preparing a corpus with many processes: each takes a part, reads, tokenizes and writes its shards by itself, so no
token crosses a process border. A finished part is recorded; what was interrupted is done again by the same command, and
the result is the same, byte for byte, whatever the number of processes and interruptions.

`parts/` of the output directory holds part_00003.json, ... with the shards that they name. In the end the shards of
the train split are renamed to their place and those of the validation split, which are small, are put together.
"""

import contextlib
import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np

from gpt2repro import files
from gpt2repro.data import shards
from gpt2repro.data.token_stream import TokenStream
from gpt2repro.data.tokenization import load_encoder
from gpt2repro.errors import UserError, first_line
from gpt2repro.prepare.corpora import NOTES, Piece, with_attempts


BATCH_DOCUMENTS = 64


@dataclass(frozen=True)
class Settings:
    """What all parts have in common.

    output_dir: the directory that is prepared; its tokenizer/ is there already.
    tokenizer, vocab_size, eot_id: as build_tokenizer made it.
    shard_tokens: tokens in a shard, at most.
    val_fraction: share of the documents that go to validation, chosen by hash; 0: none.
    single_text: the only document is cut by position instead.
    """

    output_dir: Path
    tokenizer: str
    vocab_size: int
    eot_id: int | None
    shard_tokens: int
    val_fraction: float = 0.0
    single_text: bool = False


@dataclass(frozen=True)
class Quota:
    """What is still to be had when a part begins.

    val_tokens: documents go to validation until it has so many tokens more.
    tokens, documents: at most so many, of both splits; None: no limit.
    """

    val_tokens: int = 0
    tokens: int | None = None
    documents: int | None = None

    def after(self, record: dict) -> "Quota":
        """What is left after a part."""
        val, train = record["splits"]["val"], record["splits"]["train"]
        return Quota(
            max(0, self.val_tokens - val["tokens"]),
            None if self.tokens is None else self.tokens - val["tokens"] - train["tokens"],
            None if self.documents is None else self.documents - val["documents"] - train["documents"],
        )

    def fits(self, record: dict) -> bool:
        """Whether a part that was made under another quota would come out the same under this one."""
        made = Quota(**record["quota"])
        left = self.after(record)
        unlimited = record["complete"] and (left.tokens or 0) >= 0 and (left.documents or 0) >= 0
        return made == self or (made.val_tokens == self.val_tokens and unlimited)


# ---- one part, in a process of its own ----


def prepare_part(
    number: int, pieces: tuple[Piece, ...], settings: Settings, quota: Quota, counter: Callable[[int, int, int], None]
) -> dict:
    """Tokenize a part, write its shards and record them; returns the record.

    Args:
        counter: is told of documents, tokens and bytes of text as they are done.
    Raises:
        UserError: the source holds something else than text, or the disk is full.
    """
    folder = settings.output_dir / "parts"
    marker = folder / f"part_{number:05d}.json"
    marker.unlink(missing_ok=True)
    encode = load_encoder(settings.tokenizer, settings.output_dir / "tokenizer")
    dtype = shards.token_dtype(settings.vocab_size)
    writers = {
        split: shards.ShardWriter(folder, f"part_{number:05d}_{split}", dtype, settings.shard_tokens, settings.eot_id)
        for split in shards.SPLITS
    }
    complete, notes, val_lengths = True, dict.fromkeys(NOTES, 0), []
    with no_space(settings.output_dir), _discarding(writers.values()):
        documents = _divided(pieces, settings, notes)
        while batch := list(islice(documents, BATCH_DOCUMENTS)):
            counted = [0, 0, 0]
            for (split, text, note), tokens in zip(batch, encode([text for _, text, _ in batch])):
                size = len(tokens) + (settings.eot_id is not None)
                if quota.val_tokens > writers["val"].tokens:
                    split = "val"
                done = sum(w.tokens for w in writers.values()), sum(w.documents for w in writers.values())
                if (quota.tokens is not None and done[0] + size > quota.tokens) or done[1] == quota.documents:
                    complete = False
                    break
                text_bytes = len(text.encode())
                writers[split].add(tokens, text_bytes)
                if note:
                    notes[note] += 1
                if split == "val":
                    val_lengths.append(size)
                counted = [counted[0] + 1, counted[1] + size, counted[2] + text_bytes]
            counter(*counted)
            if not complete:
                break
        record = {
            "quota": dataclasses.asdict(quota),
            "complete": complete,
            "notes": notes,
            "splits": {split: writer.finish().to_dict() for split, writer in writers.items()},
            "val_lengths": val_lengths,  # tokens of each document, for `_merged`
        }
        files.write_json(marker, record)
    return record


@contextlib.contextmanager
def no_space(output_dir: Path) -> Iterator[None]:
    """Turn a full disk, and what else forbids to write there, into a UserError."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        in_rust = f"(os error {errno.ENOSPC})" in str(error)  # tokenizers raises no OSError
        if in_rust or number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"no space is left for {output_dir}; finished parts are kept: make space, repeat the command"
            ) from error
        if isinstance(error, OSError) and str(getattr(error, "filename", None)).startswith(str(output_dir)):
            raise UserError(
                f"{output_dir} cannot be written ({first_line(error)}); mend that, or choose another --output_dir"
            ) from error
        raise


@contextlib.contextmanager
def _discarding(writers: Iterable[shards.ShardWriter]) -> Iterator[None]:
    """Remove what the writers have not finished."""
    try:
        yield
    finally:
        for writer in writers:
            writer.discard()


def _divided(pieces: tuple[Piece, ...], settings: Settings, notes: dict[str, int]) -> Iterator[tuple[str, str, str]]:
    """(split, text, note) of every document; rows that are none are counted in `notes`.

    One long text is cut by position, as nanoGPT's data/shakespeare*/prepare.py cut it. Of many documents those are
    held out whose hash falls below the fraction, so that a document keeps its place when the corpus grows, and its
    exact copies go where it goes.
    """
    for document in (document for piece in pieces for document in piece.documents()):
        if document.text is None:
            notes[document.note] += 1
        elif not settings.val_fraction:
            yield "train", document.text, document.note
        elif settings.single_text:
            cut = int(len(document.text) * (1 - settings.val_fraction))
            yield "train", document.text[:cut], document.note
            yield "val", document.text[cut:], ""
        else:
            digest = blake2b(document.text.encode(), digest_size=8).digest()
            split = "val" if int.from_bytes(digest) < settings.val_fraction * 2**64 else "train"
            yield split, document.text, document.note


# ---- all parts ----


def prepare_parts(
    parts: list[tuple[Piece, ...]],
    settings: Settings,
    quota: Quota,
    num_workers: int,
    progress: Callable[[int, int, int], None],
) -> list[dict]:
    """Make what is not there yet; returns the records of the parts that count, in order.

    Args:
        progress: is told, about twice a second, of the documents, tokens and bytes of text that are done in all.
    Raises:
        UserError: as prepare_part; parts that are finished stay.
    """
    folder = settings.output_dir / "parts"
    folder.mkdir(exist_ok=True)
    for unfinished in folder.glob("*.tmp"):
        unfinished.unlink()
    records = finished_parts(settings)
    context = multiprocessing.get_context("spawn")  # a forked process may inherit locks that nobody will open
    shared = context.RawArray("q", len(parts) * len(UNITS))  # without a lock: who holds it may be killed
    counts = np.frombuffer(shared, np.int64).reshape(-1, len(UNITS))  # what is done of each part
    for number, record in records.items():
        counts[number] = [sum(split[unit] for split in record["splits"].values()) for unit in UNITS]

    def show() -> None:
        progress(*counts.sum(axis=0).tolist())

    if num_workers == 1:
        while (state := plan(len(parts), records, quota))[1]:
            number, part_quota = state[1][0]
            records[number] = _attempt(number, parts[number], settings, part_quota, counts[number], show)
        return [records[number] for number in range(state[0])]

    running: dict[Future, int] = {}
    executor = ProcessPoolExecutor(num_workers, context, _start_worker, (shared,))
    try:
        while True:
            used, todo = plan(len(parts), records, quota)
            if not todo:
                return [records[number] for number in range(used)]
            for number, part_quota in todo:
                if len(running) < num_workers and number not in running.values():
                    with _no_interrupts():
                        running[executor.submit(_work, number, parts[number], settings, part_quota)] = number
            done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            show()
            for future in done:
                records[running.pop(future)] = future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process was ended from outside, perhaps for want of memory; finished parts are kept: repeat the "
            "command, with fewer --num_workers"
        ) from error
    finally:
        _stop(executor)


def finished_parts(settings: Settings) -> dict[int, dict]:
    """number -> record of the parts whose shards are all there, under their own names or already under their final
    ones; records of others are removed."""
    folder, output_dir = settings.output_dir / "parts", settings.output_dir
    dtype = shards.token_dtype(settings.vocab_size)
    records, before = {}, dict.fromkeys(shards.SPLITS, 0)  # shards of the parts before
    for marker in sorted(folder.glob("part_*.json")):
        record = json.loads(marker.read_text())
        for split in shards.SPLITS:
            for number, shard in enumerate(record["splits"][split]["shards"], start=before[split]):
                places = folder / shard["file"], output_dir / f"{split}_{number:05d}.npy"
                if not any(shards.has_tokens(path, shard["tokens"], dtype) for path in places):
                    marker.unlink(missing_ok=True)
            before[split] += len(record["splits"][split]["shards"])
        if marker.exists():
            records[int(marker.stem.split("_")[1])] = record
    return records


UNITS = ("documents", "tokens", "bytes")


def plan(n_parts: int, records: dict[int, dict], quota: Quota) -> tuple[int, list[tuple[int, Quota]]]:
    """What is to be done next.

    Which documents are for validation, and where the limits end the corpus, depends on all parts before; so only the
    first part that is missing knows its quota. The others are made on trial, under the quota that is the most likely
    one, from the end if validation takes the beginning; they are made again if it was wrong.

    Returns:
        How many parts count; and the parts to make with their quotas, the most urgent first. None: all is done.
    """
    for number in range(n_parts):
        if quota.tokens == 0 or quota.documents == 0:
            return number, []
        record = records.get(number)
        if record is None or not quota.fits(record):
            later = [n for n in range(number + 1, n_parts) if n not in records]
            on_trial = dataclasses.replace(quota, val_tokens=0)
            order = later[::-1] if quota.val_tokens and quota.tokens is quota.documents is None else later
            return n_parts, [(number, quota), *((n, on_trial) for n in order)]
        if not record["complete"]:
            return number + 1, []
        quota = quota.after(record)
    return n_parts, []


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Ctrl-C waits until the end; a process that is started here never hears of it: it is the main one's business."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_counts: list[np.ndarray] = []  # of a worker process: what all of them have done of each part


def _start_worker(shared) -> None:
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _counts.append(np.frombuffer(shared, np.int64).reshape(-1, len(UNITS)))


def _end_with_the_command() -> None:
    """The command was killed, and is perhaps started again: the directory is not ours any more."""
    if command := multiprocessing.parent_process():
        command.join()
    os._exit(1)


def _work(number: int, pieces: tuple[Piece, ...], settings: Settings, quota: Quota) -> dict:
    return _attempt(number, pieces, settings, quota, _counts[0][number])


def _attempt(
    number: int,
    pieces: tuple[Piece, ...],
    settings: Settings,
    quota: Quota,
    done: np.ndarray,
    show: Callable[[], None] = lambda: None,
) -> dict:
    """prepare_part, tried again where a remote source fails for reasons that may pass.

    Args:
        done: (3,), the part's UNITS, kept up to date.
        show: is called after each change.
    """

    def count(*more: int) -> None:
        done[:] += more
        show()

    def attempt() -> dict:
        done[:] = 0
        return prepare_part(number, pieces, settings, quota, count)

    return with_attempts(attempt)


def _stop(executor: ProcessPoolExecutor) -> None:
    """End the processes, also in the middle of a part: what they leave is removed the next time."""
    processes = list((executor._processes or {}).values())
    executor.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


# ---- the whole ----


def put_together(records: list[dict], settings: Settings) -> dict:
    """Give the shards of all parts their final names; returns the manifest's record of each split.

    It can be interrupted and repeated: a shard lies under its old name or under its new one.
    """
    folder, output_dir = settings.output_dir / "parts", settings.output_dir
    splits = {}
    for split in shards.SPLITS:
        parts = [record["splits"][split] for record in records]
        pieces = [shard for part in parts for shard in part["shards"]]
        if split == "val" and sum(part["documents"] > 0 for part in parts) > 1:  # one small piece of each part
            pieces = _merged(records, settings)
        for number, shard in enumerate(pieces):
            final = output_dir / f"{split}_{number:05d}.npy"
            if (folder / shard["file"]).exists():
                (folder / shard["file"]).replace(final)
            elif not final.exists():
                raise UserError(f"{folder / shard['file']} is missing; repeat the command, which makes it again")
            pieces[number] = shard | {"file": final.name}
        splits[split] = {unit: sum(part[unit] for part in parts) for unit in ("tokens", "documents", "bytes")}
        # Without a token to open them, the documents of a part may all be empty, and in no shard.
        splits[split] |= {"documents": sum(shard["documents"] for shard in pieces), "shards": pieces}
    files.flush(output_dir)
    return splits


def _merged(records: list[dict], settings: Settings) -> list[dict]:
    """The validation documents in as few shards as can be; the pieces stay until the manifest is written."""
    folder, dtype = settings.output_dir / "parts", shards.token_dtype(settings.vocab_size)
    writer = shards.ShardWriter(folder, "val", dtype, settings.shard_tokens, settings.eot_id)
    opening = len(writer.opening)
    with no_space(settings.output_dir), _discarding([writer]):
        for record in records:
            pieces = record["splits"]["val"]["shards"]
            stream = TokenStream(
                tuple(folder / shard["file"] for shard in pieces),
                tuple(shard["tokens"] for shard in pieces),
                (None,) * len(pieces),
                settings.vocab_size,
            )
            end = 0
            for length in record["val_lengths"]:
                writer.add(stream.read(end + opening, length - opening), text_bytes=0)
                end += length
        return writer.finish().to_dict()["shards"]


def clean_up(output_dir: Path) -> None:
    """Remove what only an unfinished directory needs."""
    shutil.rmtree(output_dir / "parts", ignore_errors=True)
