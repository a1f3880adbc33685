"""What a run reports: what it has logged, its final losses, the software versions, and where its files are."""

import contextlib
import dataclasses
import platform
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpt2repro.data.mixture import RunData
from gpt2repro.data.token_stream import bits_per_byte, unigram_entropy
from gpt2repro.errors import CHECK_PERMISSIONS, UserError, first_line, problems_of, refuse
from gpt2repro.files import CHECKOUT, write_text
from gpt2repro.run_folder import RunFolder
from gpt2repro.show.logged_run import LoggedRun
from gpt2repro.show.public import REPORT_MARK
from gpt2repro.train.metrics import read_metrics


REPORT_PACKAGES = ("bokeh", "jinja2")


def provenance() -> dict[str, Any]:
    """Versions of the software and, in a git checkout, the commit."""
    import torch  # takes seconds, and pictures and reports of a run need nothing of it

    commit = None
    if (CHECKOUT / ".git").exists():  # an installed copy may lie inside another repository's checkout
        git = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40"]
        with contextlib.suppress(OSError):  # git is not installed
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    packages = ("transformers", "accelerate", "datasets")
    versions = {package: version(package) for package in packages}
    torch_build = str(torch.__version__)  # says which CUDA it was built for; the installed package's version does not
    return {"python": platform.python_version(), "torch": torch_build, **versions, "git_commit": commit}


def baseline_loss(data: RunData) -> float:
    """The unigram entropy of the training split, nats per token: the loss of a model that knows only how frequent each
    token is."""
    return unigram_entropy(data.train.frequencies(data.tokenizer.vocab_size))


def open_run(path: str) -> LoggedRun:
    """What a run in a folder has logged; it may still be training.

    Raises:
        UserError: the folder is no run, the run has logged nothing yet, or its records are damaged.
    """
    folder = RunFolder(path)
    if not folder.recipe.is_file():
        around = RunFolder.around(folder.path)
        remedy = f"give {around.path}" if around else "give the output_dir of a run"
        raise UserError(f"{path} is no run, as it has no {folder.recipe.name}; {remedy}")
    record = folder.read_record()
    if not folder.metrics.is_file():
        raise UserError(f"{path} has logged nothing yet, as it has no {folder.metrics.name}; wait for its first row")
    try:
        rows = read_metrics(folder.metrics)
    except OSError as error:
        raise UserError(f"{folder.metrics} cannot be read ({first_line(error)}); {CHECK_PERMISSIONS}") from error
    if not rows:
        raise UserError(f"{folder.metrics} holds no row of a run's metrics; restore it, or give another run")
    return LoggedRun(folder.path.resolve().name, record, rows)


def open_runs(paths: list[str], reference_curve: str | None = None) -> list[LoggedRun]:
    """Runs that are shown together, each once, under as much of their paths as tells them apart.

    Args:
        reference_curve: what all are compared with; None: what their recipes name.
    Raises:
        UserError: one line for each that cannot be opened.
    """
    refuse([problem for path in paths for problem in problems_of(open_run, path)])
    folders = list(dict.fromkeys(Path(path).resolve() for path in paths))
    depth = 1
    while len({_end(folder, depth) for folder in folders}) < len(folders):
        depth += 1
    runs = [dataclasses.replace(open_run(str(folder)), name=_end(folder, depth)) for folder in folders]
    if reference_curve is None:
        return runs
    reference = {"reference_curve": reference_curve}
    return [dataclasses.replace(run, record=run.record | reference) for run in runs]


def _end(folder: Path, depth: int) -> str:
    """The last parts of a path."""
    return "/".join(folder.parts[-depth:])


def check_report_packages() -> None:
    """Raises UserError: what report.html is made with is not installed."""
    missing = [package for package in REPORT_PACKAGES if find_spec(package) is None]
    if missing:
        raise UserError(f'a report needs {" and ".join(missing)}; run `pip install "gpt2repro[report]"`')


def is_report(path: Path) -> bool:
    """Whether a file is a report that we wrote."""
    return path.is_file() and REPORT_MARK.encode() in path.read_bytes()[:1000]


def write_report(folder: RunFolder, run: LoggedRun) -> str:
    """Write report.html into a run's folder if its packages can make it and nothing else is there.

    Returns:
        Its path, or why there is none.
    """
    problems = problems_of(check_report_packages)
    if folder.report.exists() and not is_report(folder.report):
        problems.append(f"{folder.report} exists and is no report of ours; move it away")
    if problems:
        return f"none: {'; '.join(problems)}; then `python -m gpt2repro.report {folder.path}` writes it"
    try:
        from gpt2repro.show.page import report_page

        page = report_page([run])
    except Exception as error:  # of bokeh, or in what the run logged: no reason to end a run without its results
        return f"none, as it could not be made ({first_line(error)})"
    write_text(folder.report, page)
    return str(folder.report)


def losses_text(val_loss: float, baseline: float, data: RunData, at_step: str) -> str:
    """The validation loss and the baseline, for readers.

    Args:
        val_loss, baseline: nats per token.
        at_step: names the step of val_loss if it may not be the last; else "".
    """
    val = data.totals("val")
    bits = bits_per_byte(val_loss, val.tokens, val.bytes)
    in_bits = "" if bits is None else f" = {bits:.4f} bits per byte"
    return (
        f"validation loss {val_loss:.4f} nats per token{in_bits}{at_step}\n"
        f"for comparison, the unigram entropy: {baseline:.4f} nats per token, the loss of a model that knows only how "
        "frequent each token is"
    )


def files_text(folder: RunFolder, report: str) -> str:
    """Where the run's files are, and how to load the model.

    Args:
        report: what `write_report` returned.
    """
    adapter = f"adapter     {folder.adapter}\n" if folder.adapter.is_dir() else ""
    return (
        f"metrics     {folder.metrics}\n"
        f"picture     {folder.picture}\n"
        f"report      {report}\n"
        f"checkpoint  {folder.latest_checkpoint()}\n"
        f"model       {folder.model}\n"
        f"{adapter}"
        "\n"
        "from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast\n"
        f'model = AutoModelForCausalLM.from_pretrained("{folder.model}", trust_remote_code=True)\n'
        f'tokenizer = PreTrainedTokenizerFast.from_pretrained("{folder.model}")'
    )
