"""Checkpoints of a small model, in this process: what can go wrong on disk."""

import copy
import json
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from support import PATIENCE
from tiny_models import tiny_model
from transformers import GenerationConfig

from gpt2repro.errors import UserError
from gpt2repro.recipe import Recipe
from gpt2repro.train import checkpoint
from gpt2repro.train.checkpoint import Checkpoints
from gpt2repro.train.checkpoint_files import find_damage
from gpt2repro.train.optimizers import build_optimizers


class Tokenizer:
    """Writes two files; as tokenizers does, it raises a plain Exception where that fails."""

    full = False

    def save_pretrained(self, folder):
        if self.full:
            raise Exception("No space left on device (os error 28)")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_text('{"auto_map": {}}')


@pytest.fixture
def checkpoints(tmp_path):
    PartialState(cpu=True)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.NO,
        is_main_process=True,
        device=torch.device("cpu"),
        scaler=None,
        num_processes=1,
    )
    model = tiny_model(n_positions=8, n_layer=1, n_head=1, n_embd=8)
    recipe = Recipe(output_dir=str(tmp_path), keep_last=2)
    said = []
    made = Checkpoints(recipe, accelerator, model, build_optimizers(model, recipe), Tokenizer(), said.append)
    made.said = said
    return made


def save(checkpoints, step, val_loss=None):
    checkpoints.save({"step": step, "val_loss": val_loss})
    checkpoints.wait()
    return checkpoints.folder.checkpoints / f"step_{step:08d}"


def names(checkpoints):
    return sorted(path.name for path in checkpoints.folder.checkpoints.iterdir())


def test_a_failed_save_is_reported_and_the_next_one_tried(checkpoints):
    checkpoints.tokenizer.full = True
    save(checkpoints, 1)
    assert names(checkpoints) == [] and "could not be written (No space left on device" in checkpoints.said[0]
    with pytest.raises(UserError, match="step 1 could not be written"):
        checkpoints.close()
    checkpoints.tokenizer.full = False
    assert find_damage(save(checkpoints, 2)) is None
    checkpoints.close()


def test_a_checkpoint_holds_the_state_of_its_step_although_training_continues(checkpoints, monkeypatch):
    """For example the losses since the last row: the next step appends its own while a thread writes."""
    written, training_continued = checkpoint.save_file, Event()
    monkeypatch.setattr(checkpoint, "save_file", lambda *a, **k: training_continued.wait(PATIENCE) and written(*a, **k))
    losses = [3.0]
    checkpoints.save({"step": 1, "val_loss": None, "telemetry": {"losses": losses}})
    losses.append(2.0)
    training_continued.set()
    assert checkpoints.restore()["telemetry"]["losses"] == [3.0]


def test_an_old_checkpoint_that_cannot_be_read_does_not_stop_the_rotation(checkpoints):
    (save(checkpoints, 1, 3.0) / "trainer_state.json").write_text("")
    for step in (2, 3, 4):
        save(checkpoints, step)
    assert names(checkpoints) == ["step_00000003", "step_00000004"] and checkpoints.said == []


def test_a_damaged_best_checkpoint_is_not_restored(checkpoints):
    weights = []
    for step, val_loss in enumerate((2.0, 1.0, 3.0), start=1):
        weights.append(copy.deepcopy(checkpoints.model.state_dict()))
        save(checkpoints, step, val_loss)
        torch.nn.init.normal_(checkpoints.model.transformer.wpe.weight)
    assert names(checkpoints) == ["step_00000002", "step_00000003"]
    (checkpoints.folder.checkpoints / "step_00000002" / "model.safetensors").write_bytes(b"")
    assert checkpoints.restore(best=True)["step"] == 3
    assert torch.equal(checkpoints.model.transformer.wpe.weight, weights[2]["transformer.wpe.weight"])
    assert names(checkpoints) == ["damaged_step_00000002", "step_00000003"]


def test_if_no_checkpoint_is_intact_none_is_moved_aside(checkpoints):
    """Otherwise the same command would find none and start from scratch."""
    for step in (1, 2):
        (save(checkpoints, step) / "model.safetensors").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(UserError, match="is intact .*step_00000002/model.safetensors is damaged"):
            checkpoints.restore()
    assert names(checkpoints) == ["step_00000001", "step_00000002"]


def test_damage_can_be_checked_for_one_file(checkpoints):
    saved = save(checkpoints, 1)
    (saved / "model.safetensors").unlink()
    assert "is missing" in find_damage(saved) and find_damage(saved, "config.json") is None
    (saved / "config.json").write_text("{")
    assert "is damaged" in find_damage(saved, "config.json")
    hashes = json.loads((saved / "hashes.json").read_text())
    (saved / "hashes.json").write_text(json.dumps({name: sha for name, sha in hashes.items() if name != "config.json"}))
    assert find_damage(saved, "config.json")


def test_the_generation_defaults_of_a_base_model_are_restored(checkpoints):
    checkpoints.model.generation_config = GenerationConfig(num_beams=4, do_sample=False)
    save(checkpoints, 1)
    checkpoints.model.generation_config = GenerationConfig()
    checkpoints.restore()
    assert checkpoints.model.generation_config.num_beams == 4
