"""Published scores of OpenAI's GPT-2, from published.yaml."""

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml


PREFIX = "openai-community/"


@dataclass(frozen=True)
class PublishedScore:
    """value: in the metric's unit. same_method: it was measured as ours are, so that a difference means something."""

    value: float
    source: str
    same_method: bool
    note: str | None


@cache
def _content() -> dict[str, Any]:
    return yaml.safe_load((resources.files(__package__) / "published.yaml").read_text(encoding="utf-8"))


def openai_size(name: str) -> str | None:
    """gpt2, gpt2-medium, gpt2-large or gpt2-xl, if a name is one of them, as a user or as the Hub writes it."""
    short = name.removeprefix(PREFIX)
    return short if short in _content()["models"] else None


def openai_title(size: str) -> str:
    """As in "gpt2 (124M)"."""
    return _content()["models"][size]["title"]


def openai_titles() -> list[str]:
    return [openai_title(size) for size in _content()["models"]]


def openai_parameters(size: str) -> int:
    return _content()["models"][size]["parameters"]


def published_score(size: str, metric: str, hub_id: str | None) -> PublishedScore | None:
    """The published score of one of OpenAI's models; None if there is none.

    Args:
        metric: its key.
        hub_id: of the data; a validation loss holds for one corpus only.
    """
    for entry in _content()["scores"]:
        is_other_corpus = "corpus" in entry and entry["corpus"] != hub_id
        if entry["metric"] == metric and size in entry["values"] and not is_other_corpus:
            return PublishedScore(entry["values"][size], entry["source"], entry["same_method"], entry.get("note"))
    return None
