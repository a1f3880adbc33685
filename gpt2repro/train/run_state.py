"""The state of a run: everything that a checkpoint holds besides weights and optimizer states."""

import dataclasses
from typing import Any

from gpt2repro.errors import SharedError
from gpt2repro.processes import on_main
from gpt2repro.recipe import Recipe
from gpt2repro.run_folder import RunFolder
from gpt2repro.train.checkpoint import Checkpoints
from gpt2repro.train.early_stopping import BestValidation
from gpt2repro.train.guard import Guard
from gpt2repro.train.telemetry import Telemetry


JOINT_MOMENTUM = (
    "Muon of an older version took query, key and value for one matrix; this one goes on with three, so the run will "
    "not be the uninterrupted one"
)


class RunState:
    """The state of a run between two steps, the same on all ranks.

    Attributes:
        step: steps completed, skipped updates included.
        guard: decides which updates are skipped, and knows which batches are left out.
        best: the best validation, for early stopping.
        telemetry: what it has summed up since the last row of metrics.jsonl is part of the state.
        val_loss: the validation loss after this step, nats per token; None if it was not validated.
        stopping: why the run must stop early; None: it need not.
    """

    def __init__(self, recipe: Recipe, telemetry: Telemetry):
        self.recipe, self.telemetry = recipe, telemetry
        self.step = 0
        self.guard = Guard(recipe)
        self.best = BestValidation(recipe.patience)
        self.val_loss: float | None = None
        self.stopping: str | None = None

    @property
    def finished(self) -> bool:
        """Whether the loop ends: after max_steps, by early stopping, or because the run was told to stop."""
        return self.is_last_step or self.stopping is not None

    @property
    def is_last_step(self) -> bool:
        return self.step >= self.recipe.max_steps or self.best.patience_exhausted

    def is_due(self, every: int) -> bool:
        """Whether something that happens every `every` steps is due now. After the last step it always is.

        Args:
            every: steps; 0: only after the last step.
        """
        return self.is_last_step or (every > 0 and self.step % every == 0)

    @property
    def checkpoint_due(self) -> bool:
        """Whether to save a checkpoint after this step."""
        is_new_best = self.recipe.patience > 0 and self.best.step == self.step
        decay_begins = self.recipe.lr_schedule == "wsd" and self.step == int(self.recipe.wsd_decay_start)
        is_due = self.is_due(self.recipe.checkpoint_every)
        return self.is_savable and (is_due or is_new_best or decay_begins or self.stopping is not None)

    @property
    def is_savable(self) -> bool:
        """False between bad steps: the weights may be broken, and a rollback must not return to them."""
        return not self.guard.bad_batches

    @property
    def validates_given_model(self) -> bool:
        """Whether the model that training starts from is validated before the first step: with `patience`, a
        fine-tuning that only harms exports the model that it was given."""
        is_fine_tuning = self.recipe.init_from != "scratch"
        return self.recipe.patience > 0 and is_fine_tuning and self.step == 0 and self.val_loss is None

    def advance(self) -> None:
        """Count a completed step."""
        self.step += 1
        self.val_loss = None

    def note_validation(self, val_loss: float) -> None:
        self.val_loss = val_loss
        self.best.note(self.step, val_loss)

    # ---- saved and restored ----

    def state_dict(self) -> dict[str, Any]:
        """Serializable as JSON; the checkpoint's trainer_state.json."""
        return {
            "step": self.step,
            "val_loss": self.val_loss,
            "guard": self.guard.state_dict(),
            "best": self.best.state_dict(),
            "telemetry": self.telemetry.state_dict(),
            "recipe": dataclasses.asdict(self.recipe),  # by which an edited recipe.yaml is found out
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.val_loss = state["step"], state["val_loss"]
        self.guard.load_state_dict(state["guard"])
        self.best.load_state_dict(state["best"])
        self.telemetry.load_state_dict(state["telemetry"])

    def resume(self, checkpoints: Checkpoints) -> None:
        """Resume from the newest checkpoint, if there is one, and start the clock.

        A run that early stopping had ended waits anew for a better validation if its recipe was changed here.
        """
        state = checkpoints.restore()
        if state is not None:
            self.load_state_dict(state)
            if self.recipe.optimizer == "muon" and "attention" not in state.get("recipe", {}):
                self.telemetry.say(JOINT_MOMENTUM)
            self.telemetry.say(f"resuming after step {self.step:,} of {self.recipe.max_steps:,}")
        changed_steps = on_main(RunFolder(self.recipe.output_dir).override_steps)
        if self.best.patience_exhausted and self.step in changed_steps:
            self.best.since = 0
            self.telemetry.say(f"patience={self.recipe.patience} counts anew from here")
        self.telemetry.start(self.step)

    def roll_back(self, checkpoints: Checkpoints) -> None:
        """Go back to the newest checkpoint and skip the bad batches after it from now on.

        Raises:
            SharedError: there is no checkpoint, or the run has used up its max_rollbacks.
        """
        seen = f"{self.recipe.max_bad_steps} bad steps in a row, at batches {self.guard.bad_batches}"
        remedy = "start another run with a lower learning_rate or max_grad_norm, in float32, or without compile"
        if self.guard.rollbacks >= self.recipe.max_rollbacks:
            raise SharedError(f"{seen}, after {self.guard.rollbacks} rollbacks; {remedy}")
        state = checkpoints.restore()
        if state is None:
            raise SharedError(f"{seen}, and there is no checkpoint to roll back to; {remedy}")
        self.step, self.val_loss = state["step"], state["val_loss"]
        self.guard.roll_back(state["guard"])
        self.best.load_state_dict(state["best"])
        self.telemetry.roll_back(self.step, state["telemetry"])
        self.telemetry.say(f"{seen}: rolled back to step {self.step:,}, skipping them")

    def take_best(self, checkpoints: Checkpoints) -> None:
        """With `patience`, a run that has come to its end takes the checkpoint with the best validation loss."""
        if not self.recipe.patience or self.stopping is not None:
            return
        state = checkpoints.restore(best=True)
        if state is None:
            return
        ended = f"ended after step {self.step:,}"
        if self.best.patience_exhausted:
            ended = f"stopped early after step {self.step:,}: {self.best.since} validations without improvement"
        self.step, self.val_loss = state["step"], state["val_loss"]
        exported = f"step {self.step:,}" if self.step else "the model that the run was given, step 0"
        self.telemetry.say(f"{ended}; exporting {exported}, which has the best validation loss, {self.val_loss:.4f}")
