"""A split's shards as one long sequence of tokens, memory-mapped."""

import dataclasses
import errno
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from gpt2repro.data.manifest import Manifest, remedy
from gpt2repro.data.shards import map_npy
from gpt2repro.errors import CHECK_PERMISSIONS, UserError, first_line


LARGEST_EXPONENT = 700.0  # e to more is no float64; only a broken model gets there
MAPPED_SHARDS = 128  # memory maps a process keeps: each holds a file open, and processes are usually limited to 1024


@dataclass(frozen=True)
class TokenStream:
    """The shards of one split, memory-mapped as they are read.

    lengths: tokens of each shard.
    offsets: byte offset of the first token in a raw uint16 file; None for an .npy file.
    vocab_size: token ids are below it.
    """

    paths: tuple[Path, ...]
    lengths: tuple[int, ...]
    offsets: tuple[int | None, ...]
    vocab_size: int

    @classmethod
    def open(cls, data_dir: str | Path, split: str, manifest: Manifest | None = None) -> "TokenStream":
        """Open the `split` ("train" or "val") of a prepared directory or of another trainer's folder.

        Args:
            manifest: of that directory, if the caller has opened it already.
        Raises:
            UserError: the directory is unfinished, or a shard is missing or of the wrong length.
        """
        manifest = manifest or Manifest.open(data_dir)
        shards = manifest.splits[split].shards
        stream = cls(
            paths=tuple(Path(data_dir) / shard.file for shard in shards),
            lengths=tuple(shard.tokens for shard in shards),
            offsets=tuple(shard.offset for shard in shards),
            vocab_size=manifest.tokenizer.vocab_size,
        )
        for path, expected, tokens in zip(stream.paths, stream.lengths, stream.arrays()):
            if len(tokens) != expected:
                raise UserError(
                    f"{path} holds {len(tokens):,} tokens, the manifest says {expected:,}; {remedy(data_dir)}"
                )
        return stream

    def arrays(self) -> Iterator[np.ndarray]:
        """The shards in order, each a memory map."""
        return map(map_shard, self.paths, self.offsets, self.lengths)

    @cached_property
    def _number(self) -> int:
        """Tells the streams of a process apart: a later one may find other files of the same names."""
        return next(_stream_numbers)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.lengths)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict:
        fields = dataclasses.fields(self)  # without the memory maps: each worker process opens its own
        return {field.name: getattr(self, field.name) for field in fields}

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens start ... start + length - 1, across shard boundaries.

        Returns:
            (length,) int64.
        Raises:
            UserError: a token id is outside the vocabulary.
        """
        out = np.empty(length, np.int64)
        done = 0
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while done < length:
            offset = start + done - (int(self._ends[shard]) - self.lengths[shard])
            tokens = _kept_map(self._number, self.paths[shard], self.offsets[shard], self.lengths[shard])
            part = tokens[offset : offset + length - done]
            out[done : done + len(part)] = part
            done += len(part)
            shard += 1
        largest = out.max(initial=0)
        if largest >= self.vocab_size:
            path = self.paths[np.searchsorted(self._ends, start + out.argmax(), side="right")]
            raise UserError(
                f"{path} holds token {largest}, but its tokenizer has the ids 0 to {self.vocab_size - 1}: the file is "
                f"damaged or was made with another tokenizer; {remedy(path.parent)}"
            )
        return out

    def counts(self, vocab_size: int) -> np.ndarray:
        """(vocab_size,) int64: how often each token occurs."""
        counts = np.zeros(vocab_size, np.int64)
        for tokens in self.arrays():
            for first in range(0, len(tokens), 2**24):  # in pieces, because bincount copies its argument to int64
                counts += np.bincount(tokens[first : first + 2**24], minlength=vocab_size)[:vocab_size]
        return counts


def map_shard(path: Path, offset: int | None, tokens: int) -> np.ndarray:
    """Memory-map an .npy file, or the `tokens` raw uint16 values that start at byte `offset` of another file.

    Raises:
        UserError: the file cannot be opened.
    """
    try:
        return map_npy(path) if offset is None else np.memmap(path, "<u2", "r", offset, tokens)
    except (OSError, ValueError, EOFError) as error:
        what_to_do = remedy(path.parent) if offset is None else "copy it again"
        if isinstance(error, PermissionError):
            what_to_do = CHECK_PERMISSIONS
        if getattr(error, "errno", None) == errno.EMFILE:
            what_to_do = "raise the limit on open files with `ulimit -n`"
        raise UserError(f"shard {path} cannot be opened ({first_line(error)}); {what_to_do}") from error


_stream_numbers = itertools.count()


@lru_cache(MAPPED_SHARDS)
def _kept_map(stream: int, path: Path, offset: int | None, tokens: int) -> np.ndarray:
    """`map_shard`, for all streams of this process together: a mixture may have hundreds."""
    return map_shard(path, offset, tokens)


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy of the token frequencies, in nats per token: the loss of a model that has learned only how frequent each
    token is.

    Args:
        counts: (V,) int64 or float64, each token's count or share.
    """
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def perplexity(loss: float) -> float:
    """e to a loss in nats; of a broken model, whose perplexity is no float, the largest power that is one."""
    return math.exp(min(loss, LARGEST_EXPONENT))


def perplexity_text(loss: float) -> str:
    """The perplexity for readers."""
    value = perplexity(loss)
    return f"{value:.2f}" if value < 1e9 else f"{value:.2g}"


def bits_per_byte(loss: float, tokens: int, text_bytes: int | None) -> float | None:
    """The loss of a split in bits per byte of its text, which makes tokenizers comparable.

    Args:
        loss: nats per token.
        tokens, text_bytes: totals of the split; text_bytes is None if unknown, as for another trainer's tokens.
    Returns:
        None if text_bytes is unknown.
    """
    if not text_bytes:
        return None
    return loss / math.log(2) * tokens / text_bytes
