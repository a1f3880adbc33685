"""A scorecard for people: a table for the terminal, Markdown, and a picture. All from what `make_scorecard` returns."""

import io
import math
import re
from pathlib import Path
from typing import Any

from gpt2repro.evaluation.scorecard import as_text, decimals
from gpt2repro.files import write_bytes


PUBLISHED, OTHER_METHOD = "*", "†"
DEFAULT_DIGITS = {"share": 2, "perplexity": 2, "nats": 4, "bits": 4}  # of a value without an interval
# Okabe and Ito's colours, which remain distinct in the common forms of colour blindness.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PUBLISHED_COLOR = "#555555"
LOG_RATIO = 8  # values further apart stand on a logarithmic axis


def shown_value(result: dict[str, Any], unit: str) -> str:
    """As in "25.8% [25.0, 26.7]", "29.55% *"."""
    scale, sign = (100, "%") if unit == "share" else (1, "")
    value = scale * result["value"]
    if result["low"] is None:
        mark = "" if result["origin"] == "measured" else f" {PUBLISHED if result['same_method'] else OTHER_METHOD}"
        return f"{as_text(value, DEFAULT_DIGITS[unit])}{sign}{mark}"
    low, high = scale * result["low"], scale * result["high"]
    digits = decimals(high - low)
    return f"{as_text(value, digits)}{sign} [{as_text(low, digits)}, {as_text(high, digits)}]"


def table_rows(card: dict[str, Any]) -> list[list[str]]:
    """The head and one row a metric: its title, then a cell a model, empty where there is no result."""
    by_key = {(result["metric"], result["model"]): result for result in card["results"]}
    names = [model["name"] for model in card["models"]]
    rows = [["", *names]]
    for metric in card["metrics"]:
        results = [by_key.get((metric["key"], name)) for name in names]
        cells = [shown_value(result, metric["unit"]) if result else "" for result in results]
        arrow = "↑" if metric["higher_is_better"] else "↓"
        rows.append([f"{metric['title']} {arrow}", *cells])
    return rows


def legend_lines(card: dict[str, Any]) -> list[str]:
    """What the marks of the table mean, with the sources of published figures."""
    lines = ["↑ more is better, ↓ less is better; in brackets the 95% interval, by resampling"]
    for mark, same_method, meaning in (
        (PUBLISHED, True, "published, measured in the same way"),
        (OTHER_METHOD, False, "published, measured in another way or on other data: not comparable"),
    ):
        chosen = [
            result
            for result in card["results"]
            if result["origin"] == "published" and result["same_method"] == same_method
        ]
        said = [f"{result['source']} ({result['note']})" if result["note"] else result["source"] for result in chosen]
        if chosen:
            lines.append(f"{mark} {meaning}: {'; '.join(dict.fromkeys(said))}")
    return lines


def method_lines(card: dict[str, Any]) -> list[str]:
    """One line a task: how it was measured, and on what."""
    by_task = {metric["task"]: metric for metric in card["metrics"]}
    return [f"{task}: {metric['method']}; {data_text(metric['data'])}" for task, metric in by_task.items()]


def data_text(data: dict[str, Any]) -> str:
    return f"{data['n']:,} {data['units']} of {data['name']}, sha256 {data['sha256'][:12]}"


def as_table(card: dict[str, Any]) -> str:
    """The whole card as lines of text."""
    rows = table_rows(card)
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    aligned = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    parts = [aligned, legend_lines(card), method_lines(card), card["sentences"]]
    notes = [f"note: {note}" for note in card["notes"]]
    return "\n\n".join("\n".join(lines) for lines in [*parts, notes] if lines)


