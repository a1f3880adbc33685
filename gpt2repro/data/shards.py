"""Token shards: how a prepared corpus lies on disk, and how it is read.

A prepared directory holds train_00000.npy, ... and val_00000.npy, ... (1-D arrays of token ids), the tokenizer, and
manifest.json, which is written last: a directory without one is unfinished. Every document starts with
`<|endoftext|>`, where the tokenizer has such a token, and may run on into the next shard.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gpt2repro.data.foreign_tokens import foreign_format, foreign_manifest
from gpt2repro.errors import UserError, first_line


FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
HEADER_BYTES = 128  # of the .npy files that ShardWriter writes
MAPPED_SHARDS = 128  # of a stream at a time: each keeps a file open, of which 1024 are a usual limit


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def has_tokens(path: Path, tokens: int, dtype: np.dtype) -> bool:
    """Whether there is a shard of so many tokens, by its size."""
    return path.is_file() and path.stat().st_size == HEADER_BYTES + tokens * dtype.itemsize


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file that is complete or absent."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """See to it that a file, or the names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ShardWriter:
    """Writes tokens to `{name}_00000.npy`, ..., as numpy.save would, through a small buffer.

    A shard has another name until it is complete and on disk. Whoever does not finish() must discard().

    Args:
        directory: where the shards go.
        name: what their names begin with.
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
        self.filled = self.starts = 0  # tokens of the shard, and documents that start in it
        self.shards: list[dict] = []
        self.tokens = self.documents = self.bytes = 0

    def add(self, tokens: Sequence[int] | np.ndarray, text_bytes: int) -> None:
        """Append one document of that many bytes of UTF-8."""
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
                self._write()
            array = array[len(part) :]

    @property
    def _path(self) -> Path:
        return self.directory / f"{self.name}_{len(self.shards):05d}.npy"

    def _write(self) -> BinaryIO:
        if self.file is None:
            self.file = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp").open("w+b")
            self._write_header(self.file, 0)
        if self.buffer:
            self.file.write(np.concatenate(self.buffer).tobytes())
        self.buffer, self.buffered = [], 0
        return self.file

    def _write_header(self, file: BinaryIO, tokens: int) -> None:
        """numpy leaves room in it, so that a header with another number of tokens has the same length."""
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (tokens,)}
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)

    def _close(self) -> None:
        file = self._write()
        self._write_header(file, self.filled)
        file.flush()
        os.fsync(file.fileno())
        file.close()
        sha256 = file_sha256(Path(file.name))
        Path(file.name).replace(self._path)
        shard = {"file": self._path.name, "tokens": self.filled, "documents": self.starts, "sha256": sha256}
        self.file = None
        self.shards.append(shard)
        self.filled = self.starts = 0

    def finish(self) -> dict:
        """Write what is left; returns the manifest's record of the split."""
        if self.filled:
            self._close()
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes, "shards": self.shards}

    def discard(self) -> None:
        """Remove a shard that is not complete."""
        if self.file is not None:
            Path(self.file.name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # no space for what is still buffered
                self.file.close()
            self.file = None


def read_manifest(data_dir: str | Path) -> dict:
    """The manifest of a prepared directory.

    Raises:
        UserError: the directory is missing, unfinished, or of another format version.
    """
    path = Path(data_dir) / MANIFEST
    if not path.parent.is_dir():
        raise UserError(f"data directory {data_dir} does not exist; make it with `python prepare_data.py`")
    if not path.exists():
        if name := foreign_format(path.parent):
            raise UserError(
                f"{data_dir} holds {name}'s tokens, which have no {MANIFEST} that describes them; train on them as "
                "they are, or prepare the text with `python prepare_data.py`"
            )
        raise UserError(
            f"data directory {data_dir} has no {MANIFEST}, so its preparation is unfinished; "
            "repeat the `python prepare_data.py` command that started it"
        )
    try:
        manifest = json.loads(path.read_text())
        version = manifest.get("format_version")
        if version == FORMAT_VERSION:
            _touch(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); {again(data_dir)}") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}, this program reads {FORMAT_VERSION}; {again(data_dir)}")
    return manifest


def again(data_dir: str | Path) -> str:
    """The remedy for what is damaged."""
    return f"prepare the data again: delete {data_dir} and repeat the `python prepare_data.py` command that made it"


def _touch(manifest: dict) -> None:
    """Raise what the lack of a key raises."""
    for key in ("vocab_size", "eot_id", "name", "sha256"):
        manifest["tokenizer"][key]
    for name in SPLITS:
        split = manifest["splits"][name]
        for unit in ("tokens", "documents", "bytes"):
            split[unit] + 0
        for shard in split["shards"]:
            shard["file"] + shard["sha256"]
            shard["tokens"] + shard["documents"]


