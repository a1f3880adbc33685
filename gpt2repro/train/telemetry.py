"""What a run measures and logs as it trains: rows of metrics.jsonl, the progress bar, the tracker."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from tqdm import tqdm

from gpt2repro.errors import first_line, report_write_errors
from gpt2repro.models.unwrap import full_tensor
from gpt2repro.plan.sizes import flops_per_token
from gpt2repro.recipe import Recipe
from gpt2repro.run_folder import RunFolder
from gpt2repro.train.guard import Guard
from gpt2repro.train.metrics import Metrics
from gpt2repro.train.speed import peak_flops, peak_memory_bytes
from gpt2repro.train.tracker import track


UPDATE_RATIO_EVERY = 100  # steps; measuring it copies the weights


class Unbreakable:
    """An output stream that may fail, because a log's disk is full or `| head` has ended: training goes on."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # the latter if it is closed
            self.stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Telemetry:
    """Measures and logs a run. All ranks make the same calls; the main process writes.

    Args:
        model: the raw model.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, model: torch.nn.Module):
        self.recipe, self.accelerator = recipe, accelerator
        self.metrics = Metrics(RunFolder(recipe.output_dir).metrics) if accelerator.is_main_process else None
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        n_trained = sum(p.numel() for p in self.parameters)
        n_frozen = sum(p.numel() for p in model.parameters()) - n_trained
        self.flops_per_token = flops_per_token(model.config, n_trained, recipe.sequence_length, n_frozen)
        self.peak_flops = peak_flops(accelerator.device, accelerator.mixed_precision)
        if recipe.peak_tflops:
            self.peak_flops = recipe.peak_tflops * 1e12
        self.bar = tqdm(
            file=Unbreakable(sys.stderr),
            desc="training",
            unit=" steps",
            total=recipe.max_steps,
            mininterval=0.5 if sys.stderr.isatty() else 30,  # seconds; a log file does not need an animated bar
            disable=not accelerator.is_main_process,
        )
        # Since the last row:
        self.losses: list[float] = []
        self.clipped = 0  # steps whose gradient was clipped
        self.timed_steps = 0  # steps by this process
        self.update_ratio: float | None = None
        self.lap_start = time.perf_counter()
        # Since this process started:
        self.waited = 0.0  # seconds spent waiting for data
        self.waited_before = 0.0  # the same, up to the last row
        self.began = time.perf_counter()
        # Of the run:
        self.hours_before = 0.0  # by earlier processes

    @property
    def hours(self) -> float:
        """Duration of the run, including evaluations and rolled-back steps. What a killed process did after its last
        checkpoint is unknown and not counted."""
        return self.hours_before + (time.perf_counter() - self.began) / 3600

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": self.losses,
            "clipped": self.clipped,
            "update_ratio": self.update_ratio,
            "hours": self.hours,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.clipped = list(state["losses"]), state["clipped"]
        self.update_ratio, self.hours_before = state["update_ratio"], state["hours"]

    def start(self, step: int) -> None:
        """Training begins or resumes after `step` steps. Rows of later steps that were logged before are not logged
        again, unless the recipe was changed here and they come from the old one."""
        if self.metrics is not None:
            self.metrics.resume(step)
            if step in RunFolder(self.recipe.output_dir).override_steps():
                self.metrics.roll_back(step)
        self._start_clock(step)

    def _start_clock(self, step: int) -> None:
        self.timed_steps, self.waited_before = 0, self.waited
        self.bar.n = self.bar.initial = step
        self.began = self.lap_start = time.perf_counter()

    def roll_back(self, step: int, state: dict[str, Any]) -> None:
        """Return to `state`, that of step `step`; the steps after it will be repeated and logged again."""
        if self.metrics is not None:
            self.metrics.roll_back(step)
        hours = self.hours  # steps that are undone took time too
        self.load_state_dict(state)
        self.hours_before = hours
        self._start_clock(step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude what happens inside from the training time that tokens_per_second is computed from."""
        began = time.perf_counter()
        yield
        self.lap_start += time.perf_counter() - began

    @contextlib.contextmanager
    def measuring_update(self, step: int) -> Iterator[None]:
        """Wraps the optimizer update of step `step`; every UPDATE_RATIO_EVERY steps, measures the norm of the update
        relative to that of the trained weights."""
        if step % UPDATE_RATIO_EVERY:
            yield
            return
        before = [p.detach().clone() for p in self.parameters]
        yield
        after = [p.detach() for p in self.parameters]
        norm_before = _norm(before)
        torch._foreach_sub_(before, after)  # in place: another copy of the weights can be what does not fit
        self.update_ratio = (_norm(before) / norm_before).item()

    def log_step(
        self, step: int, loss: float, lr: float, grad_norm: float, guard: Guard, seconds_waited: float = 0.0
    ) -> None:
        """Record a step; every log_every steps log a row, whose loss is the mean since the last row.

        Args:
            step: steps completed, this one included.
            loss: of this step, mean over all ranks, nats per token.
            lr: of this step.
            grad_norm: global, before clipping.
            seconds_waited: for data, since the process started.
        """
        self.losses.append(loss)
        if grad_norm > self.recipe.max_grad_norm:
            self.clipped += 1
        self.timed_steps += 1
        self.waited = seconds_waited
        self.bar.update()
        if guard.bad_batches:
            self.say(f"step {step:,}: loss {loss:.4f}, gradient norm {grad_norm:.4f}: update skipped")
        elif guard.spiked:
            self.say(f"step {step:,}: loss {loss:.4f} is {guard.zscore:.1f} standard deviations above the recent mean")
        if step % self.recipe.log_every == 0 or step == self.recipe.max_steps:
            now = time.perf_counter()
            row = self._row(step, lr, grad_norm, guard, seconds=now - self.lap_start)
            self.log(step, **row)
            self._show(row)
            self.losses, self.clipped, self.timed_steps, self.update_ratio = [], 0, 0, None
            self.lap_start, self.waited_before = now, self.waited

    def _row(self, step: int, lr: float, grad_norm: float, guard: Guard, seconds: float) -> dict[str, Any]:
        """The row for the steps since the last one, which took `seconds`."""
        tokens = self.recipe.tokens_before(step) - self.recipe.tokens_before(step - self.timed_steps)
        finite_losses = [loss for loss in self.losses if math.isfinite(loss)]
        mfu = None
        if self.peak_flops:
            peak_of_all_ranks = self.peak_flops * self.accelerator.num_processes
            mfu = tokens / seconds * self.flops_per_token / peak_of_all_ranks
        hours = self.hours
        steps_left = self.recipe.max_steps - step
        row = {
            "loss": sum(finite_losses) / len(finite_losses) if finite_losses else None,
            "lr": lr,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "clipped": self.clipped / len(self.losses),
            "bad_steps": guard.bad_steps,
            "loss_zscore": guard.zscore,
            "update_ratio": self.update_ratio,
            "tokens_per_second": tokens / seconds,
            "data_wait": (self.waited - self.waited_before) / seconds,
            "mfu": mfu,
            "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
            "hours": hours,
            "hours_left": seconds / 3600 / self.timed_steps * steps_left,
        }
        if self.recipe.dollars_per_hour:
            row["dollars"] = hours * self.recipe.dollars_per_hour
        return row

    def _show(self, row: dict[str, Any]) -> None:
        """Show the main figures of a row beside the progress bar."""
        shown = {
            "loss": "none" if row["loss"] is None else f"{row['loss']:.3f}",
            "tok/s": f"{row['tokens_per_second']:,.0f}",
        }
        if row["mfu"]:
            shown["MFU"] = f"{row['mfu']:.1%}"
        self.bar.set_postfix(shown, refresh=False)

    def log(self, step: int, **values: Any) -> None:
        """Log a row, e.g. with val_loss or samples; one of metrics.ROW_KINDS must be among its keys."""
        if self.metrics is None:
            return
        row = {"step": step, "tokens": self.recipe.tokens_before(step), **values}
        is_new = self.metrics.add(row)
        if not is_new:
            return
        try:
            self.metrics.write()
        except OSError as error:
            path = self.metrics.path
            self.say(f"{path} could not be written ({first_line(error)}); its rows are queued, training continues")
        with self._tracker_may_fail():
            track(self.accelerator, row)

    def say(self, text: str) -> None:
        """Print above the progress bar, on the main process."""
        if self.metrics is not None:
            self.bar.write(text, file=Unbreakable(sys.stdout))

    def close(self) -> None:
        """Close the progress bar, metrics.jsonl and the tracker.

        Raises:
            UserError: metrics.jsonl cannot be written; on the main process only.
        """
        self.bar.close()
        if self.metrics is not None:
            with report_write_errors(self.metrics.path):
                self.metrics.write()
        with self._tracker_may_fail():
            for tracker in self.accelerator.trackers:
                tracker.finish()
        self.accelerator.trackers.clear()
        self.accelerator.end_training()

    @contextlib.contextmanager
    def _tracker_may_fail(self) -> Iterator[None]:
        """An exception in the tracker ends the tracking, not the run."""
        try:
            yield
        except Exception as error:  # trackers raise all kinds
            self.accelerator.trackers.clear()
            tracker = self.recipe.report_to
            self.say(f"report_to={tracker} failed ({first_line(error)}); metrics.jsonl continues without it")


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    return full_tensor(torch.nn.utils.get_total_norm(tensors))
