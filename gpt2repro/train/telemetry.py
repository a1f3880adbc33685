"""What a run measures of itself: metrics.jsonl, speed, the picture of the loss, and what the run was made of."""

import contextlib
import json
import math
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from gpt2repro.errors import first_line, written
from gpt2repro.models.unwrap import full_tensor
from gpt2repro.recipe import Recipe
from gpt2repro.train.guard import Guard


# Dense bf16 (fp16 for V100) peak in FLOP/s, from NVIDIA's datasheets; the first pattern that fits the name counts.
PEAK_FLOPS = {
    r"B200": 2250e12,
    r"(H200|GH200)(?! NVL)": 989e12,
    r"H100 NVL": 835e12,
    r"H100 PCIe": 756e12,
    r"H100": 989e12,
    r"A100": 312e12,
    r"L40S": 362e12,
    r"RTX 4090(?! Laptop| D)": 165e12,
    r"RTX 3090(?! Ti)": 71e12,
    r"V100-SXM\d": 125e12,
    r"V100-PCIE": 112e12,
}
UPDATE_RATIO_EVERY = 100  # steps; it takes a copy of the weights
OF_THE_CLOCK = ("tokens_per_second", "data_wait", "hours", "hours_left")  # keys of a row that no two runs share
ROW_KINDS = ("loss", "val_loss", "hellaswag_acc", "samples")  # the key that tells what a row of metrics.jsonl is


def peak_flops(device: torch.device, mixed_precision: str) -> float | None:
    """The device's peak rate for 16-bit matrix products in FLOP/s; None where it is not known or not used."""
    if device.type != "cuda" or mixed_precision not in ("bf16", "fp16"):
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name or ("V100" in name and mixed_precision == "bf16"):
        return None  # a part of a GPU; no bf16 units
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.search(rf"\b({pattern})\b", name)), None)


def flops_per_token(config, parameters: int, sequence_length: int) -> float:
    """Floating point operations of a training step for each token: 6 a weight, and 12 * n_layer * n_embd * T of
    attention; position embeddings are looked up, not multiplied. Source: PaLM paper, appendix B; nanoGPT estimate_mfu.
    """
    weights = parameters - config.n_positions * config.n_embd
    return 6 * weights + 12 * config.n_layer * config.n_embd * sequence_length


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory that torch's allocator held on a GPU; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


class Metrics:
    """metrics.jsonl: one JSON object a row, appended and never rewritten.

    A resumed run passes through steps that were logged before it was stopped; they are not logged twice. After a
    rollback they are, as they are other ones. A last row that a crash cut off is removed.
    """

    def __init__(self, path: Path):
        self.path = path
        self.last_step = dict.fromkeys(ROW_KINDS, -1)
        self.size = 0  # bytes of whole rows
        self.unwritten = b""  # rows that found no space
        if path.exists():
            self.size = path.read_bytes().rfind(b"\n") + 1
            for row in _rows(path):  # after a rollback the last one is not the latest step
                self.last_step[_kind(row)] = row["step"]

    def roll_back(self, step: int) -> None:
        """What was logged after a step will be logged again."""
        self.last_step = {kind: min(last, step) for kind, last in self.last_step.items()}

    def add(self, row: dict) -> bool:
        """Take a row to be written, unless its step has one of its kind; returns whether it was new."""
        kind = _kind(row)
        if row["step"] <= self.last_step[kind]:
            return False
        self.last_step[kind] = row["step"]
        self.unwritten += json.dumps(row).encode() + b"\n"
        return True

    def write(self) -> None:
        """Append the rows that were added.

        Raises:
            OSError: it cannot be done, e.g. as the disk is full. They are kept for the next time.
        """
        with self.path.open("ab") as file:
            file.truncate(self.size)  # without what a crash or a full disk has cut off
            file.write(self.unwritten)
        self.size += len(self.unwritten)
        self.unwritten = b""