def as_markdown(card: dict[str, Any]) -> str:
    """The whole card as a Markdown document."""
    made = card["made"]
    versions = ", ".join(f"{package} {version}" for package, version in made["versions"].items())
    setting = f"{made['device']}, dtype {made['dtype']}, mixed precision {made['mixed_precision']}, {versions}"
    parts = [
        "# Scorecard",
        bullets(card["sentences"]),
        markdown_table(card),
        "## How it was measured",
        markdown_methods(card),
        bullets(card["notes"]),
        f"Made {made['date']} on {setting}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(card: dict[str, Any]) -> str:
    """The table and what its marks mean."""
    head, *body = [[escaped(cell) for cell in row] for row in table_rows(card)]
    lines = [head, ["---"] * len(head), *body]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{bullets(legend_lines(card))}"


def markdown_methods(card: dict[str, Any]) -> str:
    return bullets([*method_lines(card), *difference_lines(card)])


def escaped(text: str) -> str:
    """Text in which Markdown finds no marks of its own."""
    return re.sub(r"([*_|<>`])", r"\\\1", text)


def difference_lines(card: dict[str, Any]) -> list[str]:
    """From what the intervals of differences come."""
    hows = dict.fromkeys(difference["interval"] for difference in card["differences"])
    return [f"differences: {how}" for how in hows]


def bullets(lines: list[str]) -> str:
    return "\n".join(f"- {escaped(line)}" for line in lines)


# ---- picture ----


def draw_scorecard(card: dict[str, Any], path: Path) -> None:
    """One panel for each headline metric: a line a model, its value with the 95% interval; published figures hollow."""
    import matplotlib
    from matplotlib.figure import Figure

    metrics = [metric for metric in card["metrics"] if metric["headline"]]
    names = [model["name"] for model in card["models"]]
    colors = _colors(card["models"])
    columns = min(2, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    height = 0.9 + 0.32 * len(names)
    marks = f"{PUBLISHED} measured in the same way, {OTHER_METHOD} in another or on other data: not comparable"
    picture = io.BytesIO()
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}):  # names are literal
        figure = Figure(figsize=(5.2 * columns, height * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for metric, axes in zip(metrics, grid.flat):
            results = {result["model"]: result for result in card["results"] if result["metric"] == metric["key"]}
            _draw_panel(axes, metric, results, names, colors)
        for axes in grid.flat[len(metrics) :]:
            axes.set_visible(False)
        figure.supxlabel(f"lines: 95% intervals; hollow: published figures, {marks}", fontsize=9)
        figure.savefig(picture, format="png", dpi=120)
    write_bytes(path, picture.getvalue())


def _colors(models: list[dict[str, Any]]) -> dict[str, str]:
    measured = [model["name"] for model in models if model["origin"] == "measured"]
    colors = {name: COLORS[number % len(COLORS)] for number, name in enumerate(measured)}
    return {model["name"]: colors.get(model["name"], PUBLISHED_COLOR) for model in models}


def _draw_panel(axes: Any, metric: dict[str, Any], results: dict[str, dict], names: list[str], colors: dict) -> None:
    scale, sign = (100, ", %") if metric["unit"] == "share" else (1, "")
    present = [name for name in names if name in results]
    for y, name in enumerate(reversed(present)):
        result = results[name]
        value = scale * result["value"]
        is_measured = result["origin"] == "measured"
        face = colors[name] if is_measured else "white"
        if result["low"] is not None:
            axes.plot([scale * result["low"], scale * result["high"]], [y, y], color=colors[name], linewidth=2)
        axes.plot(value, y, marker="o" if is_measured else "D", color=colors[name], markerfacecolor=face, markersize=7)
        shown = shown_value(result, metric["unit"]).split(" [")[0]
        axes.annotate(shown, (value, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)
    values = [results[name]["value"] for name in present]
    if min(values) > 0 and max(values) > LOG_RATIO * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.xaxis.set_minor_formatter("")
    axes.set_yticks(range(len(present)), list(reversed(present)))
    axes.set_ylim(-0.6, len(present) - 0.3)
    axes.margins(x=0.15)
    better = "more is better" if metric["higher_is_better"] else "less is better"
    axes.set_title(f"{metric['title']}{sign}, {better}", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
