"""Resuming a run with another recipe: what is accepted, from which checkpoint, and what is recorded."""

import dataclasses

import pytest
import support

from gpt2repro.recipe import Recipe
from gpt2repro.run_folder import RunFolder
from gpt2repro.train.recipe_change import RecipeChange, edit_problems
from gpt2repro.train.schedule import steps_of_equal_rates


RUN = Recipe(max_steps=100, warmup_steps=10, learning_rate=1e-3, min_learning_rate=1e-4, decay_fraction=0.2)


def run_folder(tmp_path, steps, **fields):
    """A run of RUN with these fields and checkpoints, and its recipe."""
    recipe = dataclasses.replace(RUN, output_dir=str(tmp_path), **fields)
    folder = RunFolder(tmp_path)
    for step in steps:
        folder.checkpoint(step).mkdir(parents=True)
    folder.write_record(dataclasses.asdict(recipe))
    return folder, recipe


def write_state(folder, step, recipe):
    support.write_state(folder.checkpoint(step), {"step": step, "recipe": dataclasses.asdict(recipe)})


def change(folder, recipe):
    return RecipeChange.between(folder.read_record(), recipe, folder)


def problems(folder, recipe):
    return change(folder, recipe).problems(recipe, folder.read_record())


def test_schedules_agree_up_to_the_step_that_depends_on_max_steps():
    for schedule, steps in (("constant", 100), ("wsd", 81), ("cosine", 11), ("linear", 11)):
        recipe = dataclasses.replace(RUN, lr_schedule=schedule)
        assert steps_of_equal_rates(recipe, dataclasses.replace(recipe, max_steps=200)) == steps
        assert steps_of_equal_rates(recipe, recipe) == 100


@pytest.mark.parametrize(
    ("schedule", "checkpoints", "step"),
    [
        ("constant", [80, 100], 100),
        ("wsd", [40, 80, 90, 100], 80),  # before the decay
        ("wsd", [40, 100], 40),
        ("wsd", [50], 50),  # stopped in mid-run
        ("cosine", [10], 10),  # stopped in the warm-up
        ("cosine", [], 0),
    ],
)
def test_a_longer_run_resumes_from_the_newest_checkpoint_that_it_would_have_had(tmp_path, schedule, checkpoints, step):
    folder, recipe = run_folder(tmp_path, checkpoints, lr_schedule=schedule)
    longer = dataclasses.replace(recipe, max_steps=200)
    assert problems(folder, longer) == []
    found = change(folder, longer)
    assert (found.step, found.is_exact) == (step, True)
    found.apply(folder)
    assert folder.read_record()["max_steps"] == 200
    assert folder.read_record()["overrides"] == [{"step": step, "max_steps": {"from": 100, "to": 200}}]
    assert folder.override_steps() == [step]
    assert [path.name for path in folder.complete_checkpoints()] == [f"step_{s:08d}" for s in checkpoints if s <= step]
    undone = [path.name for path in folder.checkpoints.glob("undone_*")]
    assert sorted(undone) == [f"undone_step_{s:08d}" for s in checkpoints if s > step]
    assert change(folder, longer).fields == {}


@pytest.mark.parametrize(
    ("schedule", "checkpoints", "rates"),
    [
        ("cosine", [80, 100], "at step 100 jumps from 0.0001 to 0.000587"),
        ("cosine", [50], "at step 50 jumps from 0.000628 to 0.000905"),
        ("cosine", [10, 100], "at step 100 jumps from 0.0001 to 0.000587"),  # the first, of the warm-up, was the best
        ("linear", [10, 50], "at step 50 jumps from 0.0006 to 0.000811"),
        ("linear", [100], "at step 100 jumps from 0.0001 to 0.000574"),
        ("wsd", [90, 100], "at step 100 jumps from 0.0001 to 0.001"),  # both in the decay
    ],
)
def test_a_longer_run_whose_past_had_other_rates_asks_for_extend(tmp_path, schedule, checkpoints, rates):
    folder, recipe = run_folder(tmp_path, checkpoints, lr_schedule=schedule)
    longer = dataclasses.replace(recipe, max_steps=200)
    (problem,) = problems(folder, longer)
    assert f"lr_schedule={schedule} and max_steps=200, the learning rate {rates}; add --extend" in problem
    extended = dataclasses.replace(longer, extend=True)
    assert problems(folder, extended) == []
    change(folder, extended).apply(folder)
    assert folder.override_steps() == checkpoints[-1:]
    assert len(folder.complete_checkpoints()) == len(checkpoints)  # it resumes from the newest


