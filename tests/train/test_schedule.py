"""The learning rate compared with formulas and numbers written out here."""

import math

import pytest

from gpt2repro.recipe import Recipe
from gpt2repro.train.schedule import lr_at


def rates(**fields):
    recipe = Recipe(**{"learning_rate": 1.0, "min_learning_rate": 0.1, "max_steps": 100, "warmup_steps": 10} | fields)
    return [lr_at(step, recipe) for step in range(recipe.max_steps)]


def test_learning_rate_of_the_124m_recipe():
    recipe = Recipe()  # 6e-4 to 6e-5, 715 warm-up steps of 19,073
    assert lr_at(0, recipe) == pytest.approx(6e-4 / 715)  # not 0, which would waste the first step
    assert lr_at(356, recipe) == pytest.approx(6e-4 * 357 / 715)
    assert lr_at(714, recipe) == pytest.approx(6e-4)
    assert lr_at(715, recipe) == pytest.approx(6e-4)
    middle = (715 + 19_073) / 2
    assert lr_at(int(middle), recipe) == pytest.approx((6e-4 + 6e-5) / 2)
    quarter = 715 + (19_073 - 715) // 4
    expected = 6e-5 + 0.5 * (1 + math.cos(math.pi * (quarter - 715) / (19_073 - 715))) * (6e-4 - 6e-5)
    assert lr_at(quarter, recipe) == pytest.approx(expected)
    assert lr_at(19_072, recipe) == pytest.approx(6e-5, rel=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {"lr_schedule": "cosine"},
        {"lr_schedule": "linear"},
        {"lr_schedule": "constant"},
        {"lr_schedule": "wsd"},
        {"lr_schedule": "wsd", "decay_shape": "linear", "decay_fraction": 0.9},
    ],
)
def test_every_schedule_warms_up_linearly_and_never_rises_afterwards(fields):
    found = rates(**fields)
    assert found[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert found[10] == 1.0  # the decay begins at the peak
    assert found[10:] == sorted(found[10:], reverse=True) and found[-1] >= 0.1


def test_linear_decays_by_the_same_amount_each_step():
    assert rates(lr_schedule="linear")[10:] == pytest.approx([1 - 0.01 * n for n in range(90)])


def test_wsd_is_stable_until_the_decay():
    """The last fifth of 100 steps decays, from 1 at step 80 to 0.1 at step 100, which is never reached."""
    line = rates(lr_schedule="wsd", decay_fraction=0.2, decay_shape="linear")
    root = rates(lr_schedule="wsd", decay_fraction=0.2, decay_shape="1-sqrt")
    assert line[10:81] == root[10:81] == [1.0] * 71
    assert line[81] == pytest.approx(1 - 0.9 * 1 / 20) and line[90] == pytest.approx(0.55)
    # Hägele et al.: 1 - sqrt((n - (N - N_decay)) / N_decay), here of the 0.9 above the minimum
    assert root[81:] == pytest.approx([0.1 + 0.9 * (1 - math.sqrt((n - 80) / 20)) for n in range(81, 100)])
    assert root[85] == pytest.approx(0.1 + 0.9 * 0.5)


def test_constant_schedule_without_warm_up():
    recipe = Recipe(lr_schedule="constant", warmup_steps=0, max_steps=20)
    assert {lr_at(step, recipe) for step in range(20)} == {recipe.learning_rate}


def test_wsd_may_decay_from_the_first_step():
    assert rates(lr_schedule="wsd", decay_fraction=1, decay_shape="linear", warmup_steps=0) == pytest.approx(
        rates(lr_schedule="linear", warmup_steps=0)
    )
