"""The pictures of runs: how the loss fell, and how training went.

    write_bytes(folder.picture, loss_picture([LoggedRun("demo", record, rows)]))

The runs' colours are those of Okabe and Ito, which colour-blind people tell apart too. All text is drawn as it is,
dollar signs included, and names no path of this machine.
"""

import io
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from gpt2repro.data.manifest import corpus_title
from gpt2repro.evaluation.reference_curves import ReferenceCurve, hellaswag_levels
from gpt2repro.show.logged_run import LoggedRun


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Theme = Literal["light", "dark"]
THEMES = ("light", "dark")
INK = {"light": "#24292f", "dark": "#e6e6e6"}  # text, and what runs are compared with
PAPER = {"light": "#ffffff", "dark": "#16181d"}
RUN_COLORS = {
    "light": ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    "dark": ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00"),
}
RUN_LINES = ("-", "-.", ":")  # the first for as many runs as there are colours, and so on
FIRST_SHARE = 0.05  # of the tokens: their losses may leave the picture at its top, or all that follows would be flat
FEW_ROWS = 20  # below this, each training loss is marked: a single one has no line
LONGEST_NAME = 36  # characters that a legend shows of a name
LEAST_RANGE = 1.0  # nats that the loss axis spans at least: the noise of a few rows must not fill the picture


def loss_picture(runs: list[LoggedRun], theme: Theme = "light", exported: int | None = None) -> bytes:
    """Training and validation loss over tokens, beside reference curve and levels; below them the difference from the
    reference, with its tolerance; and HellaSwag, if it was evaluated.

    Args:
        exported: the step whose weights the only run exports, if that may not be its last.
    Returns:
        A PNG.
    """
    is_compared = any(run.verdict.validations for run in runs)
    has_hellaswag = any(run.series("hellaswag_acc_norm")[0] for run in runs)
    rows: Any = [["loss"], ["difference"]] if is_compared else [["loss"]]
    if has_hellaswag:
        rows = [[*row, "hellaswag"] for row in rows]
    with _figure(theme, width=15 if has_hellaswag else 9, height=6.5 if is_compared else 5) as figure:
        axes = figure.subplot_mosaic(rows, height_ratios=[3, 1][: len(rows)])
        _draw_losses(axes["loss"], runs, theme, exported)
        if is_compared:
            axes["difference"].sharex(axes["loss"])
            axes["loss"].tick_params(labelbottom=False)
            _draw_differences(axes["difference"], runs, theme)
        axes["difference" if is_compared else "loss"].set_xlabel("tokens")
        if has_hellaswag:
            _draw_hellaswag(axes["hellaswag"], runs, theme)
        figure.suptitle(_title(runs))
        return _png(figure)


def training_picture(runs: list[LoggedRun], theme: Theme = "light") -> bytes:
    """Learning rate, gradient norm, throughput and, where the device's peak is known, MFU over tokens, as a PNG."""
    has_mfu = any(run.series("mfu")[0] for run in runs)
    keys = [key for key in TRAINING_PANELS if key != "mfu" or has_mfu]
    grid: Any = [keys[:2], (keys[2:] + ["."])[:2]]
    with _figure(theme, width=11, height=6.5) as figure:
        panels = figure.subplot_mosaic(grid)
        for key in keys:
            name, show = TRAINING_PANELS[key]
            for run, style in _styled(runs, theme):
                panels[key].plot(*run.series(key), **style, linewidth=1, label=_label(run.name))
            panels[key].set_title(name)
            panels[key].set_ylim(bottom=0)
            panels[key].yaxis.set_major_formatter(show)
            _finish(panels[key])
        if len(runs) > 1:
            panels[keys[0]].legend()
        figure.suptitle(_title(runs))
        return _png(figure)


