"""Atomic writes: a file or folder is written under a temporary name, flushed to disk, and renamed once complete."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from gpt2repro.errors import UserError, first_line


def flush(path: Path) -> None:
    """fsync a file, or the entries of a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: readers see the old content or the new, even after a power loss."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Write a folder atomically, replacing an older one of the same name.

    Yields:
        writing_NAME, an empty folder beside it to write into. When the block ends, its files are flushed and it is
        renamed to NAME. The older folder is moved aside before and deleted after that, so that a complete one exists
        at every moment. If the block raises, writing_NAME is deleted and the older folder stays.
    """
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
    replaced = _move_aside(folder) if folder.exists() else None
    temporary.rename(folder)
    flush(folder.parent)
    if replaced is not None:
        delete(replaced)


def delete_folder(folder: Path) -> None:
    """Delete a folder atomically: it is renamed first, so that an interruption leaves no partial folder of its name."""
    delete(_move_aside(folder))


def delete_unfinished(parent: Path) -> None:
    """Delete what interrupted calls of `new_folder` and `delete_folder` left in a directory."""
    for leftover in (*parent.glob("writing_*"), *parent.glob("removing_*")):
        delete(leftover)


def delete(folder: Path) -> None:
    """Delete a folder if it exists. Errors are ignored: NFS keeps files that a process has open."""
    shutil.rmtree(folder, ignore_errors=True)


def _move_aside(folder: Path) -> Path:
    aside = folder.with_name(f"removing_{folder.name}")
    delete(aside)
    return folder.rename(aside)


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
        raise UserError(busy) from error
    return lock


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_problem(path: Path, sha256: str | None, recorded: str = "the manifest's") -> str | None:
    """What is wrong with a file; None if its content has the recorded hash.

    Args:
        recorded: how the message refers to that hash.
    """
    if not path.is_file():
        return f"{path} is missing"
    try:
        found = file_sha256(path)
    except OSError as error:
        return f"{path} cannot be read ({first_line(error)})"
    return None if found == sha256 else f"{path} is damaged: its sha256 differs from {recorded}"
