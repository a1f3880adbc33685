"""What of a run's record is for everyone: what is published names no path on the machine that ran it."""

from pathlib import Path
from typing import Any

from gpt2repro.data.manifest import corpus_title


REPORT_MARK = '<meta name="generator" content="gpt2repro">'  # tells a report of ours from other files
# Fields of recipe.yaml that are no settings of the recipe, or paths.
NOT_SETTINGS = ("data", "base_sha256", "versions", "hardware", "data_dir", "output_dir", "hellaswag_data")


def public_settings(record: dict[str, Any]) -> dict[str, Any]:
    """The recipe without paths."""
    settings = {name: value for name, value in record.items() if name not in NOT_SETTINGS}
    if "corpus" in settings:
        settings["corpus"] = corpus_title(record["data"]["corpus"])  # the recipe may have named another one
    settings["init_from"] = started_from(record)
    return settings


def sources_of(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of a mixture's directories, or of the single directory."""
    if not data:
        return []
    return data.get("sources", [data])


def origin(source: dict[str, Any]) -> str:
    """Hub id, configuration and commit of a corpus, or its name; in a mixture preceded by its share."""
    corpus = source["corpus"]
    share = f"{100 * source['weight']:g}% " if "weight" in source else ""
    if not corpus.get("revision"):  # a local folder has none
        return share + corpus_title(corpus)
    parts = [str(corpus[key]) for key in ("hub_id", "config", "revision") if corpus.get(key)]
    return share + ", ".join(parts)


def started_from(record: dict[str, Any]) -> str:
    return record.get("base_model") or public_name(record.get("init_from", "scratch"))


def public_name(name: str) -> str:
    """Hub ids and plain names as they are; of a path on the machine that ran it, only the last part."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    return Path(name).name if is_path else name