class Telemetry:
    """Measures and reports a run: metrics.jsonl, the progress bar and the tracker. All processes call it alike.

    Args:
        model: the bare model.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, model: torch.nn.Module):
        self.recipe, self.accelerator = recipe, accelerator
        self.metrics = Metrics(Path(recipe.output_dir) / "metrics.jsonl") if accelerator.is_main_process else None
        self.parameters = list(model.parameters())
        n_parameters = sum(p.numel() for p in self.parameters)
        self.flops_per_token = flops_per_token(model.config, n_parameters, recipe.sequence_length)
        self.peak_flops = peak_flops(accelerator.device, accelerator.mixed_precision)
        if recipe.peak_tflops:
            self.peak_flops = recipe.peak_tflops * 1e12
        self.bar = tqdm(
            desc="training",
            unit=" steps",
            total=recipe.max_steps,
            mininterval=0.5 if sys.stderr.isatty() else 30,  # seconds; a log file needs no moving bar
            disable=not accelerator.is_main_process,
        )
        self.losses: list[float] = []  # of the steps since the last row
        self.clipped = 0  # of these steps, how many had their gradient scaled down
        self.timed_steps = 0  # of these steps, how many this process has made
        self.hours_before = 0.0  # of the run, until this process took it over
        self.began = time.perf_counter()
        self.waited = 0.0  # seconds that this process has waited for data since the last row
        self.update_ratio: float | None = None
        self.lap_start = time.perf_counter()

    @property
    def hours(self) -> float:
        """Of the run, evaluation and what was rolled back included; what a killed process did last is not known."""
        return self.hours_before + (time.perf_counter() - self.began) / 3600

    def state_dict(self) -> dict:
        since_row = {"losses": self.losses, "clipped": self.clipped, "update_ratio": self.update_ratio}
        return since_row | {"hours": self.hours}

    def start(self, step: int, state: dict | None) -> None:
        """Training begins, or goes on, after `step` steps, with the state of then."""
        if state is not None:
            self.losses, self.clipped, self.hours_before = list(state["losses"]), state["clipped"], state["hours"]
            self.update_ratio = state["update_ratio"]
        self.timed_steps, self.waited = 0, 0.0
        self.bar.n = self.bar.initial = step
        self.began = self.lap_start = time.perf_counter()

    def roll_back(self, step: int, state: dict) -> None:
        """The steps after `step` will be made again, from the state of then."""
        if self.metrics is not None:
            self.metrics.roll_back(step)
        self.start(step, state | {"hours": self.hours})  # what is undone took its time

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as training time."""
        began = time.perf_counter()
        yield
        self.lap_start += time.perf_counter() - began

    def next_of(self, batches: Iterator[torch.Tensor]) -> torch.Tensor:
        """The next micro-batch; how long it took counts as waiting for data."""
        began = time.perf_counter()
        tokens = next(batches)
        self.waited += time.perf_counter() - began
        return tokens

    @contextlib.contextmanager
    def update(self, step: int) -> Iterator[None]:
        """The update of step `step` is made inside; now and then its size is measured beside that of the weights."""
        if step % UPDATE_RATIO_EVERY:
            yield
            return
        before = [p.detach().clone() for p in self.parameters]
        yield
        difference = torch._foreach_sub([p.detach() for p in self.parameters], before)
        self.update_ratio = (_norm(difference) / _norm(before)).item()

    def log_step(self, step: int, loss: float, lr: float, grad_norm: float, guard: Guard) -> None:
        """After `step` steps: a row at every log_every-th, its loss the mean since the row before.

        Args:
            loss: mean of the step over all processes, nats per token.
            grad_norm: global, before clipping.
        """
        self.losses.append(loss)
        self.clipped += grad_norm > self.recipe.max_grad_norm
        self.timed_steps += 1
        self.bar.update()
        if guard.bad_batches:
            self.say(f"step {step:,}: loss {loss:.4f}, gradient norm {grad_norm:.4f}: no update")
        elif guard.spiked:
            self.say(f"step {step:,}: loss {loss:.4f} is {guard.zscore:.1f} standard deviations above those before")
        if step % self.recipe.log_every and step != self.recipe.max_steps:
            return
        now = time.perf_counter()
        seconds = now - self.lap_start
        tokens = self.recipe.tokens_before(step) - self.recipe.tokens_before(step - self.timed_steps)
        tokens_per_second = tokens / seconds
        finite = [value for value in self.losses if math.isfinite(value)]
        mean_loss = sum(finite) / len(finite) if finite else None
        mfu = None
        if self.peak_flops:
            mfu = tokens_per_second * self.flops_per_token / (self.peak_flops * self.accelerator.num_processes)
        hours = self.hours
        row = {
            "loss": mean_loss,
            "lr": lr,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "clipped": self.clipped / len(self.losses),
            "bad_steps": guard.bad_steps,
            "loss_zscore": guard.zscore,
            "update_ratio": self.update_ratio,
            "tokens_per_second": tokens_per_second,
            "data_wait": self.waited / seconds,
            "mfu": mfu,
            "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
            "hours": hours,
            "hours_left": seconds / 3600 / self.timed_steps * (self.recipe.max_steps - step),
        }
        if self.recipe.dollars_per_hour:
            row["dollars"] = hours * self.recipe.dollars_per_hour
        self.log(step, **row)
        shown = {"loss": "none" if mean_loss is None else f"{mean_loss:.3f}", "tok/s": f"{tokens_per_second:,.0f}"}
        self.bar.set_postfix(shown | ({"MFU": f"{mfu:.1%}"} if mfu else {}), refresh=False)
        self.losses, self.clipped, self.timed_steps, self.waited, self.update_ratio = [], 0, 0, 0.0, None
        self.lap_start = now

    def log(self, step: int, **values) -> None:
        """A row of other values, e.g. val_loss or samples."""
        if self.metrics is None:
            return
        row = {"step": step, "tokens": self.recipe.tokens_before(step), **values}
        if not self.metrics.add(row):
            return
        try:
            self.metrics.write()
        except OSError as error:
            self.say(f"{self.metrics.path} could not be written ({first_line(error)}); its rows wait, training goes on")
        with self._tracker_may_fail():
            track(self.accelerator, row)

    def say(self, text: str) -> None:
        """Print above the progress bar."""
        if self.metrics is not None:
            self.bar.write(text)

    def close(self) -> None:
        """End the bar, metrics.jsonl and the tracker.

        Raises:
            UserError: metrics.jsonl cannot be written; on the main process.
        """
        self.bar.close()
        if self.metrics is not None:
            with written(self.metrics.path):
                self.metrics.write()
        with self._tracker_may_fail():
            for tracker in self.accelerator.trackers:
                tracker.finish()
        self.accelerator.trackers.clear()
        self.accelerator.end_training()

    @contextlib.contextmanager
    def _tracker_may_fail(self) -> Iterator[None]:
        """What the tracker raises inside ends the tracking, not the run."""
        try:
            yield
        except Exception as error:  # its kind is up to the tracker
            self.accelerator.trackers.clear()
            self.say(f"report_to={self.recipe.report_to} failed ({first_line(error)}); only metrics.jsonl goes on")


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    return full_tensor(torch.nn.utils.get_total_norm(tensors))


