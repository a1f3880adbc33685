"""benchmarks/extrapolate.py on a law that is known."""

import importlib.util

import pytest
from support import ROOT

from gpt2repro.errors import UserError


@pytest.fixture(scope="module")
def extrapolate():
    spec = importlib.util.spec_from_file_location("extrapolate", ROOT / "benchmarks" / "extrapolate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_the_range_holds_what_the_law_says_and_widens_with_the_distance(extrapolate, noise):
    def law(tokens):
        return 1.7 + 40 * tokens**-0.25

    tokens = [2e5, 4e5, 8e5, 1.6e6]
    losses = [law(size) + sign * noise for size, sign in zip(tokens, (1, -1, 1, -1))]
    near, far = (extrapolate.predictions(tokens, losses, target)[1] for target in (6e6, 6e7))
    assert far.min() < law(6e7) < far.max() and near.min() < law(6e6) < near.max()
    assert far.max() - far.min() > near.max() - near.min()


def test_losses_that_fall_faster_and_faster_are_no_power_law(extrapolate):
    with pytest.raises(UserError, match="no power law fits"):
        extrapolate.predictions([1e5, 2e5, 4e5], [7.0, 6.9, 3.0], 1e7)


@pytest.mark.parametrize("runs", [["1e5"], ["1e5=a"], ["1e5=7", "2e5=6"]])
def test_what_are_no_three_runs_is_one_line(extrapolate, runs):
    with pytest.raises(UserError, match="invalid measured value|needs three or more runs") as error:
        extrapolate.main([*runs, "--tokens", "1e7"])
    assert "\n" not in str(error.value)
