"""report.html: everything about one run, or several beside each other, in one file that needs no network.

    write_text(folder.report, report_page([LoggedRun("demo", record, rows)]))

jinja2 fills report.html.jinja and escapes whatever it is given. Bokeh draws the curves; its labels may hold markup and
formulas, so names that people chose stand in the page around the drawings, or reach Bokeh as data. A content security
policy names the file's own scripts by their hashes: a browser runs no other, and fetches nothing.
"""

import base64
import dataclasses
import hashlib
import itertools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

import numpy as np
import yaml
from bokeh.embed import components
from bokeh.models import ColumnDataSource, HoverTool, Label, NumeralTickFormatter, Range1d, Span
from bokeh.plotting import figure
from bokeh.resources import Resources
from jinja2 import Environment, StrictUndefined

from gpt2repro.data.manifest import corpus_title
from gpt2repro.data.token_stream import bits_per_byte, perplexity_text
from gpt2repro.evaluation.bootstrap import with_error
from gpt2repro.evaluation.reference_curves import ReferenceCurve, hellaswag_levels, model_of
from gpt2repro.evaluation.scorecard_views import legend_lines, method_lines, table_rows
from gpt2repro.recipe import Recipe
from gpt2repro.show.logged_run import LoggedRun
from gpt2repro.show.pictures import RUN_COLORS, loss_range
from gpt2repro.show.public import REPORT_MARK, origin, public_name, public_settings, sources_of, started_from


FOLDER = files("gpt2repro.show")
GRAY = "#808080"  # what is drawn beside the runs: legible on the light and on the dark page
NO_VERDICT = "no verdict: its recipe names no reference_curve"


@dataclass(frozen=True)
class Row:
    """A row of a table with a column for each run.

    cells: the runs', then those of the columns beside them, if the table has any.
    differs: between the runs.
    """

    name: str
    cells: list[str]
    differs: bool


def report_page(runs: list[LoggedRun], scorecard: dict[str, Any] | None = None) -> str:
    """The page as HTML.

    Args:
        runs: with at least one validation each.
        scorecard: the content of a scorecard.json.
    """
    drawn = _curves(runs)
    curves_script, drawings = components([drawing for _, drawing in drawn], wrap_script=False)
    bokeh = "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)
    scripts = [bokeh, curves_script, (FOLDER / "report.js").read_text()]
    template = (FOLDER / "report.html.jinja").read_text()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        mark=REPORT_MARK,
        title=" and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs",
        subtitle="; ".join(dict.fromkeys(_subtitle(run) for run in runs)),
        scripts=scripts,
        hashes=[_sha256(script) for script in scripts],
        runs=[(run, color, _verdict_text(run)) for run, color in zip(runs, _colors(runs))],
        curves=[(title, drawing) for (title, _), drawing in zip(drawn, drawings)],
        references=_references(runs),
        results=_compared(runs, RESULTS),
        samples=[(run, _samples(run)) for run in runs if _samples(run)],
        scorecard=scorecard and _scorecard(scorecard),
        recipe=_recipe_rows(runs),
        recipe_columns=["default", *(f"reference {curve.name}" for curve in _curves_of(runs))],
        changes=[(run, _changes(run)) for run in runs if _changes(run)],
        settings=[(run, yaml.safe_dump(public_settings(run.record), sort_keys=False)) for run in runs],
        data=_compared(runs, DATA),
    )