def _kind(row: dict) -> str:
    return next(kind for kind in ROW_KINDS if kind in row)


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, without one that a crash cut off; of a step that a rollback repeated, the newest."""
    return list({(_kind(row), row["step"]): row for row in _rows(path)}.values())


def _rows(path: Path) -> Iterator[dict]:
    text = path.read_text()
    return map(json.loads, text[: text.rfind("\n") + 1].splitlines())


def exported_step(metrics: list[dict], record: dict) -> int:
    """The step whose weights a run exports: its last, or the best validated one where its recipe has `patience`."""
    if not record.get("patience"):
        return metrics[-1]["step"]
    return min((row for row in metrics if "val_loss" in row), key=lambda row: row["val_loss"])["step"]


def track(accelerator: Accelerator, row: dict) -> None:
    """Hand the numbers of a row of metrics.jsonl to the tracker."""
    numbers = {k: v for k, v in row.items() if k not in ("step", "tokens") and isinstance(v, int | float)}
    if numbers:
        accelerator.log(numbers, step=row["step"])


def provenance() -> dict:
    """The software that runs: versions and, in a git checkout, the commit."""
    root = Path(__file__).resolve().parents[2]
    commit = None
    if (root / ".git").exists():  # an installed copy may lie inside somebody else's checkout
        git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        with contextlib.suppress(OSError):  # no git on this machine
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    packages = ("torch", "transformers", "accelerate", "datasets")
    return {"python": platform.python_version(), **{p: version(p) for p in packages}, "git_commit": commit}


def plot_losses(metrics: list[dict], lines: dict[str, float], path: Path, title: str) -> None:
    """Draw training and validation loss over steps, with a horizontal line for each named reference loss."""
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    from matplotlib import pyplot

    train = [(row["step"], row["loss"]) for row in metrics if "loss" in row]
    val = [(row["step"], row["val_loss"]) for row in metrics if "val_loss" in row]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axes.plot(*zip(*train), color="tab:blue", alpha=0.5, linewidth=1, label="training")
    if val:
        axes.plot(*zip(*val), color="tab:orange", marker="o", markersize=4, label=f"validation, last {val[-1][1]:.4f}")
    for (name, loss), color in zip(lines.items(), ("gray", "tab:green", "tab:red", "tab:purple", "tab:brown")):
        axes.axhline(loss, linestyle="--", color=color, linewidth=1, label=f"{name}, {loss:.4f}")
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
