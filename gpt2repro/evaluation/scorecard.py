"""A scorecard: several models on the same tasks, with intervals, differences, and what they mean in words.

`make_scorecard` returns what scorecard.json holds, plain dicts and lists:

    {
      "format": "gpt2repro scorecard 1",
      "made": {"date": "2026-11-26T10:41:07+00:00", "device": "CPU (x86_64, 2 threads)", "dtype": "auto",
               "mixed_precision": "no", "versions": {"torch": ..., "transformers": ..., ...}},
      "models": [                                  # in the order of the table's columns
        {"name": "demo", "origin": "measured", "sha256": "...", "parameters": 2191104, "vocabulary_sha256": "..."},
        {"name": "gpt2 (124M)", "origin": "published", "sha256": null, "parameters": 124439808,
         "vocabulary_sha256": null}],
      "metrics": [                                 # in the order of the table's rows
        {"key": "hellaswag_completion_acc_norm", "task": "hellaswag", "title": "HellaSwag acc_norm (completion)",
         "unit": "share", "higher_is_better": true, "headline": true, "method": "one line: what was done",
         "data": {"name": "hellaswag_val.jsonl.gz", "hub_id": "Rowan/hellaswag", "sha256": "...", "n": 10042,
                  "units": "items", "complete": true}}],
      "results": [                                 # at most one for each model and metric
        {"model": "demo", "metric": "hellaswag_completion_acc_norm", "value": 0.2581, "low": 0.2496, "high": 0.2667,
         "origin": "measured", "source": null, "same_method": true, "note": null},
        {"model": "gpt2 (124M)", "metric": "hellaswag_completion_acc_norm", "value": 0.2955, "low": null, "high": null,
         "origin": "published", "source": "build-nanogpt hellaswag.py", "same_method": true, "note": null}],
      "differences": [                             # model minus against; better is "above" whatever the unit
        {"model": "demo", "against": "gpt2 (124M)", "metric": "hellaswag_completion_acc_norm", "value": -0.0374,
         "low": -0.0459, "high": -0.0288, "verdict": "below", "interval": "sampling error of demo alone"}],
      "sentences": ["demo: below gpt2 (124M) on HellaSwag acc_norm (completion) by 3.7 points [2.9, 4.6]"],
      "notes": ["gpt2 (124M) cannot be had here (...); its published figures, if any, stand in the table"]
    }

hub_id: the dataset on the Hub that the data is, null if that is not known; complete: all of it was measured. unit:
"share" (0 to 1; shown in percent, differences in points), "perplexity", "nats" or "bits". low and high: the ends
of the 95% interval, null where there is none. interval: "paired bootstrap over items" (or documents, or blocks of 1,024
characters), or "sampling error of MODEL alone" against a published figure, whose own error is not known. verdict:
"above", "below", or "level" if the interval contains 0; null if there is no interval or the method is another.
"""

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from gpt2repro.errors import UserError, first_line
from gpt2repro.evaluation.bootstrap import Ratio, interval, resample
from gpt2repro.evaluation.published import OpenAIModel, openai_models, published_score
from gpt2repro.evaluation.task import Columns, Metric, Task


FORMAT = "gpt2repro scorecard 1"
HUGE = 1e6  # numbers from here on are shown with an exponent
PARTS = {"made", "models", "metrics", "results", "differences", "sentences", "notes"}  # besides the format
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate")


@dataclass(frozen=True)
class MeasuredModel:
    """A model that went through the tasks.

    columns: by the task's name; a task that does not suit the model is absent.
    is_reference: it stands beside the others to be compared with.
    """

    name: str
    sha256: str
    parameters: int
    vocabulary_sha256: str
    columns: dict[str, Columns]
    is_reference: bool = False


def make_scorecard(
    models: list[MeasuredModel],
    published: list[OpenAIModel],
    tasks: list[Task],
    setting: dict[str, Any],
    notes: list[str],
) -> dict[str, Any]:
    """The content of scorecard.json, as described above.

    Args:
        models: of different names; those that are references last.
        published: those without a figure for these tasks are left out.
        setting: device, dtype and mixed_precision.
        notes: what the reader has to know, in lines.
    """
    results: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    for task in tasks:
        measured = [model for model in models if task.name in model.columns]
        samples = _resampled(task, measured)
        results += _measured_results(task, measured, samples)
        results += _published_results(task, published)
        differences += _measured_differences(task, measured, samples)
    with_figures = {result["model"] for result in results}
    published = [model for model in published if model.title in with_figures]
    differences += _published_differences(models, published, tasks, results)
    metrics = [_metric_entry(task, metric) for task in tasks for metric in task.metrics]
    return {
        "format": FORMAT,
        "made": _made(setting),
        "models": [_model_entry(model) for model in models] + [_published_entry(model) for model in published],
        "metrics": metrics,
        "results": results,
        "differences": differences,
        "sentences": make_sentences(metrics, differences),
        "notes": notes,
    }


def _made(setting: dict[str, Any]) -> dict[str, Any]:
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), **setting, "versions": software_versions()}


