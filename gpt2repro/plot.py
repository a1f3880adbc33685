"""Draw the pictures of one run, or of several on top of each other, and print the verdict on each.

    python -m gpt2repro.plot runs/demo                                  # loss.png and training.png in runs/demo
    python -m gpt2repro.plot runs/a runs/b --output_dir pictures --theme dark

A run may still be training; it draws its own loss.png at every validation.
"""

import argparse
from pathlib import Path

from gpt2repro.errors import Parser, problems_of, refuse, report_write_errors, run_script
from gpt2repro.evaluation.reference_curves import reference_problems
from gpt2repro.files import write_bytes, write_problem
from gpt2repro.show.pictures import THEMES, loss_picture, training_picture
from gpt2repro.train.report import open_runs


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    runs = open_runs(args.runs, args.reference_curve)
    loss, training = args.output_dir / "loss.png", args.output_dir / "training.png"
    with report_write_errors(args.output_dir):
        args.output_dir.mkdir(parents=True, exist_ok=True)
        write_bytes(loss, loss_picture(runs, args.theme))
        write_bytes(training, training_picture(runs, args.theme))
    for run in runs:
        print(f"{run.name}: {run.verdict.headline or 'no verdict: its recipe names no reference_curve'}")
    print(f"written to {loss} and {training}")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.prog = "-m gpt2repro.plot"
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a run")
    parser.add_argument("--output_dir", type=Path, help="folder for the pictures (default: the run's, if there is one)")
    parser.add_argument("--theme", choices=THEMES, default="light", help="light or dark (default: %(default)s)")
    parser.add_argument("--reference_curve", metavar="NAME", help="known run to compare with (default: the recipe's)")
    args = parser.parse_args(argv)
    if args.output_dir is None and len(args.runs) == 1:
        args.output_dir = Path(args.runs[0])
    problems = problems_of(open_runs, args.runs) + reference_problems(args.reference_curve)
    if args.output_dir is None:
        problems.append(f"the pictures of {len(args.runs)} runs need a folder; add --output_dir FOLDER")
    elif unwritable := write_problem(args.output_dir):
        problems.append(f"--output_dir {args.output_dir}: {unwritable}; choose another")
    refuse(problems)
    return args


if __name__ == "__main__":
    run_script(main)
