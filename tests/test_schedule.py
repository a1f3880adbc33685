"""The learning rate against the written-out formula of build-nanogpt."""

import math

import pytest

from gpt2repro.recipe import Recipe
from gpt2repro.schedule import lr_at


def test_learning_rate_of_the_124m_recipe():
    recipe = Recipe()  # 6e-4 to 6e-5, 715 warm-up steps of 19,073
    assert lr_at(0, recipe) == pytest.approx(6e-4 / 715)  # not 0: the first step must not be lost
    assert lr_at(356, recipe) == pytest.approx(6e-4 * 357 / 715)
    assert lr_at(714, recipe) == pytest.approx(6e-4)
    assert lr_at(715, recipe) == pytest.approx(6e-4)
    middle = (715 + 19_073) / 2
    assert lr_at(int(middle), recipe) == pytest.approx((6e-4 + 6e-5) / 2)
    quarter = 715 + (19_073 - 715) // 4
    expected = 6e-5 + 0.5 * (1 + math.cos(math.pi * (quarter - 715) / (19_073 - 715))) * (6e-4 - 6e-5)
    assert lr_at(quarter, recipe) == pytest.approx(expected)
    assert lr_at(19_072, recipe) == pytest.approx(6e-5, rel=1e-4)


def test_learning_rate_never_rises_after_the_warm_up():
    recipe = Recipe(max_steps=200, warmup_steps=10)
    rates = [lr_at(step, recipe) for step in range(200)]
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert min(rates[10:]) >= recipe.min_learning_rate


def test_constant_schedule_without_warm_up():
    recipe = Recipe(lr_schedule="constant", warmup_steps=0, max_steps=20)
    assert {lr_at(step, recipe) for step in range(20)} == {recipe.learning_rate}
