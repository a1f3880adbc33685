"""Early stopping: the best validation of a run, and how long to wait for a better one."""

import math
from collections.abc import Mapping
from typing import Any


def best_first(val_losses: Mapping[int, float]) -> list[int]:
    """The steps of these validations, best first: lowest loss, and the earlier step if two are equal.

    The one definition of "best": early stopping, the checkpoint that is kept and the model that is exported all use it.

    Args:
        val_losses: nats per token, by step.
    """
    return sorted(val_losses, key=lambda step: (val_losses[step], step))


class BestValidation:
    """The best validation so far.

    Args:
        patience: validations without improvement after which training stops; 0: never.

    Attributes:
        step: of the best validation; 0 before the first, and if that of the given model is the best.
        val_loss: nats per token; infinite before the first.
        since: validations since the best one.
    """

    def __init__(self, patience: int):
        self.patience = patience
        self.step, self.val_loss, self.since = 0, math.inf, 0

    def note(self, step: int, val_loss: float) -> None:
        if best_first({self.step: self.val_loss, step: val_loss})[0] == step:
            self.step, self.val_loss, self.since = step, val_loss, 0
        else:
            self.since += 1

    @property
    def patience_exhausted(self) -> bool:
        return 0 < self.patience <= self.since

    def state_dict(self) -> dict[str, Any]:
        finite = self.val_loss if math.isfinite(self.val_loss) else None
        return {"step": self.step, "val_loss": finite, "since": self.since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.since = state["step"], state["since"]
        self.val_loss = math.inf if state["val_loss"] is None else state["val_loss"]
