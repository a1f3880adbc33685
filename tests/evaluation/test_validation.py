"""The validation loss: what is said of broken weights."""

from types import SimpleNamespace

import pytest

from gpt2repro.errors import SharedError
from gpt2repro.evaluation import validation
from gpt2repro.recipe import Recipe
from gpt2repro.run_folder import RunFolder


@pytest.mark.parametrize(
    ("eval_only", "has_checkpoint", "remedy"),
    [(True, True, "choose another --init_from"), (False, True, "go back to an older"), (False, False, "start over")],
)
def test_the_remedy_for_broken_weights_can_be_followed(tmp_path, monkeypatch, eval_only, has_checkpoint, remedy):
    monkeypatch.setattr(validation, "validation_loss", lambda *args: float("nan"))
    if has_checkpoint:
        RunFolder(tmp_path).checkpoint(1).mkdir(parents=True)
    recipe = Recipe(output_dir=str(tmp_path), eval_only=eval_only)
    with pytest.raises(SharedError, match=f"the validation loss is nan: the weights are broken; {remedy}"):
        validation.validation_losses(None, SimpleNamespace(streams=[None]), recipe, None)
