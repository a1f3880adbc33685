"""The data of a task: a local file, or a dataset on the Hub, which is asked once before `datasets` asks for longer."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2repro.data.hub import HUB_TIMEOUT
from gpt2repro.errors import UserError, first_line
from gpt2repro.files import is_special


if TYPE_CHECKING:
    from datasets import Dataset


READ_ERRORS = (OSError, EOFError, zlib.error)  # the last two: a truncated or damaged gzip file


@dataclass(frozen=True)
class HubSource:
    """A split of a dataset on the Hub.

    column: the one that holds the texts; None: a row is more than a text.
    revision: a branch or commit; None: main.
    folder: where its files lie; None: as the dataset's card says.
    """

    hub_id: str
    config: str | None
    split: str
    column: str | None = None
    revision: str | None = None
    folder: str | None = None

    def __str__(self) -> str:
        config = f", {self.config}" if self.config else ""
        return f"{self.hub_id}{config}, {self.split}"


def hub_rows(source: HubSource, title: str, remedy: str) -> "Dataset":
    """The rows of the split; with a `column` only that one.

    Args:
        title: of the task, for the message.
        remedy: how a local file is given instead.
    Raises:
        UserError: the Hub is unreachable or has no such data.
    """
    import datasets  # takes a second

    try:
        _ask_hub_once(source)
        rows = datasets.load_dataset(
            source.hub_id, source.config, data_dir=source.folder, split=source.split, revision=source.revision
        )
        return rows if source.column is None else rows.select_columns(source.column)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(cannot_download(error, source, title, remedy)) from error


def hub_texts(source: HubSource, title: str, remedy: str) -> list[str]:
    """The texts of a source's column. Arguments and errors as for `hub_rows`."""
    return list(hub_rows(source, title, remedy)[source.column])


def download_problems(source: HubSource, title: str, remedy: str) -> list[str]:
    """One line if `hub_rows` cannot get the data."""
    try:
        _ask_hub_once(source)
    except OSError as error:
        return [cannot_download(error, source, title, remedy)]
    return []


def cannot_download(error: Exception, source: HubSource, title: str, remedy: str) -> str:
    return f"{title} ({source}) cannot be downloaded from the Hub ({first_line(error)}); check the network, or {remedy}"


def _ask_hub_once(source: HubSource) -> None:
    """Raise a ConnectionError if the dataset is not in the cache and the Hub cannot be reached: `load_dataset` would
    try again for half a minute."""
    import datasets
    from huggingface_hub import HfApi, constants

    cached = Path(datasets.config.HF_DATASETS_CACHE) / source.hub_id.replace("/", "___")
    if cached.is_dir() or Path(source.hub_id).is_dir() or constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().dataset_info(source.hub_id, timeout=HUB_TIMEOUT)
    except Exception as error:  # network and permission errors share no base class
        raise ConnectionError(first_line(error)) from error


def read_text(path: str | Path, what: str) -> str:
    """The content of a text file, without a byte order mark.

    Args:
        what: the flag and value by which the user gave it, for the message.
    Raises:
        UserError: it cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = b"".join(_lines(path)).decode("utf-8-sig")
    except (*READ_ERRORS, UnicodeDecodeError) as error:
        raise UserError(f"{what}: cannot be read ({first_line(error)}); give a text file in UTF-8") from error
    if not text.strip():
        raise UserError(f"{what}: is empty; give a text file in UTF-8")
    return text


def read_json_lines(path: str | Path, what: str) -> Iterator[tuple[str, Any]]:
    """The values of a .jsonl or .jsonl.gz file, each with the file and line where it stands, for messages.

    Raises:
        UserError: the file cannot be read, or a line is not JSON; the message names the line.
    """
    try:
        for number, line in enumerate(_lines(path), start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, _parsed(line, where)
    except READ_ERRORS as error:
        raise UserError(f"{what}: cannot be read ({first_line(error)}); give a .jsonl or .jsonl.gz file") from error


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({first_line(error)}); correct or remove the line") from error


def _lines(path: str | Path) -> Iterator[bytes]:
    """The lines of a file, unpacked if it is a .gz.

    Raises:
        OSError: also for a pipe or device, which cannot be read twice.
    """
    if is_special(Path(path)):
        raise OSError("it is a pipe or device, which cannot be read twice")
    with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
        yield from file
