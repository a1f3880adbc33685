"""The guard against bad steps, given plain numbers."""

import math

import pytest
import torch

from gpt2repro.errors import SharedError
from gpt2repro.recipe import Recipe
from gpt2repro.train.guard import Guard
from gpt2repro.train.run_state import RunState


def test_a_rollback_into_a_streak_of_bad_steps_skips_no_good_batch():
    """The checkpoint after step 6 lies between bad steps; the bad batches before it are in the past anyway."""
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


def test_a_gradient_of_zero_is_a_bad_step():
    """torch 2.11 compiled the loss into one; the run went on for thousands of steps and learned nothing."""
    guard = Guard(Recipe(max_bad_steps=2))
    assert guard.accepts(0, 3.0, 1e-30)
    assert not guard.accepts(1, 3.0, 0.0) and not guard.accepts(2, 3.0, 0.0)
    assert guard.gives_up and guard.bad_steps == 2


def test_a_run_with_too_many_rollbacks_ends_even_if_the_limit_was_lowered_later():
    run = RunState(Recipe(max_rollbacks=1), telemetry=None)
    run.guard.rollbacks = 2
    with pytest.raises(SharedError, match="after 2 rollbacks"):
        run.roll_back(checkpoints=None)


def test_a_gradient_that_no_scale_makes_finite_is_a_bad_step():
    """GradScaler would halve its scale forever."""
    guard = Guard(Recipe(max_bad_steps=3))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.SGD([weight := torch.nn.Parameter(torch.ones(1))], lr=1.0)
    for step in range(5):
        scaler.scale(weight.sum() * math.inf).backward()
        scaler.unscale_(optimizer)
        assert not guard.accepts(step, 3.0, math.inf, scaler)
        optimizer.zero_grad()
        assert guard.bad_steps == max(0, step - 1)  # overflows at scales of 4 and 2 are not
    assert guard.gives_up
