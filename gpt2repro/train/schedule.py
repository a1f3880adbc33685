"""The learning rate as a pure function of the step."""

import math

from gpt2repro.recipe import Recipe


def lr_at(step: int, recipe: Recipe) -> float:
    """Learning rate of step `step`, counted from 0: linear warm-up, then as recipe.lr_schedule says.

    The first step has learning_rate / warmup_steps, not 0, and the minimum would be reached at step max_steps, as in
    build-nanogpt's get_lr (train_gpt2.py).
    """
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    if recipe.lr_schedule == "constant":
        return recipe.learning_rate
    decay_start: float = recipe.warmup_steps
    if recipe.lr_schedule == "wsd":
        decay_start = recipe.max_steps * (1 - recipe.decay_fraction)
    progress = max(0.0, (step - decay_start) / (recipe.max_steps - decay_start))
    share = _remaining(recipe, progress)
    return recipe.min_learning_rate + share * (recipe.learning_rate - recipe.min_learning_rate)


def _remaining(recipe: Recipe, progress: float) -> float:
    """What the decay has left, 1 to 0, of the way from the peak to the minimum after `progress`, 0 to 1.

    Source of wsd: MiniCPM (Hu et al. 2024), section 4; of its 1-sqrt shape: Hägele et al., "Scaling Laws and
    Compute-Optimal Training Beyond Fixed Training Durations" (2024), section 3.
    """
    if recipe.lr_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if recipe.lr_schedule == "wsd" and recipe.decay_shape == "1-sqrt":
        return 1 - math.sqrt(progress)
    return 1 - progress