def shortened(number: float, _: object = None) -> str:
    """A count for people: 124.4M, 25.7K, 10B. The second argument is what matplotlib passes to formatters."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:g}"


def _percent(share: float, _: object) -> str:
    return f"{share:.0%}"


def _plain(number: float, _: object) -> str:
    return f"{number:g}"


TRAINING_PANELS = {  # key of metrics.jsonl -> title, and how its axis shows a number
    "lr": ("learning rate", _plain),
    "grad_norm": ("gradient norm before clipping", _plain),
    "tokens_per_second": ("tokens per second", shortened),
    "mfu": ("MFU", _percent),
}


# ---- panels ----


def _draw_losses(axes: "Axes", runs: list[LoggedRun], theme: Theme, exported: int | None) -> None:
    for run, style in _styled(runs, theme):
        tokens, losses = run.series("loss")
        marker = "." if len(tokens) < FEW_ROWS else None
        label = "training" if len(runs) == 1 else None
        axes.plot(tokens, losses, **style, alpha=0.4, linewidth=0.8, marker=marker, label=label)
        tokens, losses = run.series("val_loss")
        if tokens:
            status = "" if run.verdict.status == "no verdict" else f", {run.verdict.status}"
            label = f"{_label(run.name) if len(runs) > 1 else 'validation'}, last {losses[-1]:.4f}{status}"
            axes.plot(tokens, losses, **style, linewidth=2, marker="o", markersize=3, label=label)
        for row in run.rows:
            if "val_loss" in row and row["step"] == exported:
                label = f"exported, step {exported:,}, {row['val_loss']:.4f}"
                point: Any = {"marker": "*", "markersize": 14, "linestyle": "none", "zorder": 3}
                axes.plot(row["tokens"], row["val_loss"], color=INK[theme], label=label, **point)
    for curve in _curves(runs):
        label = f"{curve.title}, last {curve.losses[-1]:.4f}"
        axes.plot(curve.tokens, curve.losses, color=INK[theme], linestyle="--", linewidth=1.2, label=label)
    levels = {level.name: level.loss for run in runs for level in run.verdict.levels}
    for run in runs:
        levels |= run.record.get("reference_losses", {})
    _draw_levels(axes, levels, theme, "{:.4f}")
    explained = "" if len(runs) == 1 else " (thin: training)"  # the legend names the runs
    axes.set_ylabel(f"loss, nats per token{explained}")
    axes.set_ylim(loss_range(runs, [*levels.values()]))
    _finish(axes)
    axes.legend(loc="upper right")


def loss_range(runs: list[LoggedRun], levels: list[float]) -> tuple[float, float]:
    """The loss axis: all finite losses but those of the first tokens, and all levels."""
    points = [point for run in runs for key in ("loss", "val_loss") for point in zip(*run.series(key))]
    last = max((tokens for tokens, _ in points), default=0)
    losses = [loss for tokens, loss in points if tokens >= FIRST_SHARE * last and math.isfinite(loss)] + levels
    low, high = min(losses, default=0), max(losses, default=0)
    middle, half = (low + high) / 2, max(LEAST_RANGE, 1.1 * (high - low)) / 2
    return middle - half, middle + half


def _draw_differences(axes: "Axes", runs: list[LoggedRun], theme: Theme) -> None:
    """Validation loss minus the reference's after as many tokens, and the tolerance."""
    axes.axhline(0, color=INK[theme], linestyle="--", linewidth=1.2)
    reach = 0.0  # of the axis
    for curve in _curves(runs):
        tolerance = [curve.tolerance(tokens) for tokens in curve.tokens]
        below = [-nats for nats in tolerance]
        axes.fill_between(curve.tokens, below, tolerance, color=INK[theme], alpha=0.12, linewidth=0)
        reach = max(reach, 2 * tolerance[len(tolerance) // 2])
    for run, style in _styled(runs, theme):
        judged = [(at.tokens, at.loss - at.expected) for at in run.verdict.validations if at.expected is not None]
        if judged:
            axes.plot(*zip(*judged), **style, linewidth=1.5, marker="o", markersize=3)
        shown = [abs(gap) for tokens, gap in judged if tokens >= FIRST_SHARE * judged[-1][0] and math.isfinite(gap)]
        reach = max([reach, *shown])
    axes.set_ylim(-1.15 * reach, 1.15 * reach)
    axes.set_ylabel("difference from\nthe reference")
    _finish(axes)


def _draw_hellaswag(axes: "Axes", runs: list[LoggedRun], theme: Theme) -> None:
    """acc_norm with its 95% interval, GPT-2's and GPT-3's of the same size, and chance."""
    levels: dict[str, float] = {"chance": 0.25}
    for run, style in _styled(runs, theme):
        tokens, scores = run.series("hellaswag_acc_norm")
        if not tokens:
            continue
        margins = [1.96 * (row["hellaswag_acc_norm_stderr"] or 0) for row in run.rows if "hellaswag_acc_norm" in row]
        low = [score - margin for score, margin in zip(scores, margins)]  # a single item has no standard error
        high = [score + margin for score, margin in zip(scores, margins)]
        label = f"{_label(run.name)}, 95% interval"
        axes.fill_between(tokens, low, high, **style, alpha=0.2, linewidth=0)
        axes.plot(tokens, scores, **style, linewidth=2, marker="o", markersize=3, label=label)
        _, items = run.series("hellaswag_items")
        levels |= hellaswag_levels(run.record, int(items[-1]))
    _draw_levels(axes, levels, theme, "{:.1%}")
    axes.set(xlabel="tokens", ylabel="HellaSwag acc_norm")
    axes.yaxis.set_major_formatter(_percent)
    _finish(axes)
    axes.legend(loc="lower right")


def _draw_levels(axes: "Axes", levels: dict[str, float], theme: Theme, number: str) -> None:
    """A horizontal line for each, with its name at the left, where the curves have not come near it yet."""
    paper = {"facecolor": PAPER[theme], "edgecolor": "none", "alpha": 0.7, "pad": 1}
    style: Any = {"ha": "left", "va": "bottom", "fontsize": "small", "bbox": paper}
    for name, value in levels.items():
        axes.axhline(value, color=INK[theme], linestyle=":", linewidth=1.2)
        axes.annotate(
            f"{_label(name)}, {number.format(value)}",
            (0.005, value),
            xycoords=("axes fraction", "data"),
            **style,
        )


# ---- what the panels share ----


def _curves(runs: list[LoggedRun]) -> list[ReferenceCurve]:
    """Those that the runs are compared with, each once."""
    return list({run.verdict.curve.name: run.verdict.curve for run in runs if run.verdict.curve}.values())


def _styled(runs: list[LoggedRun], theme: Theme) -> Iterator[tuple[LoggedRun, dict[str, Any]]]:
    """Each run with its colour and, as there may be more runs than colours, its kind of line."""
    styles = itertools.product(RUN_LINES, RUN_COLORS[theme])
    return zip(runs, ({"color": color, "linestyle": line} for line, color in itertools.cycle(styles)))


def _title(runs: list[LoggedRun]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs"
    run = runs[0]
    return f"{_label(run.name)}: GPT-2 on {_label(corpus_title(run.record['data']['corpus']))}"


def _label(name: str) -> str:
    """A name that somebody chose, as a label: without its middle if it is long, and not beginning with an underscore,
    as legends leave such lines out."""
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME // 2]} ... {name[-LONGEST_NAME // 3 :]}"
    return f" {name}" if name.startswith("_") else name


def _finish(axes: "Axes") -> None:
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(shortened)
    axes.grid(alpha=0.25)


@contextmanager
def _figure(theme: Theme, width: float, height: float) -> Iterator["Figure"]:
    """An empty figure of a theme, in inches, whose text is literal. Without pyplot, which would keep it open and ask
    for a display."""
    import matplotlib
    from matplotlib.figure import Figure

    ink, paper = INK[theme], PAPER[theme]
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: Any = dict.fromkeys(inked, ink) | dict.fromkeys(
        ("figure.facecolor", "axes.facecolor", "savefig.facecolor"), paper
    )
    literal = {"text.parse_math": False, "text.usetex": False}
    look = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 10}
    with matplotlib.rc_context(style | literal | look):
        yield Figure(figsize=(width, height), layout="constrained")


def _png(figure: "Figure") -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
