"""The judge of the steps, fed with numbers."""

import math

import pytest

from gpt2repro.errors import SharedError
from gpt2repro.guard import Guard
from gpt2repro.recipe import Recipe
from train_accelerate import roll_back


def test_a_rollback_into_a_row_of_bad_steps_leaves_out_no_batch_that_is_still_good():
    """The checkpoint after step 6 lies between bad steps: the batches that were bad before it are behind it anyway."""
    guard = Guard(Recipe(max_bad_steps=4))
    for step in range(7):
        bad = step >= 3
        assert guard.accepts(step, 3.0, math.nan if bad else 1.0) is not bad
        if step == 5:
            saved = guard.state_dict() | {"bad_batches": list(guard.bad_batches)}
    assert guard.gives_up
    guard.roll_back(saved)
    assert guard.bad_steps == 4 and guard.rollbacks == 1 and not guard.gives_up
    assert [guard.batch(step) for step in range(6, 9)] == [7, 8, 9]


def test_a_run_that_went_back_too_often_ends_though_the_limit_was_lowered_since():
    recipe = Recipe(max_rollbacks=1)
    guard = Guard(recipe)
    guard.rollbacks = 2
    with pytest.raises(SharedError, match="after 2 rollbacks"):
        roll_back(recipe, None, guard, None, None)
