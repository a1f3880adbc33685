"""What an older version wrote still opens: tests/golden was made by commit f3a6540, before the formats had classes.

data/          prepare_data.py files --source text.jsonl --output_dir data --tokenizer bpe:300 --val_fraction 0.2
               --shard_tokens 6000
run/           recipe.yaml of this folder, stopped after step 5 with a checkpoint at step 4
metrics.jsonl  of the same run, not stopped
model/         the model folder that it exported
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from gpt2repro.data.manifest import Manifest
from gpt2repro.data.token_stream import TokenStream
from gpt2repro.models.folder import open_model
from gpt2repro.models.openai_weights import from_gpt2
from gpt2repro.train.metrics import read_metrics


GOLDEN = Path(__file__).parent / "golden"


def test_a_data_directory_opens_and_verifies():
    manifest = Manifest.read(GOLDEN / "data")
    manifest.verify(GOLDEN / "data")
    assert manifest.to_dict() == json.loads((GOLDEN / "data" / "manifest.json").read_text())
    stream = TokenStream.open(GOLDEN / "data", "train")
    shards = [np.load(GOLDEN / "data" / f"train_{number:05d}.npy") for number in range(2)]
    assert stream.read(0, len(stream)).tolist() == np.concatenate(shards).tolist()


@pytest.mark.slow
def test_a_stopped_run_resumes_and_ends_like_the_uninterrupted_one(trainer_server, tmp_path):
    """To the last digit on the machine that made it; other processors round differently."""
    shutil.copytree(GOLDEN / "run", tmp_path / "run")
    argv = ["train_accelerate.py", "--config", GOLDEN / "recipe.yaml", "--data_dir", GOLDEN / "data"]
    argv += ["--output_dir", tmp_path / "run"]
    (pid,) = trainer_server.start_processes(1, argv, tmp_path / "stdout", tmp_path / "stderr")
    assert trainer_server.wait(pid) == 0, (tmp_path / "stderr").read_text()
    assert "resuming after step 4 of 12" in (tmp_path / "stdout").read_text()

    rows, expected = read_metrics(tmp_path / "run" / "metrics.jsonl"), read_metrics(GOLDEN / "metrics.jsonl")
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for key in ("loss", "grad_norm", "val_loss", "update_ratio", "lr"):
        old = [row[key] for row in expected if row.get(key) is not None]
        assert [row[key] for row in rows if row.get(key) is not None] == pytest.approx(old, rel=1e-4)
    old_weights = load_file(GOLDEN / "model" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "run" / "model" / "model.safetensors").items():
        old_weight = old_weights[name][: len(tensor)]  # exports had the padding rows of training then
        torch.testing.assert_close(tensor, old_weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("folder", ["model", "run/checkpoints/step_00000004"])
def test_a_model_folder_and_a_checkpoint_open(folder):
    """With today's code, and with the old code in the folder."""
    model, tokenizer = open_model(str(GOLDEN / folder))
    ids = tokenizer("The assert statement", return_tensors="pt").input_ids[:, :16]
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(from_gpt2(GOLDEN / folder)(ids).logits, expected[..., : len(tokenizer)])
        old_class = get_class_from_dynamic_module("modeling_gpt2repro.GPT2ReproForCausalLM", str(GOLDEN / folder))
        theirs = old_class.from_pretrained(GOLDEN / folder)
        torch.testing.assert_close(theirs(ids).logits, expected)
    assert AutoTokenizer.from_pretrained(GOLDEN / folder).get_vocab() == tokenizer.get_vocab()
