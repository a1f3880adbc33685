"""Is my run right? Its validation losses beside those of a known run, the reference, after as many tokens.

    verdict = judge(folder.read_record(), read_metrics(folder.metrics))
    print(verdict.headline)

By tokens, not by steps, because the batch may differ. What two runs must have in common for their losses to be
comparable at all is a condition of the reference (see reference_curves.py). Its other settings are what may be wrong
with a run, and are named when it is off. One of them changes what is to be expected, when the learning rate falls, and
the loss with it:

    as in the reference     the loss must be within the tolerance
    earlier                 as the schedule is shorter: the loss must not be above the tolerance
    later                   as the schedule is longer, or stays at its peak (LATE_SCHEDULES): a loss above the tolerance
                            says nothing before the end of the run, which must not be above the reference's end
"""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

from gpt2repro.evaluation.reference_curves import (
    Level,
    ReferenceCurve,
    load_curve,
    openai_levels,
    reference_problems,
)
from gpt2repro.recipe import Recipe


Status = Literal["on track", "off", "better", "no verdict"]
SAME_LENGTH = 0.02  # relative difference in tokens up to which two schedules are equally long
SCHEDULE_LENGTH = ("max_steps", "global_batch_tokens", "batch_ramp_start", "batch_ramp_tokens")
LATE_SCHEDULES = ("constant", "wsd")  # lr_schedule
GUIDE = "docs/loss-looks-wrong.md"
NOT_VALIDATED = "no verdict yet: the run has not been validated"


@dataclass(frozen=True)
class JudgedValidation:
    """A validation beside the reference.

    loss: nats per token.
    expected: the reference's loss after as many tokens; None where it has none.
    tolerance: by how much equally good runs differ there.
    """

    step: int
    tokens: int
    loss: float
    status: Status
    expected: float | None = None
    tolerance: float = 0.0


@dataclass(frozen=True)
class Pace:
    """When the learning rate of a run falls, beside the reference's. In a shorter schedule that stays at its peak until
    shortly before its end, it is both: later at first, earlier at the end."""

    earlier: bool
    later: bool

    @classmethod
    def of(cls, record: dict[str, Any], curve: ReferenceCurve) -> "Pace":
        schedule = Recipe(**{name: record[name] for name in SCHEDULE_LENGTH})
        length = schedule.tokens_before(schedule.max_steps) / curve.tokens[-1]
        lr_schedule = record.get("lr_schedule")
        stays_high = lr_schedule in LATE_SCHEDULES and lr_schedule != curve.settings["lr_schedule"]
        return cls(earlier=length < 1 - SAME_LENGTH, later=length > 1 + SAME_LENGTH or stays_high)


@dataclass(frozen=True)
class Verdict:
    """What its validations say about a run.

    status: that of the last validation.
    headline: one line for people; empty if there is nothing to compare the run with.
    validations: in the order of the steps; empty without a comparable reference.
    off_since: the step from which on every validation is off; None: the last one is not.
    curve: the comparable reference; None: there is none.
    levels: OpenAI's losses on the same corpus, of the same size if that is known.
    mismatches: why the reference that the recipe names is not comparable.
    differences: settings in which the run differs from its comparable reference, e.g. `learning_rate=0.04 (there
        0.004)`.
    """

    status: Status
    headline: str
    validations: tuple[JudgedValidation, ...] = ()
    off_since: int | None = None
    curve: ReferenceCurve | None = None
    levels: tuple[Level, ...] = ()
    mismatches: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()

    def remark(self, step: int) -> str:
        """The last validation beside the reference, to be printed after its loss; empty if that says nothing, or if it
        is not that of `step`. Causes are named where the run goes off, and not repeated."""
        if self.status == "no verdict" or self.validations[-1].step != step:
            return ""
        last = self.validations[-1]
        assert self.curve is not None, "there is a verdict"
        where = "at its end" if last.tokens > self.curve.tokens[-1] else "at as many tokens"
        finding = "on track" if last.status == "on track" else f"{_gap(last)} it"
        if self.off_since is not None:
            finding += f" since step {self.off_since:,}"
        if self.off_since == last.step:
            finding += f"; {_causes(self.differences)}"
        return f", reference {last.expected:.4f} {where}: {finding}"


