"""LoRA through the whole trainer, in processes of its own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import measured
from tiny_models import tiny_model

from gpt2repro.data.manifest import Manifest
from gpt2repro.errors import UserError
from gpt2repro.hub.model_card import model_card
from gpt2repro.models.folder import load_tokenizer, open_model, save_model_folder
from gpt2repro.recipe import Recipe
from gpt2repro.run_folder import RunFolder
from gpt2repro.train import command_line
from gpt2repro.train.metrics import without_clock


pytest.importorskip("peft")

RECIPE = """
sequence_length: 16             # shorter than the base model's positions, which are cropped
global_batch_tokens: 256
micro_batch_size: 4
learning_rate: 3e-2
min_learning_rate: 3e-3
warmup_steps: 2
max_steps: 6
lora_rank: 4
validate_every: 3
validation_tokens: 512
checkpoint_every: 3
sample_every: 3
sample_prompts: ["The "]
sample_tokens: 8
num_workers: 0
model: {resid_pdrop: 0.1}
"""
PROJECTIONS = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@pytest.fixture(scope="module")
def base(data_dir, tmp_path_factory) -> Path:
    """A model folder with the data's tokenizer, a vocabulary that is padded in training, and a recipe beside it."""
    folder = tmp_path_factory.mktemp("base") / "model"
    vocab_size = Manifest.read(data_dir).tokenizer.vocab_size
    model = tiny_model(vocab_size=vocab_size, unpadded_vocab_size=vocab_size)
    save_model_folder(folder, model, load_tokenizer(data_dir / "tokenizer"), model_card(model, "base"))
    (folder.parent / "recipe.yaml").write_text(f"data_dir: {data_dir}\n{RECIPE}")
    return folder


@pytest.fixture(scope="module")
def train(base, trainer_server):
    """Train an adapter of the base model; returns what was printed."""

    def run(output_dir: Path, *flags, processes: int = 1, code: int = 0) -> str:
        log = output_dir.with_name(f"{output_dir.name}.log")
        argv = ["train_accelerate.py", "--config", base.parent / "recipe.yaml", "--output_dir", output_dir]
        argv += [] if "--init_from" in flags else ["--init_from", base]
        pids = trainer_server.start_processes(processes, [*argv, *flags], log, log)
        assert {trainer_server.wait(pid) for pid in pids} == {code}, log.read_text()
        return log.read_text()

    return run


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("runs") / "one"
    printed = train(output_dir)
    assert "LoRA of rank 4: 4,096 parameters are trained" in printed
    return output_dir


def rows(run: Path) -> list[dict]:
    return [without_clock(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_only_the_blocks_matrices_change(trained, base):
    before, after = load_file(base / "model.safetensors"), load_file(trained / "model" / "model.safetensors")
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name][: len(tensor)])}
    assert changed == {name for name in before if name.endswith(PROJECTIONS)}
    assert after["transformer.wte.weight"].shape == before["transformer.wte.weight"].shape  # no padding rows
    losses = measured(trained, "val_loss")
    assert losses[-1] < losses[0]


def test_the_adapter_opens_with_its_base_as_the_exported_model(trained):
    """And so does a checkpoint, which holds the adapter alone."""
    tokens = torch.arange(16)[None]
    model, _ = open_model(str(trained))
    files = {path.name for path in RunFolder(trained).checkpoint(6).iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    for place in (trained / "adapter", RunFolder(trained).checkpoint(6)):
        torch.testing.assert_close(open_model(str(place))[0](tokens).logits, model(tokens).logits, atol=1e-5, rtol=0)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(trained, train, tmp_path):
    resumed = tmp_path / "resumed"
    shutil.copytree(trained, resumed)
    for folder in (RunFolder(resumed).checkpoint(6), resumed / "model", resumed / "adapter"):
        shutil.rmtree(folder)
    assert "resuming after step 3" in train(resumed)
    assert rows(resumed) == rows(trained)
    for file in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        expected = load_file(trained / file)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(resumed / file).items())


def test_two_processes_and_gradient_checkpointing_learn_the_same(train, tmp_path):
    gently = ("--model.resid_pdrop", "0.0", "--learning_rate", "3e-3")  # no dropout, and rounding stays rounding
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, *gently)
    train(two, *gently, "--gradient_checkpointing", "true", processes=2)
    for key in ("loss", "val_loss", "grad_norm"):
        assert measured(two, key) == pytest.approx(measured(one, key), rel=1e-4)  # sums are rounded in another order
    assert measured(two, "samples") == measured(one, "samples")


def test_a_base_model_that_has_changed_or_gone_is_told_at_resume(train, base, tmp_path):
    copied, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(base, copied)
    train(run, "--init_from", copied, "--max_steps", 3)
    tensors = load_file(copied / "model.safetensors")
    tensors["transformer.ln_f.bias"] += 0.1
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    flags = ("--init_from", copied, "--max_steps", 6, "--extend", "true")
    assert "has changed since this run began" in train(run, *flags, code=2)
    shutil.rmtree(copied)
    assert "base does not exist" in train(run, *flags, code=2)


def test_what_cannot_be_adapted_is_one_line_each(base, monkeypatch):
    lines = Recipe(lora_rank=8, optimizer="muon").problems(num_processes=8)
    assert len(lines) == 2
    assert lines[0].startswith(
        "lora_rank=8 adapts a trained model, but init_from=scratch has random weights; set --init"
    )
    assert lines[1].startswith("optimizer=muon makes the updates of whole matrices orthogonal")
    argv = ["--config", str(base.parent / "recipe.yaml"), "--init_from", str(base), "--eval_only", "true"]
    command_line.check_command_line(argv)
    monkeypatch.setattr(command_line, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'lora_rank=4 needs PEFT; run `pip install "gpt2repro\[lora\]"`'):
        command_line.check_command_line(argv)


def test_a_rank_above_the_models_width_is_refused(train, tmp_path):
    assert "lora_rank=33 must be at most n_embd=32" in train(tmp_path / "run", "--lora_rank", 33, code=2)