def _sha256(script: str) -> str:
    """As a content security policy names a script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


# ---- verdict ----


def _subtitle(run: LoggedRun) -> str:
    corpus = corpus_title(run.record["data"]["corpus"])
    if run.record.get("init_from", "scratch") != "scratch":
        return f"{started_from(run.record)}, trained on {corpus}"
    model = model_of(run.record)
    return f"GPT-2 of {model['n_layer']} layers and width {model['n_embd']} on {corpus}"


def _verdict_text(run: LoggedRun) -> str:
    """Without the paths that it may name."""
    text = run.verdict.headline or NO_VERDICT
    for name in (run.record["data"]["tokenizer"]["name"], run.record.get("init_from", "scratch")):
        text = text.replace(name, public_name(name))
    return text


def _colors(runs: list[LoggedRun]) -> list[str]:
    """Those of the pictures; they are legible on a dark page too."""
    return list(itertools.islice(itertools.cycle(RUN_COLORS["light"]), len(runs)))


def _curves_of(runs: list[LoggedRun]) -> list[ReferenceCurve]:
    """Those that the runs are compared with, each once."""
    return list({run.verdict.curve.name: run.verdict.curve for run in runs if run.verdict.curve}.values())


def _references(runs: list[LoggedRun]) -> list[str]:
    """What the gray lines among the losses are."""
    curves = [
        f"Dashed: {curve.title}; the band is by how much an equally good run may differ. Its source: {curve.source}"
        for curve in _curves_of(runs)
    ]
    return curves + [f"Dotted: {name}, {loss:.4f}" for name, loss in _levels(runs).items()]


def _levels(runs: list[LoggedRun]) -> dict[str, float]:
    levels = {level.name: level.loss for run in runs for level in run.verdict.levels}
    for run in runs:
        levels |= run.record.get("reference_losses", {})
    return levels


# ---- curves ----


def _curves(runs: list[LoggedRun]) -> list[tuple[str, Any]]:
    """Title and drawing of each panel; all share the axis of the tokens."""
    last = max(1, *(row["tokens"] for run in runs for row in run.rows))
    tokens = Range1d(0, 1.02 * last, bounds="auto")
    panels = [("Loss, nats per token", _loss_panel(runs, tokens))]
    if any(run.verdict.validations for run in runs):
        panels.append(("Validation loss minus the reference's", _difference_panel(runs, tokens)))
    for key, (title, number) in PANELS.items():
        if any(run.series(key)[0] for run in runs):
            panels.append((title, _metric_panel(runs, key, number, tokens)))
    return panels


PANELS = {  # key of metrics.jsonl -> title, and Bokeh's format of a number
    "hellaswag_acc_norm": ("HellaSwag acc_norm", "0.0%"),
    "lr": ("Learning rate", "0.0[0000000]"),
    "grad_norm": ("Gradient norm before clipping", "0.00"),
    "tokens_per_second": ("Tokens per second", "0,0"),
    "mfu": ("MFU", "0.0%"),
}


def _loss_panel(runs: list[LoggedRun], tokens: Range1d) -> Any:
    panel = _panel(tokens, height=420)
    panel.toolbar_location = "above"  # its reset mends the other panels too, as they share their axis
    panel.y_range = Range1d(*loss_range(runs, list(_levels(runs).values())))
    for loss in _levels(runs).values():
        _draw_level(panel, loss, f"{loss:.4f}")
    for curve in _curves_of(runs):
        expected, tolerance = np.array(curve.losses), np.array([curve.tolerance(at) for at in curve.tokens])
        panel.varea(curve.tokens, expected - tolerance, expected + tolerance, color=GRAY, alpha=0.2)
    training = [
        panel.line("tokens", "value", source=_series(run, "loss"), color=color, alpha=0.5)
        for run, color in zip(runs, _colors(runs))
    ]
    validation = [_marked_line(panel, _series(run, "val_loss"), color) for run, color in zip(runs, _colors(runs))]
    for curve in _curves_of(runs):
        line = panel.line("tokens", "value", source=_points(f"reference {curve.name}", curve.tokens, curve.losses))
        line.glyph.update(line_color=GRAY, line_width=2, line_dash="dashed")
        _hover(panel, line, "0.0000", side="above")
    for line in validation:
        _hover(panel, line, "0.0000")
    for line in training:
        _hover(panel, line, "0.0000", side="left")
    return panel


def _difference_panel(runs: list[LoggedRun], tokens: Range1d) -> Any:
    panel = _panel(tokens, height=220)
    panel.add_layout(Span(location=0, dimension="width", line_color=GRAY, line_dash="dashed"))
    for curve in _curves_of(runs):
        tolerance = np.array([curve.tolerance(at) for at in curve.tokens])
        panel.varea(curve.tokens, -tolerance, tolerance, color=GRAY, alpha=0.2)
    for run, color in zip(runs, _colors(runs)):
        judged = [(at.tokens, at.loss - at.expected) for at in run.verdict.validations if at.expected is not None]
        if judged:
            line = _marked_line(panel, _points(run.name, *zip(*judged)), color)
            _hover(panel, line, "+0.0000")
    return panel


def _metric_panel(runs: list[LoggedRun], key: str, number: str, tokens: Range1d) -> Any:
    panel = _panel(tokens, height=220)
    panel.yaxis.formatter = NumeralTickFormatter(format=number)
    for run, color in zip(runs, _colors(runs)):
        line = panel.line("tokens", "value", source=_series(run, key), color=color, alpha=0.8)
        _hover(panel, line, number)
    if key == "hellaswag_acc_norm":
        levels = _hellaswag_levels(runs)
        for name, score in levels.items():
            _draw_level(panel, score, f"{name}, {score:.1%}")
        shown = [*levels.values(), *(score for run in runs for score in run.series(key)[1])]
        panel.y_range = Range1d(min(shown) - 0.01, max(shown) + 0.02)
    return panel


def _hellaswag_levels(runs: list[LoggedRun]) -> dict[str, float]:
    """GPT-2's and GPT-3's scores of the same size, beside runs that are evaluated on the whole set."""
    levels: dict[str, float] = {}
    for run in runs:
        _, items = run.series("hellaswag_items")
        levels |= hellaswag_levels(run.record, int(items[-1])) if items else {}
    return levels


def _panel(tokens: Range1d, height: int) -> Any:
    """An empty panel on the page's own ground."""
    tools = "xbox_zoom,xpan,reset"
    panel = figure(height=height, x_range=tokens, sizing_mode="stretch_width", tools=tools, toolbar_location=None)
    panel.toolbar.logo = None
    panel.toolbar.active_drag = None  # until one is chosen: a finger that is drawn over the curve scrolls the page
    panel.background_fill_color = panel.border_fill_color = panel.outline_line_color = None
    panel.axis.axis_line_color = panel.axis.major_label_text_color = GRAY
    panel.axis.major_tick_line_color = panel.axis.minor_tick_line_color = None
    panel.axis.major_label_text_font_size = "13px"
    panel.grid.grid_line_color, panel.grid.grid_line_alpha = GRAY, 0.2
    panel.xaxis.formatter = NumeralTickFormatter(format="0.[00]a")
    return panel


