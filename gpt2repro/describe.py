"""What a prepared directory holds, for a person to read."""

from pathlib import Path

import numpy as np

from gpt2repro import shards
from gpt2repro.model_folder import load_tokenizer


SHOWN_DOCUMENTS = 3
SHOWN_TOKENS = 60
BAR = 40  # characters of the longest bar


def describe(data_dir: str | Path) -> str:
    """Origin, documents, tokens, tokens per byte, a histogram of the documents' lengths in tokens, and the beginnings
    of the first documents, decoded; for each split.

    Raises:
        UserError: the directory is missing or unfinished, or a shard cannot be opened.
    """
    manifest = shards.read_manifest(data_dir)
    tokenizer = load_tokenizer(Path(data_dir) / "tokenizer")
    eot_id = manifest["tokenizer"]["eot_id"]
    corpus = ", ".join(f"{key} {value}" for key, value in manifest["corpus"].items() if isinstance(value, str | int))
    lines = [
        f"{data_dir}: {corpus}",
        f"tokenizer {manifest['tokenizer']['name']}, {manifest['tokenizer']['vocab_size']:,} ids",
    ]
    for name in shards.SPLITS:
        split, stream = manifest["splits"][name], shards.TokenStream.open(data_dir, name)
        lines += ["", f"{name}: {split['tokens']:,} tokens in {split['documents']:,} documents and "
                  f"{len(split['shards'])} shards, {split['bytes']:,} bytes of text, "
                  f"{split['tokens'] / max(split['bytes'], 1):.4f} tokens per byte"]  # fmt: skip
        starts = [0]
        if eot_id is not None:
            lengths = document_lengths(stream, eot_id)
            starts = np.concatenate([[0], np.cumsum(lengths)[: SHOWN_DOCUMENTS - 1]]).tolist()
            lines += ["", f"{'tokens in a document':>24} {'documents':>12}", *histogram(lengths)]
        for number, start in enumerate(starts[: split["documents"]], start=1):
            ids = stream.read(start, min(SHOWN_TOKENS, len(stream) - start)).tolist()
            if eot_id in ids[1:]:
                ids = ids[: ids.index(eot_id, 1)]
            lines += ["", f"document {number}: {tokenizer.decode(ids)!r}"]
    return "\n".join(lines)


def document_lengths(stream: shards.TokenStream, eot_id: int) -> np.ndarray:
    """(documents,) int64: tokens of each document, its opening id included."""
    starts, offset = [], 0
    for tokens in stream.arrays:
        starts.append(np.flatnonzero(tokens == eot_id) + offset)
        offset += len(tokens)
    return np.diff(np.concatenate(starts), append=offset)


def histogram(lengths: np.ndarray) -> list[str]:
    """A line for each power of two, with a bar."""
    exponents = np.floor(np.log2(lengths)).astype(int)
    counts = np.bincount(exponents)
    return [
        f"{f'{2**i:,} to {2 ** (i + 1) - 1:,}':>24} {count:12,} {'#' * -(-BAR * int(count) // int(counts.max()))}"
        for i, count in enumerate(counts)
        if i >= exponents.min()
    ]
