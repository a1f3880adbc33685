"""Token shards: how the tokens of a prepared corpus lie on disk, and how they are written.

A shard is a 1-D .npy file of token ids, train_00000.npy, ... and val_00000.npy, ..., uint16 if the vocabulary fits and
uint32 otherwise. Every document starts with `<|endoftext|>`, if the tokenizer has it, and may continue in the next
shard. manifest.json describes them: see manifest.py.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO

import numpy as np

from gpt2repro.files import file_sha256


SPLITS = ("train", "val")
UNITS = ("tokens", "documents", "bytes")  # in which the size of a split is counted; bytes are those of the UTF-8 text
NPY_HEADER_BYTES = 128  # of the files that ShardWriter writes


@dataclass(frozen=True)
class Shard:
    """One file of tokens.

    file: its name in the directory.
    tokens: its length.
    documents: how many documents start in it; None: unknown, as in another trainer's files.
    sha256: of the file; None: unknown, likewise.
    offset: the byte at which the little-endian uint16 tokens of a raw file begin; None: an .npy file.
    """

    file: str
    tokens: int
    documents: int | None
    sha256: str | None
    offset: int | None = None

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Shard":
        """Raises KeyError or TypeError for a key that is missing or has another type, ValueError for another place."""
        file = checked_value(content, "file", str)
        if Path(file).name != file:
            raise ValueError(f"the shard {file!r} is not in the directory")
        return cls(
            file=file,
            tokens=checked_value(content, "tokens", int),
            documents=checked_value(content, "documents", int),
            sha256=checked_value(content, "sha256", str),
        )

    def to_dict(self) -> dict[str, Any]:
        return {"file": self.file, "tokens": self.tokens, "documents": self.documents, "sha256": self.sha256}


@dataclass(frozen=True)
class Split:
    """The training or validation split: its totals and its shards, in order.

    documents, bytes (of UTF-8 text): None if unknown, as in another trainer's files.
    """

    tokens: int
    documents: int | None
    bytes: int | None
    shards: tuple[Shard, ...] = ()

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Split":
        """Raises KeyError or TypeError for a key that is missing or has another type."""
        tokens, documents, text_bytes = (checked_value(content, unit, int) for unit in UNITS)
        return cls(tokens, documents, text_bytes, tuple(Shard.from_dict(shard) for shard in content["shards"]))

    def to_dict(self) -> dict[str, Any]:
        return {**self.totals(), "shards": [shard.to_dict() for shard in self.shards]}

    def totals(self) -> dict[str, int | None]:
        """The size in each of UNITS."""
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}


def checked_value(content: dict[str, Any], key: str, kind: type | UnionType) -> Any:
    """The value of a key of a JSON object. Raises KeyError if it is missing, TypeError if it has another type."""
    value = content[key]
    if not isinstance(value, kind):
        raise TypeError(f"{key} is {value!r}")
    return value


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def has_tokens(path: Path, tokens: int, dtype: np.dtype) -> bool:
    """Whether `path` is a shard of that many tokens, judged by the file's size."""
    return path.is_file() and path.stat().st_size == NPY_HEADER_BYTES + tokens * dtype.itemsize


def map_npy(path: Path) -> np.ndarray:
    """Memory-map a shard: (tokens,) uint16 or uint32.

    Raises:
        OSError or ValueError: it cannot be opened, or holds something else.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError("it is not a file")
    tokens = np.lib.format.open_memmap(path, mode="r")
    if tokens.dtype not in (np.uint16, np.uint32) or tokens.ndim != 1:
        raise ValueError(f"it holds {tokens.dtype} in {tokens.ndim} dimensions, not uint16 or uint32 in one")
    return tokens


class ShardWriter:
    """Writes tokens to `{name}_00000.npy`, ..., byte for byte as numpy.save would, through a small buffer.

    A shard gets its name once it is complete and flushed. A caller that does not finish() must discard().

    Args:
        directory: where the shards go.
        name: prefix of the file names.
        shard_tokens: tokens in each shard but the last.
        eot_id: the id that opens each document, or None.
    """

    BUFFER_TOKENS = 2**20

    def __init__(self, directory: Path, name: str, dtype: np.dtype, shard_tokens: int, eot_id: int | None):
        self.directory, self.name, self.dtype, self.shard_tokens = directory, name, dtype, shard_tokens
        self.opening = np.array([] if eot_id is None else [eot_id], dtype)
        self.file: BinaryIO | None = None  # the shard that is being written
        self.buffer: list[np.ndarray] = []
        self.buffered = 0  # tokens in the buffer
        self.filled = 0  # tokens of the current shard
        self.starts = 0  # documents that start in the current shard
        self.shards: list[Shard] = []
        self.tokens = self.documents = self.bytes = 0

    def add(self, tokens: Sequence[int] | np.ndarray, text_bytes: int) -> None:
        """Append one document, whose text has that many bytes of UTF-8."""
        if self.filled == self.shard_tokens and len(self.opening) + len(tokens):
            self._close()  # so that the document counts for the shard that holds its first token
        self.starts += 1
        self.documents += 1
        self.bytes += text_bytes
        self._append(self.opening)
        self._append(np.asarray(tokens, self.dtype))

    def _append(self, array: np.ndarray) -> None:
        self.tokens += len(array)
        while len(array):
            if self.filled == self.shard_tokens:
                self._close()
            part = array[: self.shard_tokens - self.filled]
            self.buffer.append(part)
            self.buffered += len(part)
            self.filled += len(part)
            if self.buffered >= self.BUFFER_TOKENS:
                self._write_buffer()
            array = array[len(part) :]

    @property
    def _path(self) -> Path:
        return self.directory / f"{self.name}_{len(self.shards):05d}.npy"

    def _write_buffer(self) -> BinaryIO:
        if self.file is None:
            self.file = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp").open("w+b")
            self._write_header(self.file, 0)
        if self.buffer:
            self.file.write(np.concatenate(self.buffer).tobytes())
        self.buffer, self.buffered = [], 0
        return self.file

    def _write_header(self, file: BinaryIO, tokens: int) -> None:
        """numpy pads the header, so one with another number of tokens has the same length."""
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (tokens,)}
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)

    def _close(self) -> None:
        file = self._write_buffer()
        self._write_header(file, self.filled)
        file.flush()
        os.fsync(file.fileno())
        file.close()
        sha256 = file_sha256(Path(file.name))
        Path(file.name).replace(self._path)
        shard = Shard(self._path.name, self.filled, self.starts, sha256)
        self.file = None
        self.shards.append(shard)
        self.filled = self.starts = 0

    def finish(self) -> Split:
        """Write what is buffered; returns the split as the manifest records it."""
        if self.filled:
            self._close()
        return Split(self.tokens, self.documents, self.bytes, tuple(self.shards))

    def discard(self) -> None:
        """Delete the shard that is not complete."""
        if self.file is not None:
            Path(self.file.name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # no space for what is still buffered
                self.file.close()
            self.file = None