def software_versions() -> dict[str, str]:
    """Of the packages that compute the numbers."""
    return {package: version(package) for package in PACKAGES}


def _model_entry(model: MeasuredModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "origin": "measured",
        "sha256": model.sha256,
        "parameters": model.parameters,
        "vocabulary_sha256": model.vocabulary_sha256,
    }


def _published_entry(model: OpenAIModel) -> dict[str, Any]:
    return {
        "name": model.title,
        "origin": "published",
        "sha256": None,
        "parameters": model.parameters,
        "vocabulary_sha256": None,
    }


def _metric_entry(task: Task, metric: Metric) -> dict[str, Any]:
    return {
        "key": metric.key,
        "task": task.name,
        "title": metric.title,
        "unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
        "headline": metric.headline,
        "method": task.method,
        "data": task.data | {"complete": task.data["complete"] and metric.caveat is None},
    }


# ---- values and intervals ----


def _resampled(task: Task, models: list[MeasuredModel]) -> dict[tuple[str, str], np.ndarray]:
    """(model, metric) -> the metric on resampled units, the same units for all of them."""
    keys = [(model.name, metric.key) for model in models for metric in task.metrics]
    scores = [_score(task, metric, model) for model in models for metric in task.metrics]
    return dict(zip(keys, resample(scores))) if scores else {}


def _score(task: Task, metric: Metric, model: MeasuredModel) -> Ratio:
    return metric.score(model.columns[task.name])


def _ends(sample: np.ndarray) -> dict[str, float | None]:
    found = interval(sample)
    return {"low": found.low, "high": found.high} if found else {"low": None, "high": None}


def _value_ends(sample: np.ndarray) -> dict[str, float | None]:
    """Of units that are all alike, such as items none of which is right, resampling says nothing."""
    return _ends(sample[:0] if np.all(sample == sample[:1]) else sample)


def _measured_results(task: Task, models: list[MeasuredModel], samples: dict) -> list[dict[str, Any]]:
    return [
        {
            "model": model.name,
            "metric": metric.key,
            "value": _score(task, metric, model).value(),
            **_value_ends(samples[model.name, metric.key]),
            "origin": "measured",
            "source": None,
            "same_method": True,
            "note": None,
        }
        for metric in task.metrics
        for model in models
    ]


def _published_results(task: Task, published: list[OpenAIModel]) -> list[dict[str, Any]]:
    results = []
    for metric in task.metrics:
        for model in published:
            score = published_score(model.name, metric.key, task.corpus)
            if score is not None:
                results.append(
                    {
                        "model": model.title,
                        "metric": metric.key,
                        "value": score.value,
                        "low": None,
                        "high": None,
                        "origin": "published",
                        "source": score.source,
                        "same_method": score.is_comparable(task.data["n"]) and metric.caveat is None,
                        "note": "; ".join(filter(None, [score.note, metric.caveat])) or None,
                    }
                )
    return results


# ---- differences ----


def pairs_of(models: list[MeasuredModel]) -> list[tuple[MeasuredModel, MeasuredModel]]:
    """Who is compared with whom: the first model with each other one, every other one with the references."""
    first = models[:1]
    others = [model for model in models[1:] if not model.is_reference]
    references = [model for model in models[1:] if model.is_reference]
    return [(ours, theirs) for ours in first for theirs in others] + [
        (ours, theirs) for ours in [*first, *others] for theirs in references
    ]


def _measured_differences(task: Task, models: list[MeasuredModel], samples: dict) -> list[dict[str, Any]]:
    differences = []
    for ours, theirs in pairs_of(models):
        for metric in task.metrics:
            if metric.needs_same_vocabulary and ours.vocabulary_sha256 != theirs.vocabulary_sha256:
                continue
            value = _score(task, metric, ours).value() - _score(task, metric, theirs).value()
            ends = _ends(samples[ours.name, metric.key] - samples[theirs.name, metric.key])
            how = f"paired bootstrap over {task.units}"
            differences.append(_difference(ours.name, theirs.name, metric, value, ends, how))
    return differences


def own_error(model: str) -> str:
    """Where the interval of a difference from a published figure comes from."""
    return f"sampling error of {model} alone"


