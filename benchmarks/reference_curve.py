"""Make a reference curve from finished runs of one recipe that differ in nothing but their seed.

    python train_accelerate.py --config recipes/demo.yaml --validate_every 50 --seed 1 --output_dir runs/demo_1
    ...                                                                       --seed 2 --output_dir runs/demo_2
    python benchmarks/reference_curve.py runs/demo_* --title "the demo, recipes/demo.yaml" \
        --output gpt2repro/evaluation/reference_curves/demo.yaml

The curve is the mean of their validation losses. Its spread, `sigma` and `progress` (see ReferenceCurve.tolerance), is
that under which the variances between the runs, step by step, are likeliest, if losses are normally distributed. The
table shows each step's mean, the standard deviation between the runs and that of the fitted spread, and how far each
run is from the mean of the others, as a share of the tolerance around that mean: above 1, it would be called off.
"""

import argparse
import dataclasses
import datetime
import sys
from pathlib import Path

import numpy as np
import yaml


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpt2repro.errors import Parser, refuse, run_script
from gpt2repro.evaluation.reference_curves import CONDITIONS, ReferenceCurve, model_of
from gpt2repro.recipe import Recipe
from gpt2repro.show.logged_run import LoggedRun
from gpt2repro.train.report import open_run


NO_SETTINGS = (  # conditions; what the model's fields stand for; and what does not change the loss of AdamW and cosine
    *("seed", "init_from", "sequence_length", "model", "patience", "spike_zscore", "compile", "decay_fraction"),
    *("decay_shape", "muon_learning_rate", "muon_momentum", "muon_weight_decay"),
)
MODEL_SETTINGS = (
    "n_head",
    "bias",
    "activation_function",
    "initializer_range",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
)
SIGMAS = np.geomspace(1e-5, 1, 200)  # nats per token, tried
PROGRESSES = np.concatenate([[0.0], np.geomspace(1e-5, 1, 200)])  # shares of the tokens, tried


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    runs = [open_run(path) for path in args.runs]
    refuse(problems_of_runs(runs))
    losses = np.array([run.series("val_loss")[1] for run in runs])  # (runs, validations)
    curve = make_curve(args.title, runs, runs[0].series("val_loss")[0], losses)
    if args.corpus:
        curve = dataclasses.replace(curve, conditions=curve.conditions | {"corpus": args.corpus})
    print_table(curve, losses)
    args.output.write_text(as_yaml(curve))
    print(f"written to {args.output}")


def problems_of_runs(runs: list[LoggedRun]) -> list[str]:
    """Why the runs are not repetitions of each other."""
    first, problems = runs[0], []
    if len(runs) < 2:
        problems.append(f"{len(runs)} run says nothing about the spread between runs; give at least 2")
    for run in runs:
        if run.rows[-1]["step"] < run.record["max_steps"]:
            problems.append(f"{run.name} has not ended; wait for it")
        if run.series("val_loss")[0] != first.series("val_loss")[0]:
            problems.append(f"{run.name} was validated at other steps than {first.name}; use the same validate_every")
        if settings(run.record) != settings(first.record) or conditions(run.record) != conditions(first.record):
            problems.append(f"{run.name} differs from {first.name} in more than its seed; repeat the same recipe")
    return problems


def conditions(record: dict) -> dict:
    return {name: value_of(record) for name, value_of in CONDITIONS.items()}


def settings(record: dict) -> dict:
    """What may be wrong with another run: the fields that a resumed run cannot change, and the model's."""
    recipe_fields = [field.name for field in dataclasses.fields(Recipe) if not field.metadata["changeable"]]
    recipe = {name: record[name] for name in recipe_fields if name not in NO_SETTINGS}
    model = model_of(record)
    return recipe | {f"model.{name}": model[name] for name in MODEL_SETTINGS}


def make_curve(title: str, runs: list[LoggedRun], tokens: list[int], losses: np.ndarray) -> ReferenceCurve:
    """The mean of the runs, with the spread under which their variances are likeliest.

    Args:
        losses: (runs, validations) float64.
    """
    record = runs[0].record
    seeds = ", ".join(str(run.record["seed"]) for run in runs)
    software = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    on = f"{record['hardware']}, {datetime.date.today()}"
    curve = ReferenceCurve(
        name="",
        title=title,
        source="measured here by benchmarks/reference_curve.py",
        measured=f"{len(runs)} runs, seeds {seeds}; {on}; {software}",
        conditions=conditions(record),
        settings=settings(record),
        spread={"runs": len(runs), "sigma": 0.0, "progress": 0.0},
        tokens=tuple(tokens),
        losses=tuple(losses.mean(axis=0).round(4).tolist()),
    )
    slopes = np.array([curve.slope_at(at) for at in tokens])
    sigma, progress = fit_spread(losses.var(axis=0, ddof=1), slopes)
    return dataclasses.replace(curve, spread={"runs": len(runs), "sigma": sigma, "progress": progress})


def fit_spread(variances: np.ndarray, slopes: np.ndarray) -> tuple[float, float]:
    """The sigma and progress under which the sample variances are likeliest.

    A sample variance s of a normal distribution with variance v has, but for a factor n - 1 that all points share and
    terms without v, the log-likelihood -(log v + s / v) / 2.

    Args:
        variances, slopes: (validations,) float64: between the runs, nats^2; and of the curve, nats for e times the
            tokens.
    """
    sigma, progress = np.meshgrid(SIGMAS, PROGRESSES, indexing="ij")
    expected = sigma[..., None] ** 2 + (progress[..., None] * slopes) ** 2  # (sigmas, progresses, validations)
    misfit = (np.log(expected) + variances / expected).sum(axis=-1)
    best = np.unravel_index(misfit.argmin(), misfit.shape)
    return float(f"{sigma[best]:.2g}"), float(f"{progress[best]:.2g}")


def print_table(curve: ReferenceCurve, losses: np.ndarray) -> None:
    others = [np.delete(losses, run, axis=0).mean(axis=0) for run in range(len(losses))]
    runs_of_others = dataclasses.replace(curve, spread=curve.spread | {"runs": len(losses) - 1})
    print(f"{'tokens':>14}{'mean':>9}{'measured':>10}{'fitted':>9}   distance from the mean of the others / tolerance")
    for at, tokens in enumerate(curve.tokens):
        measured, fitted = losses[:, at].std(ddof=1), curve.deviation(tokens)
        shares = [(run[at] - mean[at]) / runs_of_others.tolerance(tokens) for run, mean in zip(losses, others)]
        listed = " ".join(f"{share:+6.2f}" for share in shares)
        print(f"{tokens:14,}{curve.losses[at]:9.4f}{measured:10.4f}{fitted:9.4f}   {listed}")
    print(f"sigma {curve.spread['sigma']} nats, progress {curve.spread['progress']} of the tokens")


def as_yaml(curve: ReferenceCurve) -> str:
    """The content of the curve's file; see gpt2repro/evaluation/reference_curves.py."""
    head = {name: getattr(curve, name) for name in ("title", "source", "measured", "conditions", "settings", "spread")}
    points = "".join(f"  - [{tokens}, {loss:.4f}]\n" for tokens, loss in zip(curve.tokens, curve.losses))
    return yaml.safe_dump(head, sort_keys=False, width=120) + f"points:  # tokens, nats per token\n{points}"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a finished run")
    parser.add_argument("--title", required=True, help="what the curve is called in pictures and verdicts")
    parser.add_argument("--corpus", nargs="+", metavar="NAME", help="all names of the corpus (default: the runs')")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the YAML file to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main)
