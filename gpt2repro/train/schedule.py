"""The learning rate as a pure function of the step."""

import math

from gpt2repro.recipe import Recipe


def lr_at(step: int, recipe: Recipe) -> float:
    """Learning rate of step `step`, counted from 0: linear warm-up, then recipe.lr_schedule.

    The first step uses learning_rate / warmup_steps, not 0; the minimum would be reached at step max_steps, one after
    the last.

    Source: build-nanogpt train_gpt2.py, get_lr.
    """
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    if recipe.lr_schedule == "constant":
        return recipe.learning_rate
    decay_start: float = recipe.warmup_steps
    if recipe.lr_schedule == "wsd":
        decay_start = recipe.wsd_decay_start
    progress = max(0.0, (step - decay_start) / (recipe.max_steps - decay_start))
    peak_above_minimum = recipe.learning_rate - recipe.min_learning_rate
    return recipe.min_learning_rate + decay_factor(progress, recipe) * peak_above_minimum


def decay_factor(progress: float, recipe: Recipe) -> float:
    """How much of the difference between peak and minimum is left after `progress` (0 to 1) of the decay: 1 to 0.

    Source: MiniCPM (Hu et al. 2024), section 4, for wsd; Hägele et al., "Scaling Laws and Compute-Optimal Training
    Beyond Fixed Training Durations" (2024), section 3, for its 1-sqrt shape.
    """
    if recipe.lr_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if recipe.lr_schedule == "wsd" and recipe.decay_shape == "1-sqrt":
        return 1 - math.sqrt(progress)
    return 1 - progress


def steps_of_equal_rates(recipe: Recipe, other: Recipe) -> int:
    """The number of steps, from the first, that have the same learning rate under both recipes."""
    common = min(recipe.max_steps, other.max_steps)
    for step in range(common):
        if not math.isclose(lr_at(step, recipe), lr_at(step, other)):
            return step
    return common
