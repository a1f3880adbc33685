"""What a prepared directory holds, for a person to read."""

import math
from pathlib import Path

import numpy as np

from gpt2repro.data.manifest import Manifest, remedy
from gpt2repro.data.shards import SPLITS, Split
from gpt2repro.data.token_stream import TokenStream
from gpt2repro.errors import UserError, first_line


SHOWN_DOCUMENTS = 3
SHOWN_TOKENS = 60
LONGEST_BAR = 40  # characters


def describe(data_dir: str | Path) -> str:
    """Origin and tokenizer; for each split its size, a histogram of document lengths in tokens, and the beginnings of
    the first documents, decoded.

    Raises:
        UserError: the directory is missing or unfinished, or a shard or the tokenizer cannot be opened.
    """
    manifest = Manifest.read(data_dir)
    tokenizer = _load_tokenizer(Path(data_dir))
    corpus = ", ".join(f"{key} {value}" for key, value in manifest.corpus.items() if isinstance(value, str | int))
    lines = [
        f"{data_dir}: {corpus}",
        f"tokenizer {manifest.tokenizer.name}, {manifest.tokenizer.vocab_size:,} ids",
    ]
    for name in SPLITS:
        split = manifest.splits[name]
        stream = TokenStream.open(data_dir, name, manifest)
        lines += ["", _size(name, split)]
        lines += _documents(stream, split, manifest.tokenizer.eot_id, tokenizer)
    return "\n".join(lines)


def _load_tokenizer(data_dir: Path):
    from transformers import PreTrainedTokenizerFast

    folder = data_dir / "tokenizer"
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # transformers and tokenizers share no base class for unreadable files
        raise UserError(
            f"{folder}: no tokenizer can be loaded from there ({first_line(error)}); {remedy(data_dir)}"
        ) from error


def _size(name: str, split: Split) -> str:
    tokens_per_byte = split.tokens / max(split.bytes or 0, 1)
    return (
        f"{name}: {split.tokens:,} tokens in {split.documents:,} documents and {len(split.shards)} shards, "
        f"{split.bytes:,} bytes of text, {tokens_per_byte:.4f} tokens per byte"
    )


def _documents(stream: TokenStream, split: Split, eot_id: int | None, tokenizer) -> list[str]:
    """The histogram, if documents can be told apart, and the first documents."""
    starts = [0]
    lines = []
    if eot_id is not None:
        starts, counts = document_lengths(stream, eot_id)
        lines += ["", f"{'tokens in a document':>24} {'documents':>12}", *histogram(counts)]
    for number, start in enumerate(starts[: split.documents], start=1):
        ids = stream.read(start, min(SHOWN_TOKENS, len(stream) - start)).tolist()
        if eot_id in ids[1:]:
            ids = ids[: ids.index(eot_id, 1)]
        lines += ["", f"document {number}: {tokenizer.decode(ids)!r}"]
    return lines


def document_lengths(stream: TokenStream, eot_id: int) -> tuple[list[int], np.ndarray]:
    """Where documents start and how long they are.

    Returns:
        The positions of the first SHOWN_DOCUMENTS, and (64,) int64: how many documents have 2^i ... 2^(i+1) - 1 tokens,
        their opening id included.
    """
    first: list[int] = []
    counts, offset, last = np.zeros(64, np.int64), 0, np.empty(0, np.int64)
    for tokens in stream.arrays():
        starts = np.concatenate([last, np.flatnonzero(tokens == eot_id) + offset])
        first += starts[len(last) :][: SHOWN_DOCUMENTS - len(first)].tolist()
        counts += _powers_of_two(np.diff(starts))
        last, offset = starts[-1:], offset + len(tokens)
    return first, counts + _powers_of_two(offset - last)


def _powers_of_two(lengths: np.ndarray) -> np.ndarray:
    return np.bincount(np.log2(lengths).astype(int), minlength=64)


def histogram(counts: np.ndarray) -> list[str]:
    """One line for each power of two, with a bar."""
    used, largest = np.flatnonzero(counts), int(counts.max())
    lines = []
    for power in range(used.min(initial=64), used.max(initial=0) + 1):
        count = int(counts[power])
        lengths = f"{2**power:,} to {2 ** (power + 1) - 1:,}"
        bar = "#" * math.ceil(LONGEST_BAR * count / largest)
        lines.append(f"{lengths:>24} {count:12,} {bar}")
    return lines