def _draw_level(panel: Any, value: float, label: str) -> None:
    panel.add_layout(Span(location=value, dimension="width", line_color=GRAY, line_dash="dotted", line_width=2))
    panel.add_layout(Label(x=0, y=value, x_offset=4, y_offset=2, text=label, text_color=GRAY, text_font_size="12px"))


def _series(run: LoggedRun, key: str) -> ColumnDataSource:
    return _points(run.name, *run.series(key))


def _points(name: str, tokens: Iterable[int], values: Iterable[float]) -> ColumnDataSource:
    places = np.array(list(tokens), dtype=float)
    return ColumnDataSource({"tokens": places, "value": np.array(list(values)), "name": [name] * len(places)})


def _marked_line(panel: Any, points: ColumnDataSource, color: str) -> Any:
    panel.scatter("tokens", "value", source=points, color=color, size=5)
    return panel.line("tokens", "value", source=points, color=color, line_width=2)


def _hover(panel: Any, line: Any, number: str, side: Literal["left", "right", "above"] = "right") -> None:
    """Show the point of a line that is nearest to the pointer, wherever in the panel that is.

    Args:
        side: of the point on which its values stand.
    """
    values = f"<b>@value{{{number}}}</b> @name, @tokens{{0,0}} tokens"
    hover = HoverTool(renderers=[line], tooltips=values, mode="vline", line_policy="nearest", attachment=side)
    hover.visible = False  # no button
    panel.add_tools(hover)


# ---- tables ----


def _compared(runs: list[LoggedRun], table: dict[str, Callable[[LoggedRun], str]]) -> list[Row]:
    """The rows of a table that any run has an entry in."""
    rows = []
    for name, cell_of in table.items():
        cells = [cell_of(run) for run in runs]
        if any(cells):
            rows.append(Row(name, cells, differs=len(set(cells)) > 1))
    return rows


def _last(run: LoggedRun, key: str) -> float | None:
    _, values = run.series(key)
    return values[-1] if values else None


def _shown_last(key: str, form: str) -> Callable[[LoggedRun], str]:
    def shown(run: LoggedRun) -> str:
        value = _last(run, key)
        return "" if value is None else form.format(value)

    return shown


def _shown_median(key: str, form: str) -> Callable[[LoggedRun], str]:
    def shown(run: LoggedRun) -> str:
        _, values = run.series(key)
        return form.format(statistics.median(values)) if values else ""

    return shown


def _best(run: LoggedRun) -> str:
    best = min((row for row in run.rows if "val_loss" in row), key=lambda row: row["val_loss"])
    return f"{best['val_loss']:.4f} at step {best['step']:,}"


def _perplexity(run: LoggedRun) -> str:
    loss = _last(run, "val_loss")
    return "" if loss is None else perplexity_text(loss)


def _bits(run: LoggedRun) -> str:
    val, loss = run.record["data"]["splits"]["val"], _last(run, "val_loss")
    bits = None if loss is None else bits_per_byte(loss, val["tokens"], val["bytes"])
    return "" if bits is None else f"{bits:.4f}"


def _hellaswag(run: LoggedRun) -> str:
    scores = [row for row in run.rows if "hellaswag_acc_norm" in row]
    if not scores:
        return ""
    shown = with_error(scores[-1]["hellaswag_acc_norm"], scores[-1]["hellaswag_acc_norm_stderr"])
    return f"{shown}, {scores[-1]['hellaswag_items']:,} items"


def _progress(run: LoggedRun) -> str:
    return f"{run.rows[-1]['step']:,} of {run.record['max_steps']:,}"


