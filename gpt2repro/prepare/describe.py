"""What a prepared directory holds, for a person to read."""

from pathlib import Path

import numpy as np

from gpt2repro.data.manifest import Manifest
from gpt2repro.data.shards import SPLITS
from gpt2repro.data.token_stream import TokenStream
from gpt2repro.models.folder import load_tokenizer


SHOWN_DOCUMENTS = 3
SHOWN_TOKENS = 60
BAR = 40  # characters of the longest bar


def describe(data_dir: str | Path) -> str:
    """Origin, documents, tokens, tokens per byte, a histogram of the documents' lengths in tokens, and the beginnings
    of the first documents, decoded; for each split.

    Raises:
        UserError: the directory is missing or unfinished, or a shard cannot be opened.
    """
    manifest = Manifest.read(data_dir)
    tokenizer = load_tokenizer(Path(data_dir) / "tokenizer")
    eot_id = manifest.tokenizer.eot_id
    corpus = ", ".join(f"{key} {value}" for key, value in manifest.corpus.items() if isinstance(value, str | int))
    lines = [
        f"{data_dir}: {corpus}",
        f"tokenizer {manifest.tokenizer.name}, {manifest.tokenizer.vocab_size:,} ids",
    ]
    for name in SPLITS:
        split, stream = manifest.splits[name], TokenStream.open(data_dir, name)
        lines += ["", f"{name}: {split.tokens:,} tokens in {split.documents:,} documents and "
                  f"{len(split.shards)} shards, {split.bytes:,} bytes of text, "
                  f"{split.tokens / max(split.bytes or 0, 1):.4f} tokens per byte"]  # fmt: skip
        starts = [0]
        if eot_id is not None:
            starts, counts = document_lengths(stream, eot_id)
            lines += ["", f"{'tokens in a document':>24} {'documents':>12}", *histogram(counts)]
        for number, start in enumerate(starts[: split.documents], start=1):
            ids = stream.read(start, min(SHOWN_TOKENS, len(stream) - start)).tolist()
            if eot_id in ids[1:]:
                ids = ids[: ids.index(eot_id, 1)]
            lines += ["", f"document {number}: {tokenizer.decode(ids)!r}"]
    return "\n".join(lines)


def document_lengths(stream: TokenStream, eot_id: int) -> tuple[list[int], np.ndarray]:
    """Where the first SHOWN_DOCUMENTS start; and (64,) int64, how many documents have 2^i ... 2^(i+1) - 1 tokens, their
    opening id included."""
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
    """A line for each power of two, with a bar."""
    used, largest = np.flatnonzero(counts), int(counts.max())
    return [
        f"{f'{2**i:,} to {2 ** (i + 1) - 1:,}':>24} {counts[i]:12,} {'#' * -(-BAR * int(counts[i]) // largest)}"
        for i in range(used.min(initial=64), used.max(initial=0) + 1)
    ]
