"""What a run reports: what it has logged, its final losses, the software versions, and where its files are."""

import contextlib
import platform
import subprocess
from importlib.metadata import version
from typing import Any

import torch

from gpt2repro.data.mixture import RunData
from gpt2repro.data.token_stream import bits_per_byte, unigram_entropy
from gpt2repro.errors import CHECK_PERMISSIONS, UserError, first_line
from gpt2repro.files import CHECKOUT
from gpt2repro.run_folder import RunFolder
from gpt2repro.show.logged_run import LoggedRun
from gpt2repro.train.metrics import read_metrics


def provenance() -> dict[str, Any]:
    """Versions of the software and, in a git checkout, the commit."""
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


def files_text(folder: RunFolder) -> str:
    """Where the run's files are, and how to load the model."""
    return (
        f"metrics     {folder.metrics}\n"
        f"picture     {folder.picture}\n"
        f"checkpoint  {folder.latest_checkpoint()}\n"
        f"model       {folder.model}\n"
        "\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model = AutoModelForCausalLM.from_pretrained("{folder.model}", trust_remote_code=True)\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{folder.model}")'
    )