def _cost(run: LoggedRun) -> str:
    dollars = _last(run, "dollars")
    hours = _last(run, "hours")
    shown = "" if hours is None else f"{hours:.2f} hours"
    return shown if dollars is None else f"{shown}, ${dollars:,.2f}"


RESULTS: dict[str, Callable[[LoggedRun], str]] = {
    "validation loss, nats per token": _shown_last("val_loss", "{:.4f}"),
    "the best": _best,
    "perplexity": _perplexity,
    "bits per byte": _bits,
    "training loss, last row": _shown_last("loss", "{:.4f}"),
    "HellaSwag acc_norm": _hellaswag,
    "steps": _progress,
    "tokens": _shown_last("tokens", "{:,}"),
    "updates skipped": _shown_last("bad_steps", "{:,}"),
    "tokens per second, median": _shown_median("tokens_per_second", "{:,.0f}"),
    "MFU, median": _shown_median("mfu", "{:.1%}"),
    "cost": _cost,
}


def _origin(run: LoggedRun) -> str:
    return " + ".join(origin(source) for source in sources_of(run.record["data"]))


def _split(name: str) -> Callable[[LoggedRun], str]:
    def shown(run: LoggedRun) -> str:
        split = run.record["data"]["splits"][name]
        documents = split.get("documents") or 0
        return f"{split['tokens']:,} tokens" + (f" in {documents:,} documents" if documents > 1 else "")

    return shown


def _tokenizer(run: LoggedRun) -> str:
    tokenizer = run.record["data"]["tokenizer"]
    return f"{public_name(str(tokenizer['name']))}, {tokenizer['vocab_size']:,} tokens"


def _version(package: str) -> Callable[[LoggedRun], str]:
    return lambda run: str(run.record.get("versions", {}).get(package) or "")


DATA: dict[str, Callable[[LoggedRun], str]] = {
    "corpus": _origin,
    "training": _split("train"),
    "validation": _split("val"),
    "sha256 of the manifest": lambda run: str(run.record["data"].get("manifest_sha256") or ""),
    "tokenizer": _tokenizer,
    "sha256 of the tokenizer": lambda run: str(run.record["data"]["tokenizer"].get("sha256") or ""),
    "hardware": lambda run: str(run.record.get("hardware") or ""),
    **{package: _version(package) for package in ("python", "torch", "transformers", "accelerate", "datasets")},
    "git commit": _version("git_commit"),
}


# ---- samples and recipe ----


def _samples(run: LoggedRun) -> list[tuple[int, list[str]]]:
    """Step and texts, in the order of the steps."""
    return [(row["step"], row["samples"]) for row in run.rows if "samples" in row]


def _recipe_rows(runs: list[LoggedRun]) -> list[Row]:
    """Of the settings that affect what a model learns, those in which a run differs from another run, from the defaults
    or from its reference; those in which the runs differ come first."""
    settings = [_flat(public_settings(run.record) | {"model": model_of(run.record)}) for run in runs]
    defaults = _flat(dataclasses.asdict(Recipe()) | {"model": model_of({})})
    beside = [defaults, *map(_settings_of, _curves_of(runs))]
    unimportant = {field.name for field in dataclasses.fields(Recipe) if field.metadata["changeable"]}
    rows = []
    for name in defaults.keys() - unimportant:
        cells = [_shown(run_settings[name]) if name in run_settings else "" for run_settings in settings]
        others = [_shown(column[name]) if name in column else "" for column in beside]
        if len(set(cells + others) - {""}) > 1:
            rows.append(Row(name, cells + others, differs=len(set(cells)) > 1))
    order = list(defaults)
    return sorted(rows, key=lambda row: (not row.differs, order.index(row.name)))


def _settings_of(curve: ReferenceCurve) -> dict[str, Any]:
    """By the names of the recipe's fields."""
    names = {"sequence_length": "sequence_length", "layers": "model.n_layer", "width": "model.n_embd"}
    return curve.settings | {names[name]: value for name, value in curve.conditions.items() if name in names}


def _changes(run: LoggedRun) -> list[str]:
    """What was changed while the run trained."""
    return [
        f"from step {override['step']:,} on: {name}={change['to']} instead of {change['from']}"
        for override in run.record.get("overrides", [])
        for name, change in override.items()
        if name != "step"
    ]


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    model = {f"model.{name}": value for name, value in settings["model"].items()}
    return {name: value for name, value in settings.items() if name != "model"} | model


def _shown(value: Any) -> str:
    return "none" if value is None else yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


# ---- scorecard ----


def _scorecard(card: dict[str, Any]) -> dict[str, Any]:
    head, *rows = table_rows(card)
    return {
        "head": head,
        "rows": rows,
        "sentences": card["sentences"],
        "remarks": [*legend_lines(card), *method_lines(card), *card["notes"], f"Made {card['made']['date']}."],
    }
