"""Write a report of a run, or of several beside each other: one HTML file that needs no network.

    python -m gpt2repro.report runs/demo                             # report.html in runs/demo
    python -m gpt2repro.report runs/a runs/b --output compared.html
    python -m gpt2repro.report runs/demo --scorecard card/scorecard.json

It shows the verdict, curves, samples through time, the scorecard (that in the run's folder, if it is of its model), the
recipe beside the defaults and the reference, data with hashes, versions and cost. A run may still be training; at its
end it writes its own. Needs `pip install "gpt2repro[report]"`.
"""

import argparse
from pathlib import Path
from typing import Any

from gpt2repro.errors import Parser, UserError, problems_of, refuse, report_write_errors, run_script
from gpt2repro.evaluation.reference_curves import reference_problems
from gpt2repro.evaluation.score_cache import model_sha256
from gpt2repro.evaluation.scorecard import read_scorecard
from gpt2repro.files import write_problem, write_text
from gpt2repro.processes import note
from gpt2repro.run_folder import RunFolder
from gpt2repro.train.report import check_report_packages, is_report, open_run, open_runs


SCORECARD = "scorecard.json"  # in a run's folder


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    from gpt2repro.show.page import report_page

    runs = open_runs(args.runs, args.reference_curve)
    page = report_page(runs, find_scorecard(args.scorecard, args.runs))
    with report_write_errors(args.output):
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.output, page)
    print(f"written to {args.output}")


def find_scorecard(asked: Path | None, runs: list[str]) -> dict[str, Any] | None:
    """The scorecard that is asked for, else that of the only run, if it has one and that is of its model.

    Raises:
        UserError: it is damaged.
    """
    if asked:
        return read_scorecard(asked)
    run = RunFolder(runs[0])
    own = run.path / SCORECARD
    if len(runs) > 1 or not own.is_file():
        return None
    card = read_scorecard(own)
    model = model_sha256(run.model)
    if any(measured["sha256"] == model for measured in card["models"]):
        return card
    note(f"{own} is of other weights than {run.model}; the report leaves it out, and shows it with --scorecard {own}")
    return None


def check_run(path: str) -> None:
    """Refuse what is no run, and a run without a validation."""
    if not open_run(path).series("val_loss")[0]:
        raise UserError(f"{path} has not been validated yet; wait for its first validation, or set validate_every")


def check_output(path: Path) -> None:
    """Refuse to write over what is no report, and where nothing can be written."""
    unwritable = write_problem(path.parent)
    if path.exists() and not is_report(path):
        raise UserError(f"{path} exists and is no report of ours; choose another --output")
    if unwritable:
        raise UserError(f"--output {path}: {unwritable}; choose another")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.prog = "-m gpt2repro.report"
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a run")
    parser.add_argument("--output", type=Path, metavar="FILE", help="what to write (default: report.html in the run)")
    parser.add_argument("--scorecard", type=Path, metavar="FILE", help="a scorecard.json to show as well")
    parser.add_argument("--reference_curve", metavar="NAME", help="known run to compare with (default: the recipe's)")
    args = parser.parse_args(argv)
    problems = problems_of(check_report_packages) + reference_problems(args.reference_curve)
    problems += [problem for path in dict.fromkeys(args.runs) for problem in problems_of(check_run, path)]
    first = RunFolder(args.runs[0])
    if len(args.runs) == 1:
        args.output = args.output or first.report
    if args.output is None:
        problems.append(f"a report of {len(args.runs)} runs needs a place; add --output FILE")
    else:
        problems += problems_of(check_output, args.output)
    if args.scorecard:
        problems += problems_of(read_scorecard, args.scorecard)
    refuse(problems)
    return args


if __name__ == "__main__":
    run_script(main)