def _published_differences(
    models: list[MeasuredModel], published: list[OpenAIModel], tasks: list[Task], results: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Of a published figure nothing but the figure is known, so only our own sampling error can be taken into account.

    For two models of like quality the interval is too narrow by a factor of 1.4 at most, if their errors are unrelated.
    It is too wide if they correlate by more than 1/2, as losses on the same text do.
    """
    by_key = {(result["model"], result["metric"]): result for result in results}
    differences = []
    for model in models:
        for other in published:
            for metric in (metric for task in tasks for metric in task.metrics):
                ours, theirs = by_key.get((model.name, metric.key)), by_key.get((other.title, metric.key))
                if model.is_reference or ours is None or theirs is None or not theirs["same_method"]:
                    continue
                value = ours["value"] - theirs["value"]
                has_ends = ours["low"] is not None
                ends = {end: ours[end] - theirs["value"] if has_ends else None for end in ("low", "high")}
                differences.append(_difference(model.name, other.title, metric, value, ends, own_error(model.name)))
    return differences


def _difference(
    model: str, against: str, metric: Metric, value: float, ends: dict[str, float | None], how: str
) -> dict[str, Any]:
    verdict = _verdict(ends["low"], ends["high"], metric.higher_is_better)
    return {"model": model, "against": against, "metric": metric.key, "value": value, **ends, "verdict": verdict} | {
        "interval": how
    }


def _verdict(low: float | None, high: float | None, higher_is_better: bool) -> str | None:
    if low is None or high is None:
        return None
    if low <= 0 <= high:
        return "level"
    return "above" if (low > 0) == higher_is_better else "below"


# ---- in words ----


def make_sentences(metrics: list[dict[str, Any]], differences: list[dict[str, Any]]) -> list[str]:
    """One sentence for each pair of models, from headline metrics: "A: above B on ...; level on ...; below on ..."."""
    headlines = {metric["key"]: metric for metric in metrics if metric["headline"]}
    pairs = dict.fromkeys((difference["model"], difference["against"]) for difference in differences)
    sentences = []
    for model, against in pairs:
        of_pair = [entry for entry in differences if (entry["model"], entry["against"]) == (model, against)]
        said: list[str] = []
        for verdict, preposition in (("above", ""), ("level", "with "), ("below", "")):
            chosen = [entry for entry in of_pair if entry["verdict"] == verdict and entry["metric"] in headlines]
            amounts = [_amount_on(headlines[entry["metric"]], entry) for entry in chosen]
            if amounts:
                whom = "" if said else f"{preposition}{against} "
                said.append(f"{verdict} {whom}{', '.join(amounts)}")
        if said:
            sentences.append(f"{model}: {'; '.join(said)}")
    return sentences


def _amount_on(metric: dict[str, Any], difference: dict[str, Any]) -> str:
    return f"on {metric['title']} {amount(difference, metric)}"


def amount(difference: dict[str, Any], metric: dict[str, Any]) -> str:
    """How much, without a sign where the words say the direction: "by 1.9 points [0.9, 2.9]"; of a metric of which less
    is better "(3.1 less [2.0, 4.2])"; where the two are level "(+0.3 points [-0.5, 1.1])"."""
    scale, name = (100, " points") if metric["unit"] == "share" else (1, "")
    value, low, high = (scale * difference[key] for key in ("value", "low", "high"))
    digits = decimals(high - low)
    if difference["verdict"] == "level":
        sign = "+" if value >= 0 else ""
        return f"({sign}{as_text(value, digits)}{name} [{as_text(low, digits)}, {as_text(high, digits)}])"
    least, most = sorted((abs(low), abs(high)))
    size, ends = as_text(abs(value), digits), f"[{as_text(least, digits)}, {as_text(most, digits)}]"
    if metric["higher_is_better"]:
        return f"by {size}{name} {ends}"
    return f"({size} {'more' if value > 0 else 'less'} {ends})"


def as_text(value: float, digits: int) -> str:
    """A number with so many digits after the point; a huge one, such as an untrained model's perplexity, in short."""
    return f"{value:.1e}" if abs(value) >= HUGE else f"{value:,.{digits}f}"


def decimals(width: float) -> int:
    """Digits after the point that show an interval's width with two significant digits; at most 5."""
    if not width:
        return 1
    return min(5, max(0, 1 - math.floor(math.log10(width))))


# ---- reading ----


def read_scorecard(path: Path) -> dict[str, Any]:
    """The content of a scorecard.json.

    Raises:
        UserError: it cannot be read, or is no scorecard of this format.
    """
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(card, dict) or card.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        if missing := PARTS - card.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be used ({first_line(error)}); make it again with `python scorecard.py MODEL --output DIR`"
        ) from error
    return card


def public_part(card: dict[str, Any], sha256: str, name: str = "this model") -> dict[str, Any] | None:
    """What a card says of one model, beside OpenAI's: other models of the user's are left out.

    Args:
        sha256: of the model, as `score_cache.model_sha256` gives it.
        name: what it is called in there.
    Returns:
        A card; None if the model is not on it.
    """
    own = next((model["name"] for model in card["models"] if model["sha256"] == sha256), None)
    if own is None:
        return None
    names = {own: name} | {model.title: model.title for model in openai_models().values()}

    def renamed(entries: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
        chosen = [entry for entry in entries if all(entry[key] in names for key in keys)]
        return [entry | {key: names[entry[key]] for key in keys} for entry in chosen]

    differences = renamed(card["differences"], "model", "against")
    own_differences = [difference for difference in differences if difference["model"] == name]
    for difference in own_differences:
        if difference["interval"] == own_error(own):
            difference["interval"] = own_error(name)
    return card | {
        "models": renamed(card["models"], "name"),
        "results": renamed(card["results"], "model"),
        "differences": own_differences,
        "sentences": make_sentences(card["metrics"], own_differences),
        "notes": [],
    }
