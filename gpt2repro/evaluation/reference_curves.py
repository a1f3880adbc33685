"""Known losses that a run can be compared with: curves of validation loss over training tokens, and OpenAI's levels.

reference_curves/NAME.yaml holds a curve:

    title       for people
    source      where the numbers come from, with their licence
    measured    by what, when, on which machine
    conditions  what a run must have in common with it (see CONDITIONS): where any of that differs, the same loss means
                something else
    settings    the recipe's other settings. A run may differ in them: they are what goes wrong
    spread      sigma and progress, by which equally good runs differ (see ReferenceCurve.deviation), and over how many
                runs the curve is the mean
    points      [tokens, nats per token], ascending, from the first validation after the first step on
"""

import bisect
import difflib
import math
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml

from gpt2repro.data.manifest import corpus_identity
from gpt2repro.errors import refuse
from gpt2repro.evaluation.hellaswag_items import FULL_SET
from gpt2repro.evaluation.published import (
    OpenAIModel,
    gpt3_hellaswag,
    openai_models,
    preparation_caveat,
    published_score,
)
from gpt2repro.model_fields import model_defaults


FOLDER = files("gpt2repro.evaluation") / "reference_curves"
SIGMAS = 4.0  # deviations between equally good runs that the tolerance allows for; a few runs tell their size roughly


@dataclass(frozen=True)
class ReferenceCurve:
    """The validation losses of a known run, or the mean of several. The fields are those of its file.

    tokens, losses: the points.
    """

    name: str
    title: str
    source: str
    measured: str
    conditions: dict[str, Any]
    settings: dict[str, Any]
    spread: dict[str, Any]
    tokens: tuple[int, ...]
    losses: tuple[float, ...]

    def covers(self, tokens: int) -> bool:
        return self.tokens[0] <= tokens <= self.tokens[-1]

    def loss_at(self, tokens: int) -> float:
        """The loss after `tokens` tokens, which the curve must cover: between two points linear in their logarithm,
        in which losses are closer to a line than in the tokens themselves."""
        left = self._segment(tokens)
        return self.losses[left] + self._slope(left, left + 1) * math.log(tokens / self.tokens[left])

    def slope_at(self, tokens: int) -> float:
        """Nats per token for e times the tokens, negative where the loss falls; over three segments, as the points of a
        single one are noisy."""
        left = self._segment(tokens)
        return self._slope(max(left - 1, 0), min(left + 2, len(self.tokens) - 1))

    def deviation(self, tokens: int) -> float:
        """The standard deviation between equally good runs after `tokens` tokens, nats per token.

        Two independent causes: losses differ by `sigma` even where the curve is flat; and runs are ahead or behind by
        a share of the tokens, `progress`, which shows where the curve is steep.
        """
        return math.hypot(self.spread["sigma"], self.spread["progress"] * self.slope_at(tokens))

    def tolerance(self, tokens: int) -> float:
        """By how much an equally good run may differ from the curve, which is itself the mean of `runs` such runs."""
        return SIGMAS * self.deviation(tokens) * math.sqrt(1 + 1 / self.spread["runs"])

    def _segment(self, tokens: int) -> int:
        """The index of the point where the segment begins that `tokens` lies in."""
        return min(bisect.bisect(self.tokens, tokens), len(self.tokens) - 1) - 1

    def _slope(self, left: int, right: int) -> float:
        """Nats per token for e times the tokens, between two points."""
        return (self.losses[right] - self.losses[left]) / math.log(self.tokens[right] / self.tokens[left])

    def mismatches(self, record: dict[str, Any]) -> list[str]:
        """Why the losses of a run are not comparable with these; empty: they are.

        Args:
            record: the content of its recipe.yaml.
        """
        here = {name: value_of(record) for name, value_of in CONDITIONS.items()}
        return [
            f"{name.replace('_', ' ')} {_shown(here[name])} (there {_shown(there)})"
            for name, there in self.conditions.items()
            if not _agrees(here[name], there)
        ]

    def differences(self, record: dict[str, Any]) -> list[str]:
        """The settings in which a run differs from the reference, e.g. `learning_rate=0.04 (there 0.004)`."""
        here = record | {f"model.{name}": value for name, value in model_of(record).items()}
        return [
            f"{name}={here[name]} (there {there})"
            for name, there in self.settings.items()
            if name in here and here[name] != there
        ]


