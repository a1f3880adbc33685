"""Steps that must not be taken: not finite, or, where the recipe asks for it, far above the losses before."""

import math
import statistics
from collections import deque

import torch

from gpt2repro.recipe import Recipe


WINDOW = 128  # finite losses that a new one is compared with


class Guard:
    """Judges every step before its update. All processes see the same numbers, and so judge alike.

    Batches that made max_bad_steps updates in a row impossible are left out for good after a rollback: batch number b
    of the data order is that of step b, until some are left out and the others move up.

    Attributes:
        bad_steps: updates that were not made, in all.
        left_out: numbers of the batches that are never read again, ascending.
        rollbacks: how often the run went back to a checkpoint.
        zscore: of the newest loss, in standard deviations of the losses before; None while there are few.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.bad_steps = self.rollbacks = 0
        self.left_out: list[int] = []
        self.bad_batches: list[int] = []  # of the bad steps in a row up to now
        self.zscore: float | None = None

    def batch(self, step: int) -> int:
        """The number of the batch that step `step`, counted from 0, reads."""
        for number in self.left_out:
            step += number <= step
        return step

    def accepts(self, step: int, loss: float, grad_norm: float, scaler: torch.amp.GradScaler | None = None) -> bool:
        """Whether the update of step `step` may be made.

        Args:
            loss: mean over all processes.
            grad_norm: global, before clipping.
            scaler: of fp16, whose scale grows until a gradient is not finite; then it shrinks, and that is no bad step
                as long as there is something to shrink.
        """
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        self.zscore = None
        if math.isfinite(loss):
            if len(self.losses) >= WINDOW // 2 and (spread := statistics.stdev(self.losses)):
                self.zscore = (loss - statistics.fmean(self.losses)) / spread
            self.losses.append(loss)
        if finite and not (self.spiked and self.recipe.skip_spikes):
            self.bad_batches = []
            return True
        if scaler is not None:
            scaler.update()  # instead of the optimizer
            if math.isfinite(loss) and not finite and scaler.get_scale() >= 1.0:
                return False
        self.bad_steps += 1
        self.bad_batches.append(self.batch(step))
        return False

    @property
    def spiked(self) -> bool:
        return self.zscore is not None and self.zscore > self.recipe.spike_zscore

    @property
    def gives_up(self) -> bool:
        """Whether so many steps in a row were bad that the model itself may be."""
        return len(self.bad_batches) >= self.recipe.max_bad_steps

    def roll_back(self, state: dict) -> None:
        """Take the state of the checkpoint, but leave out the batches that were bad, if they come after it."""
        left_out = sorted({*self.left_out, *self.bad_batches} - {*state["bad_batches"]})
        bad_steps, rollbacks = self.bad_steps, self.rollbacks + 1
        self.load_state_dict(state | {"left_out": left_out, "bad_steps": bad_steps, "rollbacks": rollbacks})
        self.bad_batches = []

    def state_dict(self) -> dict:
        return {
            "losses": list(self.losses),
            "bad_steps": self.bad_steps,
            "bad_batches": self.bad_batches,
            "left_out": self.left_out,
            "rollbacks": self.rollbacks,
        }

    def load_state_dict(self, state: dict) -> None:
        self.losses = deque(state["losses"], maxlen=WINDOW)
        self.bad_steps, self.rollbacks = state["bad_steps"], state["rollbacks"]
        self.bad_batches, self.left_out = list(state["bad_batches"]), list(state["left_out"])
