"""What was measured once is not measured again: columns of a task, by the content of the model and of the task.

A cached file's name is a hash of everything that the numbers depend on, so a model that was changed, other data or a
newer method find none. It lies beside the model, in MODEL/.scores/, so that it goes where the model goes; for a model
of the Hub, or in a folder that cannot be written, in HF_HOME/gpt2repro/scores (by default in ~/.cache/huggingface).
Deleting either is safe.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from gpt2repro.evaluation.task import Columns, Task
from gpt2repro.files import content_sha256, file_sha256, write_problem, write_text
from gpt2repro.models.find import ADAPTER_CONFIG, adapter_base, is_adapter


FORMAT = 1
FOLDER = ".scores"
MODEL_FILES = (
    "*.safetensors",
    "*.bin",
    "*.index.json",
    "config.json",
    ADAPTER_CONFIG,
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.py",
)


def model_folder(path: str) -> Path | None:
    """Where the files of a model lie: its folder, its file, or its snapshot in the Hub's cache; None if not there."""
    if Path(path).exists():
        return Path(path)
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(path, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def model_sha256(path: Path) -> str:
    """Hash of the weights, the configuration, the tokenizer and the code of a model folder, or of a file; of an adapter
    and its base model; of a snapshot in the Hub's cache that of its commit, as its weights may not be downloaded yet.
    """
    if path.is_file():
        return file_sha256(path)
    if _is_of_hub(path) and path.parent.name == "snapshots":
        return content_sha256({"commit": path.name})
    files = {file.name: file for pattern in MODEL_FILES for file in path.glob(pattern)}
    hashes = {name: file_sha256(file) for name, file in sorted(files.items())}
    base = model_folder(adapter_base(path)) if is_adapter(path) else None
    if base is not None:
        hashes["base model"] = model_sha256(base)
    return content_sha256(hashes)


def cache_file(path: Path, model_hash: str, task: Task, settings: dict[str, Any]) -> Path:
    """The file that holds, or will hold, a task's columns.

    Args:
        path: the model's folder or file.
        settings: what else the numbers depend on: dtype, precision, stride, device, versions.
    """
    identity = {
        "format": FORMAT,
        "model": model_hash,
        "task": task.name,
        "version": task.version,
        "method": task.method,
        "data": task.data["sha256"],
        "settings": settings,
    }
    name = f"{task.name.replace(':', '_')}_{content_sha256(identity)[:24]}.json"
    return _cache_folder(path) / name


def _cache_folder(path: Path) -> Path:
    folder = path.parent if path.is_file() else path
    if _is_of_hub(folder) or write_problem(folder):
        from huggingface_hub import constants

        return Path(constants.HF_HOME) / "gpt2repro" / "scores"
    return folder / FOLDER


def _is_of_hub(folder: Path) -> bool:
    """Whether a folder lies in the Hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).resolve() in folder.resolve().parents


def read_cached(file: Path) -> tuple[int, Columns] | None:
    """The number of the model's parameters and the columns; None if there are none, or the file is damaged."""
    try:
        content = json.loads(file.read_text())
        columns = {name: np.array(values, np.float64) for name, values in content["columns"].items()}
        return int(content["parameters"]), columns
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def write_cached(file: Path, task: Task, parameters: int, columns: Columns) -> None:
    """Keep columns for later; a place that cannot be written is no reason to lose a measurement."""
    values = {name: column.tolist() for name, column in columns.items()}
    content = {"task": task.name, "method": task.method, "data": task.data, "parameters": parameters, "columns": values}
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(content))
