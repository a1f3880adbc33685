"""What is known of OpenAI's GPT-2, from published.yaml: its sizes and the scores that others have published."""

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml


PREFIX = "openai-community/"


@dataclass(frozen=True)
class OpenAIModel:
    """One of the four sizes; `name` is its short one on the Hub, such as gpt2-xl."""

    name: str
    abbreviation: str
    parameters: int
    layers: int
    heads: int
    width: int

    @property
    def title(self) -> str:
        """As in "gpt2 (124M)"."""
        return f"{self.name} ({self.abbreviation})"


@dataclass(frozen=True)
class PublishedScore:
    """The figure of one model.

    value: in the metric's unit.
    same_method: it was measured as ours are, so that a difference means something.
    note: what is special about it; not None if it has another method, or `tokens`.
    tokens: a loss is of so many from the start of the validation split; None: that is not known, or it is no loss.
    """

    value: float
    source: str
    same_method: bool
    note: str | None
    tokens: int | None = None

    def is_comparable(self, tokens: int | None) -> bool:
        """Whether a difference from a score of ours, on so many tokens, means something."""
        return self.same_method and self.tokens in (None, tokens)


def preparation_caveat(data: dict[str, Any]) -> str | None:
    """Why published losses, of GPT-2's tokens and the first documents, are not of a run's validation split; None: they
    are, as far as its preparation says.

    Args:
        data: what recipe.yaml records of the data.
    """
    if data["tokenizer"]["name"] != "gpt2":
        return f"here the tokenizer is {data['tokenizer']['name']}"
    if data.get("validation") == "chosen by hash":
        return "here the validation documents are chosen by hash"
    return "here the corpus is deduplicated" if data.get("deduplicated") else None


@cache
def _content() -> dict[str, Any]:
    return yaml.safe_load((resources.files(__package__) / "published.yaml").read_text(encoding="utf-8"))


@cache
def openai_models() -> dict[str, OpenAIModel]:
    """By name, from the smallest to the largest."""
    return {name: OpenAIModel(name, **fields) for name, fields in _content()["models"].items()}


def openai_model(name: str) -> OpenAIModel | None:
    """OpenAI's model of that name, as a user or as the Hub writes it; None: it is none of them."""
    return openai_models().get(name.removeprefix(PREFIX))


def published_score(model: str, metric: str, corpus: str | None = None) -> PublishedScore | None:
    """The published score of one of OpenAI's models; None if there is none.

    Args:
        model: its name.
        metric: its key.
        corpus: the data, as `corpus_identity` names it; a validation loss holds for some corpora only.
    """
    for entry in _content()["scores"]:
        is_of_corpus = corpus in entry.get("corpora", [corpus])
        if entry["metric"] == metric and model in entry["values"] and is_of_corpus:
            fields = {name: entry.get(name) for name in ("source", "same_method", "note", "tokens")}
            return PublishedScore(entry["values"][model], **fields)
    return None


def gpt3_hellaswag(model: str) -> float:
    """HellaSwag acc_norm of the GPT-3 of about the size of one of OpenAI's GPT-2."""
    return _content()["gpt3_hellaswag"][model]