def test_other_changes_are_listed_and_need_override_recipe(tmp_path, capsys):
    folder, recipe = run_folder(tmp_path, [50])
    changed = dataclasses.replace(recipe, learning_rate=2e-3, adam_beta2=0.9, extend=True, log_every=9)
    (problem,) = problems(folder, changed)
    assert "adam_beta2=0.95 there, 0.9 here; learning_rate=0.001 there, 0.002 here" in problem
    assert "from step 50 on, add --override_recipe" in problem
    changed = dataclasses.replace(changed, override_recipe=True)
    assert problems(folder, changed) == []
    change(folder, changed).apply(folder)
    (override,) = folder.read_record()["overrides"]
    assert override["step"] == 50 and override["learning_rate"] == {"from": 1e-3, "to": 2e-3}
    assert "from step 50 on: learning_rate=0.002 instead of 0.001" in capsys.readouterr().out
    assert problems(folder, dataclasses.replace(changed, override_recipe=False)) == []  # it is the recipe now


@pytest.mark.parametrize("field", [{"seed": 1}, {"optimizer": "muon"}, {"global_batch_tokens": 64}, {"patience": 2}])
def test_what_past_steps_depend_on_is_never_overridden(tmp_path, field):
    folder, recipe = run_folder(tmp_path, [50])
    (problem,) = problems(folder, dataclasses.replace(recipe, override_recipe=True, extend=True, **field))
    assert "holds a run of another recipe" in problem and "override_recipe" not in problem


def test_a_run_does_not_end_before_the_step_that_it_has_reached(tmp_path):
    folder, recipe = run_folder(tmp_path, [50])
    (problem,) = problems(folder, dataclasses.replace(recipe, max_steps=40, override_recipe=True))
    assert "has done 50 steps, more than max_steps=40" in problem
    assert problems(folder, dataclasses.replace(recipe, max_steps=60, override_recipe=True)) == []


def test_an_edit_of_the_record_is_found_and_a_recorded_change_is_none(tmp_path):
    folder, recipe = run_folder(tmp_path, [50])
    assert edit_problems(folder.read_record(), folder) == []  # a checkpoint of an older version
    write_state(folder, 50, recipe)
    assert edit_problems(folder.read_record(), folder) == []
    changed = dataclasses.replace(recipe, learning_rate=2e-3, override_recipe=True)
    change(folder, changed).apply(folder)
    assert edit_problems(folder.read_record(), folder) == []  # there is no checkpoint with it yet
    folder.checkpoint(60).mkdir()
    write_state(folder, 60, changed)
    record = folder.read_record()
    assert edit_problems(record, folder) == []
    folder.write_record(record | {"learning_rate": 5e-3, "log_every": 7, "init_from": "./scratch/"})
    (problem,) = edit_problems(folder.read_record(), folder)
    assert "recipe.yaml was edited by hand (learning_rate=0.005, not 0.002); undo" in problem


def test_damage_to_a_checkpoint_is_not_taken_for_an_edit(tmp_path):
    folder, recipe = run_folder(tmp_path, [50])
    write_state(folder, 50, recipe)
    state = folder.checkpoint(50) / "trainer_state.json"
    state.write_text(state.read_text().replace('"learning_rate"', '"learning_rbte"'))
    assert edit_problems(folder.read_record(), folder) == []


@pytest.mark.parametrize(("there", "here"), [("runs/a", "runs/a/"), ("./runs/a/model", "runs/a"), ("gpt2", "gpt2")])
def test_a_model_has_many_paths(tmp_path, there, here):
    folder, recipe = run_folder(tmp_path, [50], init_from=there)
    assert problems(folder, dataclasses.replace(recipe, init_from=here)) == []
    assert problems(folder, dataclasses.replace(recipe, init_from="runs/b"))
