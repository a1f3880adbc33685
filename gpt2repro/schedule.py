"""The learning rate as a pure function of the step."""

import math

from gpt2repro.recipe import Recipe


def lr_at(step: int, recipe: Recipe) -> float:
    """Learning rate of step `step`, counted from 0: linear warm-up, then cosine decay to the minimum, or constant.

    The first step has learning_rate / warmup_steps, not 0, and the minimum would be reached at step max_steps, as in
    build-nanogpt's get_lr (train_gpt2.py).
    """
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    if recipe.lr_schedule == "constant":
        return recipe.learning_rate
    progress = (step - recipe.warmup_steps) / (recipe.max_steps - recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.min_learning_rate + cosine * (recipe.learning_rate - recipe.min_learning_rate)
