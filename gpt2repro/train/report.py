"""What a run reports at its end: the loss curve, the final losses, the software versions, and where its files are."""

import contextlib
import io
import itertools
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gpt2repro.data.mixture import RunData
from gpt2repro.data.token_stream import bits_per_byte, unigram_entropy
from gpt2repro.files import CHECKOUT, write_bytes
from gpt2repro.run_folder import RunFolder


FEW_ROWS = 20  # below this, each row of the training loss is marked: a single one has no line
LEAST_RANGE = 1.0  # nats that the loss axis spans at least
LINE_COLORS = ("gray", "tab:green", "tab:red", "tab:purple", "tab:brown")


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


def corpus_title(corpus: dict[str, Any]) -> str:
    """A corpus's name for everyone to read; of one on this machine, which has no revision, the path's last part."""
    return corpus["name"] if corpus.get("revision") else Path(corpus["name"]).name


def plot_losses(
    metrics: list[dict[str, Any]], lines: dict[str, float], path: Path, title: str, exported: int | None = None
) -> None:
    """Draw training and validation loss over steps, with a horizontal line for each named reference loss.

    Args:
        title: like the names of the lines drawn as it is, dollar signs included.
        exported: the step whose weights are exported if that may not be the last; it is marked.
    """
    import matplotlib

    matplotlib.use("Agg")  # needs no display
    matplotlib.rcParams.update({"text.parse_math": False, "text.usetex": False})
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    train = [(row["step"], row["loss"]) for row in metrics if "loss" in row]
    val = [(row["step"], row["val_loss"]) for row in metrics if "val_loss" in row]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    marker = "." if len(train) < FEW_ROWS else None
    axes.plot(*zip(*train), color="tab:blue", alpha=0.5, linewidth=1, marker=marker, label="training")
    if val:
        last = val[-1][1]
        axes.plot(*zip(*val), color="tab:orange", marker="o", markersize=4, label=f"validation, last {last:.4f}")
    if exported is not None:
        loss = dict(val)[exported]
        label = f"exported, step {exported:,}, {loss:.4f}"
        axes.plot(exported, loss, color="tab:red", marker="*", markersize=12, linestyle="none", label=label)
    for (name, loss), color in zip(lines.items(), itertools.cycle(LINE_COLORS)):
        axes.axhline(loss, linestyle="--", color=color, linewidth=1, label=f"{name}, {loss:.4f}")
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.set_xlim(left=0)
    low, high = axes.get_ylim()
    if high - low < LEAST_RANGE:  # hardly any rows yet: their noise must not fill the picture
        middle = (low + high) / 2
        axes.set_ylim(middle - LEAST_RANGE / 2, middle + LEAST_RANGE / 2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    pyplot.close(figure)
    write_bytes(path, picture.getvalue())


def shortened(number: int) -> str:
    """A count for titles: 124.4M, 0.3M, 25.7K."""
    return f"{number / 1e6:.1f}M" if number >= 1e5 else f"{number / 1e3:.1f}K"


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