def judge(record: dict[str, Any], rows: list[dict[str, Any]]) -> Verdict:
    """The verdict on a run, which may still be training.

    Args:
        record: the content of its recipe.yaml.
        rows: of its metrics.jsonl, as `read_metrics` returns them.
    """
    rows = [row for row in rows if "val_loss" in row]
    levels = tuple(openai_levels(record))
    beside_levels = [_beside(level, _exported_loss(record, rows)) for level in levels if rows]
    name = record.get("reference_curve")
    if name is None:
        return Verdict("no verdict", "; ".join(beside_levels), levels=levels)
    if problems := reference_problems(name):  # a run from elsewhere
        return Verdict("no verdict", "; ".join([f"no verdict: {problems[0]}", *beside_levels]), levels=levels)
    curve = load_curve(name)
    mismatches = tuple(curve.mismatches(record))
    if mismatches:
        reason = f"no verdict: the run is not comparable with reference_curve={name}: {'; '.join(mismatches)}"
        return Verdict("no verdict", "; ".join([reason, *beside_levels]), levels=levels, mismatches=mismatches)

    pace = Pace.of(record, curve)
    validations = tuple(_judged(row, curve, pace, is_end=row["step"] >= record["max_steps"]) for row in rows)
    off = list(itertools.takewhile(lambda validation: validation.status == "off", reversed(validations)))
    off_since = off[-1].step if off else None
    differences = tuple(curve.differences(record))
    finding = _finding(validations[-1], curve, off_since, differences) if validations else NOT_VALIDATED
    return Verdict(
        status=validations[-1].status if validations else "no verdict",
        headline="; ".join([finding, *beside_levels]),
        validations=validations,
        off_since=off_since,
        curve=curve,
        levels=levels,
        differences=differences,
    )


def _exported_loss(record: dict[str, Any], rows: list[dict[str, Any]]) -> float:
    """The validation loss of the weights that a run exports: of the last, or with `patience` of the best."""
    losses = [row["val_loss"] for row in rows]
    return min(losses) if record.get("patience") else losses[-1]


def _judged(row: dict[str, Any], curve: ReferenceCurve, pace: Pace, is_end: bool) -> JudgedValidation:
    """One row of metrics.jsonl beside the curve.

    Args:
        is_end: the row is that of the run's last step, which is compared with the curve's end if that is earlier.
    """
    step, tokens, loss = row["step"], row["tokens"], row["val_loss"]
    tokens_there = min(tokens, curve.tokens[-1]) if is_end else tokens
    if not curve.covers(tokens_there):
        return JudgedValidation(step, tokens, loss, "no verdict")
    expected, tolerance = curve.loss_at(tokens_there), curve.tolerance(tokens_there)
    status: Status = "on track"
    if not loss <= expected + tolerance:  # NaN is off, too
        status = "no verdict" if pace.later and not is_end else "off"
    elif loss < expected - tolerance and not pace.earlier:
        status = "better"
    return JudgedValidation(step, tokens, loss, status, expected, tolerance)


# ---- words ----


def _finding(last: JudgedValidation, curve: ReferenceCurve, off_since: int | None, differences: tuple[str, ...]) -> str:
    """The headline without OpenAI's levels."""
    loss = f"validation loss {last.loss:.4f} after {last.tokens:,} tokens"
    if last.expected is None:
        where = "begins" if last.tokens < curve.tokens[0] else "ends"
        at = curve.tokens[0] if last.tokens < curve.tokens[0] else curve.tokens[-1]
        return f"no verdict: {loss}; the reference, {curve.title}, {where} at {at:,}"
    reference = f"({curve.title}: {last.expected:.4f}, give or take {last.tolerance:.2g})"
    if last.status == "on track":
        return f"on track: {loss} {reference}"
    compared = f"{last.status}: {loss} is {_gap(last)} the reference"
    if last.status == "no verdict":
        return f"{compared} {reference}, whose learning rate falls earlier"
    if last.status == "better":
        return f"{compared} {reference}; if nothing should make it so, check that it does not train on validation text"
    return f"{compared} since step {off_since:,} {reference}; {_causes(differences)}"


def _gap(validation: JudgedValidation) -> str:
    assert validation.expected is not None, "it has a verdict"
    return _distance(validation.loss, validation.expected)


def _beside(level: Level, loss: float) -> str:
    where = "data" if level.caveat is None else "corpus"
    said = f"{level.loss}, {level.caveat}" if level.caveat else level.loss
    return f"{_distance(loss, level.loss)} {level.name} on the same {where} ({said})"


def _distance(loss: float, reference: float) -> str:
    return f"{abs(loss - reference):.2g} {'below' if loss < reference else 'above'}"


def _causes(differences: tuple[str, ...]) -> str:
    if differences:
        return f"this run has {', '.join(differences)}; {GUIDE} tells causes apart"
    return f"usual causes: data order, gradient accumulation, precision, a changed model; {GUIDE} tells them apart"