def unsound(data_dir: str | Path, manifest: dict) -> list[str]:
    """What is wrong with a prepared directory at first sight: shards that are missing or have another size."""
    dtype = token_dtype(manifest["tokenizer"]["vocab_size"])
    listed = [shard for split in SPLITS for shard in manifest["splits"][split]["shards"]]
    paths = [(Path(data_dir) / shard["file"], shard["tokens"]) for shard in listed]
    return [f"{path} is missing or has another size" for path, n in paths if not has_tokens(path, n, dtype)]


def find_manifest(data_dir: str | Path) -> dict:
    """The manifest of a prepared directory, or the like of it for a folder with another trainer's tokens; and
    `manifest_sha256`, by which a run knows its data again.

    Raises:
        UserError: neither of the two, unfinished or damaged.
    """
    path = Path(data_dir) / MANIFEST
    if not path.exists() and (manifest := foreign_manifest(path.parent)):
        return manifest
    return read_manifest(data_dir) | {"manifest_sha256": file_sha256(path)}


def seal(manifest: dict) -> dict:
    """The manifest with a hash of itself, so that an edit shows."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return content | {"sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def verify(data_dir: str | Path, num_workers: int = 1, progress: Callable = iter) -> dict:
    """Compare every shard, and the tokenizer, with the manifest, and the manifest with itself.

    Args:
        num_workers: threads; hashing and counting leave them to work side by side.
        progress: wraps the iterable of shards, e.g. tqdm.
    Returns:
        The manifest.
    Raises:
        UserError: one line for each file that is missing or damaged.
    """
    root = Path(data_dir)
    manifest = read_manifest(root)
    if manifest != seal(manifest):
        raise UserError(f"{root / MANIFEST} was changed after it was written; {again(root)}")
    tokenizer = manifest["tokenizer"]
    listed = [shard for split in SPLITS for shard in manifest["splits"][split]["shards"]]
    with ThreadPoolExecutor(num_workers) as pool:
        found = pool.map(lambda shard: _shard_problem(root / shard["file"], shard, tokenizer), listed)
        problems = [problem for problem in progress(found) if problem]
    for name, split in manifest["splits"].items():
        for unit in ("tokens", "documents"):
            total = sum(shard[unit] for shard in split["shards"])
            if split[unit] != total:
                problems.append(f"{root / MANIFEST}: {name} has {split[unit]:,} {unit}, its shards have {total:,}")
    hashes = manifest.get("tokenizer_files", {"tokenizer.json": tokenizer["sha256"]})
    problems += filter(None, (file_problem(root / "tokenizer" / name, sha256) for name, sha256 in hashes.items()))
    if problems:
        raise UserError("\n".join(f"{problem}; {again(root)}" for problem in problems))
    return manifest


def verify_once(data_dir: str | Path, verified: dict[str, list[int]]) -> dict[str, list[int]]:
    """Compare the shards with the manifest's hashes, but for those that have not changed since the last call.

    Args:
        verified: what the last call returned: size in bytes and time of change in ns of each shard.
    Raises:
        UserError: one line for each shard that is missing or not what was prepared. Another trainer's files have no
            hashes, and pass.
    """
    root, seen, todo = Path(data_dir), {}, {}
    for shard in (shard for split in find_manifest(root)["splits"].values() for shard in split["shards"]):
        path = root / shard["file"]
        if path.exists():
            seen[str(path)] = [path.stat().st_size, path.stat().st_mtime_ns]
        if shard.get("sha256") and verified.get(str(path)) != seen.get(str(path), []):
            todo[path] = shard["sha256"]
    with ThreadPoolExecutor() as pool:  # hashing leaves them to work side by side
        problems = [problem for problem in pool.map(file_problem, todo, todo.values()) if problem]
    if problems:
        raise UserError("\n".join(f"{problem}; {again(root)}" for problem in problems))
    return seen


def file_problem(path: Path, sha256: str, recorded: str = "the manifest's") -> str | None:
    """Why a file is not the one with that hash, which `recorded` names; None: it is."""
    if not path.is_file():
        return f"{path} is missing"
    try:
        return None if file_sha256(path) == sha256 else f"{path} is damaged: its sha256 differs from {recorded}"
    except OSError as error:
        return f"{path} cannot be read ({first_line(error)})"


def _shard_problem(path: Path, shard: dict, tokenizer: dict) -> str | None:
    if problem := file_problem(path, shard["sha256"]):
        return problem
    tokens = np.load(path, mmap_mode="r")
    if len(tokens) != shard["tokens"]:
        return f"{path} holds {len(tokens):,} tokens, the manifest says {shard['tokens']:,}"
    if (largest := int(tokens.max(initial=0))) >= tokenizer["vocab_size"]:
        return f"{path} holds token {largest}, above the vocabulary"
    if tokenizer["eot_id"] is not None:  # it stands nowhere else: in a document's text it is ordinary text
        starts = int(np.count_nonzero(tokens == tokenizer["eot_id"]))
        if starts != shard["documents"]:
            return f"{path}: {starts:,} documents start there, the manifest says {shard['documents']:,}"
    return None


def map_shard(path: Path, offset: int | None, tokens: int) -> np.ndarray:
    """The tokens of an .npy file, or of a raw file so many uint16 from that byte on, memory-mapped.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        return np.load(path, mmap_mode="r") if offset is None else np.memmap(path, "<u2", "r", offset, tokens)
    except (OSError, ValueError, EOFError) as error:
        remedy = again(path.parent) if offset is None else "copy it again"
        if getattr(error, "errno", None) == errno.EMFILE:
            remedy = "allow this process more open files with `ulimit -n`"
        raise UserError(f"shard {path} cannot be opened ({first_line(error)}); {remedy}") from error


