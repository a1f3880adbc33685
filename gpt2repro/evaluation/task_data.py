"""The data of a task: a local file, or a dataset on the Hub, which is asked once before `datasets` asks for longer."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi, constants

from gpt2repro.data.hub import HUB_TIMEOUT
from gpt2repro.errors import UserError, first_line


@dataclass(frozen=True)
class HubSource:
    """A split of a dataset on the Hub.

    column: the one that holds the texts.
    revision: a branch or commit; None: main.
    folder: where its files lie; None: as the dataset's card says.
    """

    hub_id: str
    config: str | None
    split: str
    column: str
    revision: str | None = None
    folder: str | None = None

    def __str__(self) -> str:
        config = f", {self.config}" if self.config else ""
        return f"{self.hub_id}{config}, {self.split}"


def hub_texts(source: HubSource, title: str, remedy: str) -> list[str]:
    """The column of texts.

    Args:
        title: of the task, for the message.
        remedy: how a local file is given instead.
    Raises:
        UserError: the Hub is unreachable or has no such data.
    """
    try:
        _ask_hub_once(source)
        rows = datasets.load_dataset(
            source.hub_id, source.config, data_dir=source.folder, split=source.split, revision=source.revision
        )
        return list(rows[source.column])
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(cannot_download(error, source, title, remedy)) from error


def download_problems(source: HubSource, title: str, remedy: str) -> list[str]:
    """One line if `hub_texts` cannot get the data."""
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
        text = _read_bytes(path).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
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
        lines = _read_bytes(path).splitlines()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{what}: cannot be read ({first_line(error)}); give a .jsonl or .jsonl.gz file") from error
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({first_line(error)}); correct or remove the line") from error


def _read_bytes(path: str | Path) -> bytes:
    content = Path(path).read_bytes()
    return gzip.decompress(content) if str(path).endswith(".gz") else content