@dataclass(frozen=True)
class Level:
    """The loss of a finished model on a run's corpus.

    loss: nats per token.
    source: who measured it.
    caveat: why it is not of the same validation tokens; None: it is.
    """

    name: str
    loss: float
    source: str
    caveat: str | None = None


# ---- files ----


def curve_names() -> list[str]:
    return sorted(path.name.removesuffix(".yaml") for path in FOLDER.iterdir())


def reference_problems(name: str | None) -> list[str]:
    """One line if there is no reference curve of that name. None asks for none."""
    known = curve_names()
    if name is None or name in known:
        return []
    nearest = difflib.get_close_matches(name, known, n=1)
    remedy = f"did you mean {nearest[0]}?" if nearest else f"use one of {', '.join(known)}"
    return [f"reference_curve={name} does not exist; {remedy}"]


def load_curve(name: str) -> ReferenceCurve:
    """Raises UserError: there is no curve of that name."""
    refuse(reference_problems(name))
    content = _read(name)
    tokens, losses = zip(*content.pop("points"))
    return ReferenceCurve(name, **content, tokens=tokens, losses=losses)


def openai_levels(record: dict[str, Any]) -> list[Level]:
    """The losses of OpenAI's models on a run's data, where they are known: that of the same size, or of all if the run
    has another size or continues one of them.

    Args:
        record: the content of its recipe.yaml.
    """
    if record["data"]["tokenizer"]["name"] != "gpt2":
        return []
    corpus, tokens = _corpus(record), _validation_tokens(record)
    levels = []
    for model in _models_beside(record):
        score = published_score(model.name, "validation_loss", corpus)
        if score is not None:
            caveat = preparation_caveat(record["data"])
            if caveat is None and not score.is_comparable(tokens):
                caveat = score.note
            levels.append(Level(f"OpenAI {model.title}", score.value, score.source, caveat))
    return levels


def hellaswag_levels(record: dict[str, Any], items: int) -> dict[str, float]:
    """GPT-2's and GPT-3's HellaSwag acc_norm by name, of the sizes as in `openai_levels`.

    Args:
        items: how many the run is evaluated on; the levels are of all, and there are none beside others.
    """
    levels: dict[str, float] = {}
    if items != FULL_SET:
        return levels
    for model in _models_beside(record):
        score = published_score(model.name, "hellaswag_completion_acc_norm")
        if score is not None:
            levels[f"GPT-2 ({model.abbreviation})"] = score.value
        levels[f"GPT-3 ({model.abbreviation})"] = gpt3_hellaswag(model.name)
    return levels


def _models_beside(record: dict[str, Any]) -> list[OpenAIModel]:
    """OpenAI's model of a run's size; all of them if there is none, or the run continues a model."""
    size = (model_of(record)["n_layer"], model_of(record)["n_embd"])
    every = list(openai_models().values())
    same_size = [model for model in every if (model.layers, model.width) == size]
    return same_size if same_size and record.get("init_from", "scratch") == "scratch" else every


def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


# ---- what must agree ----


def _corpus(record: dict[str, Any]) -> str:
    return corpus_identity(record["data"]["corpus"])


def _validation_tokens(record: dict[str, Any]) -> int:
    whole_split = record["data"]["splits"]["val"]["tokens"]
    return min(record["validation_tokens"] or whole_split, whole_split)


def model_of(record: dict[str, Any]) -> dict[str, Any]:
    """All fields of a run's model; those that its recipe leaves out have their defaults."""
    return model_defaults() | record.get("model", {})


CONDITIONS = {
    "corpus": _corpus,  # a list of names in the file: any of them
    # Older runs do not record these two.
    "deduplicated": lambda record: "yes" if record["data"].get("deduplicated") else "no",
    "validation": lambda record: record["data"].get("validation", "the first documents"),
    "tokenizer": lambda record: record["data"]["tokenizer"]["name"],
    "vocabulary": lambda record: record["data"]["tokenizer"]["vocab_size"],
    "training_tokens": lambda record: record["data"]["splits"]["train"]["tokens"],
    "validation_tokens": _validation_tokens,
    "sequence_length": lambda record: record["sequence_length"],
    "layers": lambda record: model_of(record)["n_layer"],
    "width": lambda record: model_of(record)["n_embd"],
    "init_from": lambda record: record["init_from"],
}


def _agrees(here: Any, there: Any) -> bool:
    return here in there if isinstance(there, list) else here == there


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " or ".join(value)
    return f"{value:,}" if isinstance(value, int) else str(value)