@dataclass(frozen=True)
class TokenStream:
    """The shards of one split as one long sequence of tokens, memory-mapped when they are read."""

    paths: tuple[Path, ...]
    lengths: tuple[int, ...]
    offsets: tuple[int | None, ...]  # the byte where the tokens of a raw uint16 file begin; None: an .npy file
    vocab_size: int

    @classmethod
    def open(cls, data_dir: str | Path, split: str) -> "TokenStream":
        """The `split` ("train" or "val") of a prepared directory or of another trainer's folder.

        Raises:
            UserError: unfinished directory, or a shard that is missing or has another number of tokens.
        """
        manifest = find_manifest(data_dir)
        shards = manifest["splits"][split]["shards"]
        stream = cls(
            tuple(Path(data_dir) / shard["file"] for shard in shards),
            tuple(shard["tokens"] for shard in shards),
            tuple(shard.get("offset") for shard in shards),
            manifest["tokenizer"]["vocab_size"],
        )
        for path, expected, tokens in zip(stream.paths, stream.lengths, stream.arrays()):
            if len(tokens) != expected:
                raise UserError(
                    f"{path} holds {len(tokens):,} tokens, the manifest says {expected:,}; {again(data_dir)}"
                )
        return stream

    def arrays(self) -> Iterator[np.ndarray]:
        """The shards, one after another."""
        return map(map_shard, self.paths, self.offsets, self.lengths)

    @cached_property
    def _mapped(self) -> Callable[[Path, int | None, int], np.ndarray]:
        return lru_cache(MAPPED_SHARDS)(map_shard)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.lengths)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict:
        fields = dataclasses.fields(self)  # without the maps: a worker process maps the files for itself
        return {field.name: getattr(self, field.name) for field in fields}

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens start ... start + length - 1, across shard borders where need be.

        Returns:
            (length,) int64.
        Raises:
            UserError: one of them is no id of the vocabulary.
        """
        out = np.empty(length, np.int64)
        done = 0
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while done < length:
            offset = start + done - (int(self._ends[shard]) - self.lengths[shard])
            tokens = self._mapped(self.paths[shard], self.offsets[shard], self.lengths[shard])
            part = tokens[offset : offset + length - done]
            out[done : done + len(part)] = part
            done += len(part)
            shard += 1
        if (largest := out.max(initial=0)) >= self.vocab_size:
            path = self.paths[np.searchsorted(self._ends, start + out.argmax(), side="right")]
            raise UserError(
                f"{path} holds token {largest}, but its tokenizer has the ids 0 to {self.vocab_size - 1}: it is "
                f"damaged or of another tokenizer; {again(path.parent)}"
            )
        return out

    def counts(self, vocab_size: int) -> np.ndarray:
        """(vocab_size,) int64: how often each token occurs."""
        counts = np.zeros(vocab_size, np.int64)
        for tokens in self.arrays():
            for first in range(0, len(tokens), 2**24):  # bincount copies its argument to int64
                counts += np.bincount(tokens[first : first + 2**24], minlength=vocab_size)[:vocab_size]
        return counts


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats per token of a text whose tokens are drawn independently: the loss of a model that has learnt
    nothing but how frequent each token is.

    Args:
        counts: (V,) int64 or float64, how often each token occurs, or its share.
    """
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
