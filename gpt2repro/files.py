"""Atomic writes: a file or folder is written under a temporary name, flushed to disk, and renamed once complete."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gpt2repro.errors import CHECK_PERMISSIONS, UserError, first_line


CHECKOUT = Path(__file__).resolve().parents[1]  # the root of the checkout, if this is one
REPLACED = "replaced_"
SAMPLE_BLOCKS, SAMPLE_BLOCK = 16, 4096  # bytes a block
SCRATCH, SCRATCH_LOCK = "unfinished_gpt2repro_", ".lock"


def flush(path: Path) -> None:
    """fsync a file, or the entries of a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: readers see the old content or the new one, even after a power loss."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def is_special(path: Path) -> bool:
    """Whether a path is a pipe, socket or device, which may block its reader for ever or have no end."""
    return path.exists() and not path.is_file() and not path.is_dir()


def write_problem(folder: Path) -> str | None:
    """Why nothing can be written to a folder, which may not exist yet; None if it can. Creates nothing."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        return f"{existing} is a file"
    try:
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return f"{existing} cannot be written ({error.strerror})"


def append_problem(file: Path) -> str | None:
    """Why nothing can be appended to a file; None if it can, or if there is no such file."""
    try:
        if file.exists():
            file.open("ab").close()
        return None
    except OSError as error:
        return f"{file} cannot be written ({error.strerror})"


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Write a folder atomically, replacing an older one of the same name.

    Yields:
        writing_NAME, an empty folder beside it to write into. When the block ends, its files are flushed and it is
        renamed to NAME; the older folder is renamed to replaced_NAME before and deleted after that. A crash in between
        leaves replaced_NAME, which the next call of `new_folder` or `delete_unfinished` gives its name back. If the
        block raises, writing_NAME is deleted and the older folder stays.
    """
    _recover(folder)
    temporary = folder.with_name(f"writing_{folder.name}")
    delete(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            flush(path)
    except BaseException:
        delete(temporary)
        raise
    replaced = folder.with_name(f"{REPLACED}{folder.name}")
    if folder.exists():
        folder.rename(replaced)
    temporary.rename(folder)
    flush(folder.parent)
    delete(replaced)


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder in `parent` under a name of its own, empty but for a lock file, deleted at the end. Those that killed
    processes left there are deleted first: their locks are free."""
    for leftover in parent.glob(f"{SCRATCH}*"):
        with contextlib.suppress(UserError, OSError):
            lock = acquire_lock(leftover / SCRATCH_LOCK, busy=f"{leftover} is in use")
            delete(leftover)
            lock.release()
    scratch = Path(tempfile.mkdtemp(dir=parent, prefix=SCRATCH))
    busy = f"{scratch} is in use"  # for a moment: another process takes it for a leftover until it is locked
    lock = acquire_lock(scratch / SCRATCH_LOCK, busy, timeout=60)
    try:
        yield scratch
    finally:
        delete(scratch)
        lock.release()


def delete_folder(folder: Path) -> None:
    """Delete a folder atomically: it is renamed first, so that an interruption leaves no partial folder of its name."""
    renamed = folder.with_name(f"removing_{folder.name}")
    delete(renamed)
    delete(folder.rename(renamed))


def delete_unfinished(parent: Path) -> None:
    """Clean up after interrupted calls of `new_folder` and `delete_folder` in a directory."""
    for replaced in parent.glob(f"{REPLACED}*"):
        _recover(parent / replaced.name.removeprefix(REPLACED))
    for leftover in (*parent.glob("writing_*"), *parent.glob("removing_*")):
        delete(leftover)


def delete(folder: Path) -> None:
    """Delete a folder if it exists. Errors are ignored: NFS keeps files that a process has open."""
    shutil.rmtree(folder, ignore_errors=True)


def _recover(folder: Path) -> None:
    """Finish a replacement that was interrupted: the older folder gets its name back if the new one has not got it."""
    replaced = folder.with_name(f"{REPLACED}{folder.name}")
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)
    delete(replaced)


def holds_only(folder: Path, names: set[str]) -> bool:
    """Whether a folder is absent, or holds nothing but these names."""
    if not folder.exists():
        return True
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= names


def acquire_lock(path: Path, busy: str, timeout: float = 0.0) -> FileLock:
    """Take the lock file `path`; the operating system releases it when the process dies.

    Args:
        busy: the error message if another process holds it.
        timeout: seconds to wait for it.
    Raises:
        UserError: another process still holds it.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except Timeout as error:
        raise UserError(busy + _owner_of(path)) from error
    except NotImplementedError as error:  # older releases of filelock
        raise UserError(f"{path}: its file system has no locks; choose a directory on another") from error
    return lock


def _owner_of(path: Path) -> str:
    """How to free a lock on a file system without locks: there the file itself is the lock, outlives a killed process,
    and names it and its host. Otherwise nothing: the file is empty."""
    with contextlib.suppress(OSError, ValueError):
        process, host, *_ = path.read_text().split()
        return f"; if process {process} on {host} has ended, delete {path}"
    return ""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(content: Any) -> str:
    """SHA-256 of anything that JSON can hold, in hex."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode("utf-8")).hexdigest()


def file_sample(path: Path) -> str:
    """SHA-256 of a few blocks spread evenly over a file, its first and last included; a few milliseconds."""
    last = max(0, path.stat().st_size - SAMPLE_BLOCK)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for number in range(SAMPLE_BLOCKS):
            file.seek(last * number // (SAMPLE_BLOCKS - 1))
            digest.update(file.read(SAMPLE_BLOCK))
    return digest.hexdigest()


def file_problem(path: Path, sha256: str | None, recorded: str = "the manifest's") -> str | None:
    """What is wrong with a file; None if its content has the recorded hash.

    Args:
        recorded: how the message refers to that hash.
    Raises:
        UserError: the file may not be read, which is no damage.
    """
    if not path.is_file():
        return f"{path} is missing"
    try:
        found = file_sha256(path)
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); {CHECK_PERMISSIONS}") from error
    except OSError as error:
        return f"{path} cannot be read ({first_line(error)})"
    return None if found == sha256 else f"{path} is damaged: its sha256 differs from {recorded}"
