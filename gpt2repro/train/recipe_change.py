"""Resuming a run with another recipe: what may change, from which checkpoint on, and how recipe.yaml records it.

A larger max_steps extends a run. With lr_schedule constant or wsd the result is exactly that of a run that had the
larger max_steps from the start: wsd resumes from a checkpoint before the decay. With cosine and linear, the steps
already done had other learning rates, which --extend accepts. --override_recipe accepts any other change that affects
only the steps to come. recipe.yaml then holds the new values, and the old ones under `overrides`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from gpt2repro.files import delete
from gpt2repro.recipe import Recipe
from gpt2repro.recipe_file import changed_fields, differences
from gpt2repro.run_folder import RunFolder, checkpoint_step
from gpt2repro.train.checkpoint_files import read_intact_state
from gpt2repro.train.schedule import lr_at, steps_of_equal_rates


UNDONE = "undone_"  # prefix of checkpoints that an extension does not resume from


@dataclass(frozen=True)
class RecipeChange:
    """The difference between a run's recipe and the one that it resumes with.

    fields: recorded and new value, by the field's name; empty if nothing changes.
    step: of the checkpoint from which the run resumes; 0: it has none.
    is_exact: the result will be that of a run that had the new recipe from the start.
    """

    fields: dict[str, tuple[Any, Any]]
    step: int
    is_exact: bool

    @classmethod
    def between(cls, recorded: dict[str, Any], recipe: Recipe, folder: RunFolder) -> "RecipeChange":
        fields = changed_fields(vars(recipe), recorded)
        steps = [checkpoint_step(path) for path in folder.complete_checkpoints()]
        newest = max(steps, default=0)
        if not _is_extension(fields):
            return cls(fields, newest, is_exact=not fields)
        unchanged = steps_of_equal_rates(_before(recipe, fields), recipe)
        start = newest
        if recipe.lr_schedule == "wsd":  # the shorter run's decay is undone
            start = max((step for step in steps if step <= unchanged), default=newest)
        return cls(fields, start, is_exact=start <= unchanged)

    def problems(self, recipe: Recipe, recorded: dict[str, Any]) -> list[str]:
        """One line if the recipe does not allow this change."""
        where = f"output_dir={recipe.output_dir} holds a run"
        elsewhere = "choose another --output_dir"
        listed = "; ".join(differences(recipe, recorded))
        overridable = {field.name for field in dataclasses.fields(Recipe) if field.metadata["overridable"]}
        if not self.fields.keys() <= overridable:
            return [f"{where} of another recipe ({listed}); {elsewhere}, or delete it"]
        if recipe.max_steps < self.step:
            return [f"{where} that has done {self.step} steps, more than max_steps={recipe.max_steps}; {elsewhere}"]
        if self.is_exact or recipe.override_recipe:
            return []
        if not _is_extension(self.fields):
            return [
                f"{where} of another recipe ({listed}); to change it from step {self.step} on, add --override_recipe, "
                f"which records the change, or {elsewhere}"
            ]
        if recipe.extend:
            return []
        before = _before(recipe, self.fields)
        old_rate, new_rate = lr_at(min(self.step, before.max_steps), before), lr_at(self.step, recipe)
        return [
            f"{where} of max_steps={before.max_steps}; with lr_schedule={recipe.lr_schedule} and max_steps="
            f"{recipe.max_steps}, the learning rate at step {self.step} jumps from {old_rate:.3g} to {new_rate:.3g}; "
            f"add --extend to accept that, or {elsewhere}"
        ]

    def apply(self, folder: RunFolder) -> None:
        """Make the change in the run's folder, and say so: set aside newer checkpoints, and record it."""
        if not self.fields:
            return
        for checkpoint in folder.complete_checkpoints():
            if checkpoint_step(checkpoint) > self.step:
                undone = checkpoint.with_name(f"{UNDONE}{checkpoint.name}")
                delete(undone)
                checkpoint.rename(undone)
                print(f"{checkpoint} lies in the decay of the shorter run; renamed to {undone.name}")
        record = folder.read_record()
        override: dict[str, Any] = {"step": self.step}
        for name, (old, new) in self.fields.items():
            print(f"from step {self.step:,} on: {name}={new} instead of {old}", flush=True)
            record[name] = new
            override[name] = {"from": old, "to": new}
        record["overrides"] = [*record.get("overrides", []), override]
        folder.write_record(record)


def edit_problems(recorded: dict[str, Any], folder: RunFolder) -> list[str]:
    """One line if recipe.yaml has been edited by hand: it says then what the newest checkpoint's steps did not have."""
    newest = folder.latest_checkpoint()
    state = read_intact_state(newest) if newest else {"recipe": recorded}
    if state is None or "recipe" not in state:  # damaged: the run resumes from an earlier one; or of an older version
        return []
    expected = state["recipe"]
    for override in recorded.get("overrides", []):
        if newest and override["step"] >= checkpoint_step(newest):  # made after that checkpoint
            expected |= {name: change["to"] for name, change in override.items() if name != "step"}
    edited = [f"{name}={there}, not {own}" for name, (own, there) in changed_fields(recorded, expected).items()]
    if not edited:
        return []
    return [
        f"{folder.recipe} was edited by hand ({'; '.join(edited)}); undo that, and to change the run pass the field as "
        "a flag"
    ]


def _is_extension(fields: dict[str, tuple[Any, Any]]) -> bool:
    """Whether all that changes is a larger max_steps."""
    if fields.keys() != {"max_steps"}:
        return False
    old, new = fields["max_steps"]
    return new > old


def _before(recipe: Recipe, fields: dict[str, tuple[Any, Any]]) -> Recipe:
    """The recipe as it was before the change."""
    recorded = {name: old for name, (old, _) in fields.items()}
    return dataclasses.replace(recipe, **recorded)
