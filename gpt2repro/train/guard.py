"""Bad steps, whose update is skipped: a non-finite loss or gradient, a gradient of zero or, with skip_spikes, a loss
spike."""

import math
import statistics
from collections import deque
from typing import Any

import torch

from gpt2repro.recipe import Recipe


WINDOW = 128  # recent finite losses that a new loss is compared with
MIN_LOSSES = 64  # before the first z-score


class Guard:
    """Decides before each update whether to skip it. All ranks see the same numbers, so all ranks decide alike.

    max_bad_steps bad steps in a row trigger a rollback to a checkpoint, after which their batches are never read again.
    Step s reads batch s of the data order until batches are left out; then later batches move up.

    Attributes:
        bad_steps: updates skipped so far.
        left_out: numbers of the batches that are never read again, ascending.
        rollbacks: how often the run was rolled back to a checkpoint.
        zscore: of the newest loss, in standard deviations above the recent mean; None while too few losses are known.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.bad_steps = self.rollbacks = 0
        self.left_out: list[int] = []
        self.bad_batches: list[int] = []  # of the current series of bad steps; empty after a good step
        self.zscore: float | None = None

    def batch(self, step: int) -> int:
        """The number of the batch that step `step`, counted from 0, reads."""
        batch = step
        for left_out in self.left_out:
            if left_out <= batch:
                batch += 1
        return batch

    def accepts(self, step: int, loss: float, grad_norm: float, scaler: torch.amp.GradScaler | None = None) -> bool:
        """Whether to apply the update of step `step`; False: skip it.

        Args:
            loss: mean over all ranks.
            grad_norm: global, before clipping.
            scaler: for fp16. It raises the loss scale until gradients overflow, then lowers it; an overflow counts as a
                bad step only if the scale is already below 1.
        """
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        is_lost = grad_norm == 0.0  # by a fault of torch.compile, say: the run would go on and learn nothing
        self._measure(loss)
        is_skipped_spike = self.spiked and self.recipe.skip_spikes
        if is_finite and not is_lost and not is_skipped_spike:
            self.bad_batches = []
            return True
        if scaler is not None:
            scaler.update()  # normally accelerate's optimizer step does it
            has_overflowed = math.isfinite(loss) and not is_finite
            if has_overflowed and scaler.get_scale() >= 1.0:
                return False
        self.bad_steps += 1
        self.bad_batches.append(self.batch(step))
        return False

    def _measure(self, loss: float) -> None:
        """Set zscore for a new loss, and add the loss to the window if it is finite."""
        self.zscore = None
        if not math.isfinite(loss):
            return
        if len(self.losses) >= MIN_LOSSES:
            spread = statistics.stdev(self.losses)
            if spread > 0:
                self.zscore = (loss - statistics.fmean(self.losses)) / spread
        self.losses.append(loss)

    @property
    def spiked(self) -> bool:
        """Whether the newest loss is a spike."""
        return self.zscore is not None and self.zscore > self.recipe.spike_zscore

    @property
    def gives_up(self) -> bool:
        """Whether max_bad_steps steps in a row were bad, so that the weights may be broken: time to roll back."""
        return len(self.bad_batches) >= self.recipe.max_bad_steps

    def roll_back(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint, but leave out the bad batches after it."""
        left_out = sorted({*self.left_out, *self.bad_batches} - {*state["bad_batches"]})
        bad_steps, rollbacks = self.bad_steps, self.rollbacks + 1
        self.load_state_dict(state)
        self.bad_steps, self.rollbacks = bad_steps, rollbacks
        self.left_out = left_out
        self.bad_batches = []

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": list(self.losses),
            "bad_steps": self.bad_steps,
            "bad_batches": self.bad_batches,
            "left_out": self.left_out,
            "rollbacks": self.rollbacks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = deque(state["losses"], maxlen=WINDOW)
        self.bad_steps, self.rollbacks = state["bad_steps"], state["rollbacks"]
        self.bad_batches, self.left_out = list(state["bad_batches"]), list(state["left_out"])
