"""The trainer as users run it: on real text, in processes of its own, some under accelerate launch."""

import dataclasses
import html
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import PATIENCE, ROOT, measured
from support import metric_rows as rows
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig

import train_accelerate
from gpt2repro.data.batches import MicroBatches
from gpt2repro.data.manifest import Manifest
from gpt2repro.data.mixture import RunData
from gpt2repro.data.token_stream import TokenStream, unigram_entropy
from gpt2repro.data.tokenization import padded_vocab_size
from gpt2repro.errors import UserError
from gpt2repro.evaluation import task_data
from gpt2repro.files import file_sha256
from gpt2repro.recipe import Recipe
from gpt2repro.run_folder import RunFolder
from gpt2repro.train import command_line, launch, preflight
from gpt2repro.train.evaluations import load_hellaswag
from gpt2repro.train.optimizers import build_optimizers, set_lr
from gpt2repro.train.schedule import lr_at
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM


RECIPE = """
corpus: files
sequence_length: 32
global_batch_tokens: 1024
micro_batch_size: 8
learning_rate: 3e-3
min_learning_rate: 3e-4
warmup_steps: 2
validate_every: 3
sample_every: 3
sample_prompts: ["The "]
sample_tokens: 20
num_workers: 1
model: {n_positions: 32, n_layer: 2, n_head: 2, n_embd: 32}
"""


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def train(data_dir, recipe_file, trainer_server, tmp_path_factory):
    """Run the trainer; returns the finished process.

    Args:
        config: name of an accelerate config to launch it with; None: it is forked.
        processes: the world size.
        environment: further variables.
    """
    outputs = tmp_path_factory.mktemp("outputs")
    number = itertools.count()

    def run(output_dir, *flags, config=None, processes=1, check=True, **environment):
        script = ["train_accelerate.py", "--config", recipe_file, "--output_dir", output_dir]
        script += [*([] if "--data" in flags else ["--data_dir", data_dir]), *flags]
        if config:
            launch = [sys.executable, "-m", "accelerate.commands.launch"]
            launch += ["--config_file", f"accelerate_configs/{config}.yaml", "--num_processes", processes]
            done = run_command(*launch, *script, **environment)
        else:
            stdout, stderr = (outputs / f"{next(number)}_{name}" for name in ("stdout", "stderr"))
            pids = trainer_server.start_processes(processes, script, stdout, stderr, environment=environment)
            status = max(map(abs, map(trainer_server.wait, pids)))
            done = subprocess.CompletedProcess(script, status, stdout.read_text(), stderr.read_text())
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


def run_command(*command, cwd=ROOT, **environment):
    """Run a command; returns the finished process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = list(map(str, command))
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="session")
def trained(train, tmp_path_factory):
    """A run that is long enough to learn something, under accelerate launch."""
    output_dir = tmp_path_factory.mktemp("runs") / "trained"
    flags = ("--max_steps", 60, "--checkpoint_every", 20, "--validate_every", 20)
    done = train(output_dir, *flags, "--reference_curve", "shakespeare-char-cpu", config="cpu")
    return output_dir, done.stdout


def weights(output_dir):
    return load_file(output_dir / "model" / "model.safetensors")


# ---- a run and what it writes ----


def test_the_loss_falls_from_ln_v_to_below_the_unigram_entropy(trained, data_dir):
    output_dir, stdout = trained
    vocab_size = Manifest.read(data_dir).tokenizer.vocab_size
    tokens = np.concatenate([np.load(path) for path in sorted(data_dir.glob("train_*.npy"))])
    shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
    entropy = -sum(p * math.log(p) for p in shares)
    assert unigram_entropy(TokenStream.open(data_dir, "train").counts(vocab_size)) == pytest.approx(entropy)

    assert rows(output_dir, "loss")[0]["loss"] == pytest.approx(math.log(vocab_size), abs=0.15)
    val_loss = rows(output_dir, "val_loss")[-1]["val_loss"]
    assert val_loss < entropy - 0.3
    assert f"validation loss {val_loss:.4f}" in stdout and f"{entropy:.4f}" in stdout


def test_metrics_have_every_step_once_with_the_documented_keys(trained):
    output_dir, _ = trained
    steps = rows(output_dir, "loss")
    assert [row["step"] for row in steps] == list(range(1, 61))
    keys = {"step", "tokens", "loss", "lr", "grad_norm", "clipped", "bad_steps", "loss_zscore", "update_ratio"}
    keys |= {"tokens_per_second", "data_wait", "mfu", "peak_memory_bytes", "hours", "hours_left"}
    assert all(row.keys() == keys and row["tokens"] == 1024 * row["step"] for row in steps)
    assert [row["step"] for row in rows(output_dir, "val_loss")] == [20, 40, 60]
    assert [row["step"] for row in rows(output_dir, "samples")] == [*range(3, 61, 3)]


def test_run_directory_is_as_documented(trained):
    output_dir, stdout = trained
    names = {path.name for path in output_dir.iterdir()}
    assert names - {"report.html"} == {
        ".lock", ".verified.json", "checkpoints", "loss.png", "metrics.jsonl", "model", "recipe.yaml",
    }  # fmt: skip
    assert [path.name for path in sorted((output_dir / "checkpoints").iterdir())] == ["step_00000040", "step_00000060"]
    record = yaml.safe_load((output_dir / "recipe.yaml").read_text())
    assert record["max_steps"] == 60 and record["versions"]["torch"] == torch.__version__
    for name in ("metrics.jsonl", "loss.png", "checkpoints/step_00000060", "model"):
        assert str(output_dir / name) in stdout


def test_the_verdict_is_announced_and_stands_first_at_the_end(trained):
    """Here it says why there is none."""
    lines = trained[1].splitlines()
    validations = [number for number, line in enumerate(lines) if line.startswith("step ") and "validation" in line]
    reason = "no verdict: the run is not comparable with reference_curve=shakespeare-char-cpu: corpus "
    announced, repeated = (number for number, line in enumerate(lines) if line.startswith(reason))
    assert announced < validations[0]
    assert repeated == validations[-1] + 2, "after an empty line"


def test_the_report_shows_the_run(trained):
    pytest.importorskip("bokeh")
    output_dir, stdout = trained
    report = output_dir / "report.html"
    page = report.read_text()
    assert f"report      {report}" in stdout
    assert f"<td>{measured(output_dir, 'val_loss')[-1]:.4f}</td>" in page
    texts = [text for samples in measured(output_dir, "samples") for text in samples]
    assert texts and all(text in html.unescape(page) for text in texts)
    assert str(output_dir) not in page


def test_validation_loss_is_that_of_the_saved_model_over_all_windows(trained, data_dir):
    """Compared with a written-out mean over non-overlapping windows, of the model that from_pretrained loads."""
    output_dir, _ = trained
    model = GPT2ReproForCausalLM.from_pretrained(output_dir / "model")
    tokens = torch.from_numpy(np.load(data_dir / "val_00000.npy").astype(np.int64))
    n = (len(tokens) - 1) // 32
    inputs, targets = tokens[: n * 32].view(n, 32), tokens[1 : n * 32 + 1].view(n, 32)
    with torch.no_grad():
        logits = torch.cat([model(batch).logits for batch in inputs.split(64)])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert rows(output_dir, "val_loss")[-1]["val_loss"] == pytest.approx(expected, abs=1e-5)


def test_padding_rows_are_in_checkpoints_and_not_in_the_model_folder(trained, data_dir):
    output_dir, _ = trained
    real = Manifest.read(data_dir).tokenizer.vocab_size
    rows_of = {}
    for folder in (RunFolder(output_dir).latest_checkpoint(), output_dir / "model"):
        config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        rows_of[folder.name] = config["vocab_size"], len(weights["transformer.wte.weight"])
        assert config["unpadded_vocab_size"] == real
    checkpoint_rows, model_rows = rows_of.values()
    assert model_rows == (real, real)
    assert checkpoint_rows == (padded_vocab_size(real),) * 2 and checkpoint_rows[0] > real


def test_saved_model_works_for_a_stranger(trained, tmp_path):
    """In another directory, in an interpreter that cannot see the checkout."""
    script = ROOT / "tests" / "stranger.py"
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = run_command(sys.executable, script, "use_folder", trained[0] / "model", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", [1, 2])
def test_sample_script_continues_the_prompt(trained, number):
    flags = ("--prompt", "The ", "--num_samples", number, "--max_new_tokens", 9, "--dtype", "int8")
    done = run_command(sys.executable, "sample.py", trained[0], *flags)
    samples = done.stdout.split("--- sample ")[1:]
    assert [sample.splitlines()[1][:4] for sample in samples] == ["The "] * number, done.stderr
    assert len(set(samples)) == number
    assert re.search(r"[\d,]+ tokens in [\d.]+ s: [\d,]+ tokens/s$", done.stderr, re.MULTILINE)


# ---- the same numbers for any number of processes ----


@pytest.mark.slow
def test_processes_and_accumulation_see_the_same_tokens_and_learn_the_same(train, tmp_path):
    """1 process x 4 micro-batches, 2 x 2 and 4 x 1 with gloo; 2 x 2 under accelerate launch."""
    flags = ("--max_steps", 4, "--max_grad_norm", 0.5, "--validation_tokens", 3000)
    train(tmp_path / "1x4", *flags)
    train(tmp_path / "2x2", *flags, config="multi_cpu", processes=2)
    train(tmp_path / "4x1", *flags, processes=4)
    reference = weights(tmp_path / "1x4")
    for name in ("2x2", "4x1"):
        for key in ("loss", "grad_norm", "val_loss"):
            expected = [row[key] for row in rows(tmp_path / "1x4", key)]
            assert [row[key] for row in rows(tmp_path / name, key)] == pytest.approx(expected, abs=1e-5)
        for weight, tensor in weights(tmp_path / name).items():
            torch.testing.assert_close(tensor, reference[weight], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_growing_batch_with_muon_learns_as_written_out_for_any_number_of_processes(
    train, recipe_file, data_dir, tmp_path
):
    """8 to 32 sequences per step, against a plain loop that passes each batch through the model at once."""
    flags = ["--max_steps", 8, "--sample_every", 0, "--optimizer", "muon", "--lr_schedule", "wsd"]
    flags += ["--batch_ramp_start", 256, "--batch_ramp_tokens", 2048]
    train(tmp_path / "1x8", *flags)
    train(tmp_path / "2x2", *flags, "--micro_batch_size", 2, processes=2)

    argv = ["--config", recipe_file, "--data_dir", data_dir, "--output_dir", tmp_path / "plain", *flags]
    plan = preflight.resolve_and_check(list(map(str, argv)))
    recipe, model = plan.recipe, train_accelerate.build_model(plan)
    optimizers = build_optimizers(model, recipe)
    batches = MicroBatches(plan.data.train, recipe, 0, 1)
    losses, norms = [], []
    for step, sequences in enumerate([8, 8, 8, 16, 16, 24, 32, 32]):
        tokens = torch.cat([batches[step, micro] for micro in range(sequences // 8)])
        loss = model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:], use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm).item())
        set_lr(optimizers, lr_at(step, recipe))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name in ("1x8", "2x2"):
        found = rows(tmp_path / name, "loss")
        assert [row["tokens"] for row in found] == [256, 512, 768, 1280, 1792, 2560, 3584, 4608]
        assert [row["loss"] for row in found] == pytest.approx(losses, abs=1e-3)  # Muon rounds to bfloat16
        assert [row["grad_norm"] for row in found] == pytest.approx(norms, rel=1e-2)
    assert [row["loss"] for row in rows(tmp_path / "1x8", "loss")][:2] == pytest.approx(losses[:2], abs=1e-5)


def test_a_resumed_run_equals_the_uninterrupted_one(train, data_dir, tmp_path):
    """Bit for bit, with dropout and shuffled data; the interrupted run lost its last checkpoints and rows."""
    flags = ("--max_steps", 6, "--checkpoint_every", 2, "--keep_last", 3, "--model.resid_pdrop", 0.2)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(whole, *flags)
    shutil.copytree(whole, stopped)
    for name in ("model", "checkpoints/step_00000006", "checkpoints/step_00000004"):
        shutil.rmtree(stopped / name)
    (stopped / "checkpoints" / "writing_step_00000004").mkdir()  # the crash interrupted its writing
    lines = [line for line in (whole / "metrics.jsonl").open() if json.loads(line)["step"] <= 3]
    (stopped / "metrics.jsonl").write_text("".join(lines) + '{"step": 4, "los')

    shutil.copytree(data_dir, tmp_path / "moved")  # the data may have moved
    assert "resuming after step 2 of 6" in train(stopped, *flags, "--data_dir", tmp_path / "moved").stdout
    for key in ("loss", "val_loss", "samples"):
        again, once = rows(stopped, key), rows(whole, key)
        assert [(row["step"], row[key]) for row in again] == [(row["step"], row[key]) for row in once]
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(stopped)[name])


@pytest.mark.parametrize("schedule", ["wsd", "constant"])
def test_an_extended_run_is_one_that_was_longer_from_the_start(train, schedule, tmp_path):
    """Also after the decay of wsd, which began at step 4 of 6 and begins at step 6 of 9."""
    flags = ["--lr_schedule", schedule, "--decay_fraction", 0.34, "--checkpoint_every", 3, "--keep_last", 1]
    train(tmp_path / "whole", *flags, "--max_steps", 9)
    train(tmp_path / "extended", *flags, "--max_steps", 6)
    printed = train(tmp_path / "extended", *flags, "--max_steps", 9).stdout
    step = 3 if schedule == "wsd" else 6
    assert f"from step {step} on: max_steps=9 instead of 6" in printed and f"resuming after step {step} of 9" in printed
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "extended")[name])
    losses = [{row["step"]: row["loss"] for row in rows(tmp_path / name, "loss")} for name in ("whole", "extended")]
    assert losses[0] == losses[1]
    assert "overrides:\n- step: " in (tmp_path / "extended" / "model" / "README.md").read_text()
    record = yaml.safe_load((tmp_path / "extended" / "recipe.yaml").read_text())
    assert record["max_steps"] == 9 and record["overrides"] == [{"step": step, "max_steps": {"from": 6, "to": 9}}]


def test_fine_tuning_that_only_harms_keeps_the_given_model(train, trained, tmp_path):
    flags = ["--init_from", trained[0], "--patience", 2, "--validate_every", 1, "--max_steps", 9, "--warmup_steps", 0]
    flags += ["--learning_rate", 0.5, "--min_learning_rate", 0.5, "--checkpoint_every", 1, "--validation_tokens", 3000]
    done = train(tmp_path / "tuned", *flags)
    assert [row["step"] for row in rows(tmp_path / "tuned", "val_loss")] == [0, 1, 2]
    assert (
        "stopped early after step 2: 2 validations without improvement; exporting the model that the run was given"
        in (done.stdout)
    )
    for name, tensor in weights(trained[0]).items():
        assert torch.equal(tensor, weights(tmp_path / "tuned")[name])
    card = (tmp_path / "tuned" / "model" / "README.md").read_text()
    assert f"| {rows(tmp_path / 'tuned', 'val_loss')[0]['val_loss']:.4f} |" in card and "0 steps of" in card
    again = train(tmp_path / "tuned", *flags)
    assert "resuming after step 2 of 9" in again.stdout and "exporting the model that the run was given" in again.stdout


def test_a_run_is_repeated_from_its_record(train, trained, tmp_path):
    """The card names the corpus that was read, whatever the recipe was for."""
    train(tmp_path / "again", "--config", trained[0] / "recipe.yaml", "--corpus", "python-docs")
    for name, tensor in weights(trained[0]).items():
        assert torch.equal(tensor, weights(tmp_path / "again")[name])
    assert yaml.safe_load((tmp_path / "again" / "recipe.yaml").read_text())["corpus"] == "files"
    assert "python-docs" not in (tmp_path / "again" / "model" / "README.md").read_text()


def test_an_error_stands_on_a_line_of_its_own(train, tmp_path):
    """Here one that comes while the progress bar is drawn."""
    flags = ("--max_steps", 50, "--learning_rate", "1e30", "--validate_every", 0, "--sample_every", 0)
    done = train(tmp_path / "run", *flags, "--max_bad_steps", 3, check=False)
    assert [line for line in done.stderr.splitlines() if "error:" in line][0].startswith("error: 3 bad steps in a row")
    assert done.stderr.splitlines()[-1].startswith("error: ")


def test_eval_only_prints_the_losses_of_a_run_on_equally_much_of_both_splits(train, trained, data_dir, tmp_path):
    flags = ("--attention", "cudnn", "--micro_batch_size", "auto")  # of training; a CPU has no such kernel
    done = train(tmp_path / "run", "--eval_only", "--init_from", trained[0], "--num_workers", 0, *flags)
    losses = dict(line.split() for line in done.stdout.splitlines() if "_loss" in line)
    assert losses["val_loss"] == f"{rows(trained[0], 'val_loss')[-1]['val_loss']:.4f}"
    model = GPT2ReproForCausalLM.from_pretrained(trained[0] / "model")
    n = (Manifest.read(data_dir).splits["val"].tokens - 1) // 32
    tokens = torch.from_numpy(np.load(data_dir / "train_00000.npy")[: n * 32 + 1].astype(np.int64))
    with torch.no_grad():
        expected = model(tokens[:-1].view(n, 32), shift_labels=tokens[1:].view(n, 32)).loss.item()
    assert float(losses["train_loss"]) == pytest.approx(expected, abs=1e-4) and not (tmp_path / "run").exists()


def test_fine_tuning_starts_from_the_weights_of_a_run(train, trained, tmp_path):
    train(tmp_path / "tuned", "--init_from", trained[0], "--max_steps", 2, "--warmup_steps", 0, "--learning_rate", 0,
          "--min_learning_rate", 0)  # fmt: skip
    for name, tensor in weights(trained[0]).items():
        assert torch.equal(tensor, weights(tmp_path / "tuned")[name])


def test_fine_tuning_keeps_the_tokens_that_only_the_model_has(train, trained, data_dir, tmp_path):
    """Chat markers, for example; in a resumed run too, and when the model it began with is gone."""
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(trained[0] / "model", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(trained[0] / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    marker = tokenizer.convert_tokens_to_ids("<|user|>")
    assert marker == Manifest.read(data_dir).tokenizer.vocab_size
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    flags = ("--init_from", base, "--max_steps", 4, "--checkpoint_every", 2, "--validate_every", 4)
    train(tmp_path / "tuned", *flags)
    exported = tmp_path / "tuned" / "model"
    assert AutoTokenizer.from_pretrained(exported)("<|user|>").input_ids == [marker]
    assert len(weights(tmp_path / "tuned")["transformer.wte.weight"]) == marker + 1
    shutil.rmtree(base)
    shutil.rmtree(exported)
    train(tmp_path / "tuned", *flags)
    assert AutoTokenizer.from_pretrained(exported)("<|user|>").input_ids == [marker]


def test_fine_tuning_starts_from_a_gpt2_whose_positions_it_crops(train, data_dir, tmp_path):
    vocab_size = Manifest.read(data_dir).tokenizer.vocab_size
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=48, n_layer=1, n_head=2, n_embd=32))
    gpt2.save_pretrained(tmp_path / "gpt2")
    generation = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "temperature": 0.7}
    (tmp_path / "gpt2" / "generation_config.json").write_text(json.dumps(generation))
    recipe = yaml.safe_load(RECIPE) | {"init_from": str(tmp_path / "gpt2"), "max_steps": 2, "warmup_steps": 0}
    recipe |= {"learning_rate": 0.0, "min_learning_rate": 0.0, "model": {"resid_pdrop": 0.25}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(tmp_path / "tuned", "--config", tmp_path / "recipe.yaml")
    tuned = weights(tmp_path / "tuned")
    assert torch.equal(tuned["transformer.wpe.weight"], gpt2.transformer.wpe.weight[:32])
    assert torch.equal(tuned["transformer.h.0.mlp.c_fc.weight"], gpt2.transformer.h[0].mlp.c_fc.weight.T)
    config = json.loads((tmp_path / "tuned" / "model" / "config.json").read_text())
    assert (config["n_positions"], config["resid_pdrop"], config["attn_pdrop"]) == (32, 0.25, 0.0)
    exported = GenerationConfig.from_pretrained(tmp_path / "tuned" / "model")
    assert (exported.num_beams, exported.num_return_sequences, exported.temperature) == (3, 2, 1.0)
    shutil.rmtree(tmp_path / "gpt2")  # a run that goes on does not need its beginning
    shutil.rmtree(tmp_path / "tuned" / "model")
    done = train(tmp_path / "tuned", "--config", tmp_path / "recipe.yaml")
    assert "resuming after step 2 of 2" in done.stdout
    assert GenerationConfig.from_pretrained(tmp_path / "tuned" / "model") == exported


def test_bf16_autocast_keeps_float32_weights(train, tmp_path):
    """Its losses are near those of float32, but not the same."""
    train(tmp_path / "float32", "--max_steps", 3)
    train(tmp_path / "bf16", "--max_steps", 3, ACCELERATE_MIXED_PRECISION="bf16")
    assert {tensor.dtype for tensor in weights(tmp_path / "bf16").values()} == {torch.float32}
    expected, losses = (measured(tmp_path / name, "loss") for name in ("float32", "bf16"))
    assert losses == pytest.approx(expected, abs=0.02) and losses != expected
    assert losses[-1] < losses[0]


# ---- other data ----


@pytest.fixture(scope="session")
def mixed(data_dir, tmp_path_factory):
    """Flags of a mixture: the language reference, and the same characters in reverse."""
    root = tmp_path_factory.mktemp("mixed")
    other = root / "reversed"
    shutil.copytree(data_dir, other)
    manifest = json.loads((other / "manifest.json").read_text())
    for shard in [shard for split in manifest["splits"].values() for shard in split["shards"]]:
        np.save(other / shard["file"], np.load(other / shard["file"])[::-1])
        shard["sha256"] = file_sha256(other / shard["file"])
    Manifest.from_dict(manifest | {"corpus": {"name": "reversed"}}).write(other)
    return "--data", f"{data_dir}=0.75", f"{other}=0.25"


@pytest.mark.slow
def test_a_mixture_trains_and_resumes(train, mixed, recipe_file, tmp_path):
    """In two processes, resumed in one."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = (*mixed, "--max_steps", 4, "--checkpoint_every", 2, "--validation_tokens", 3000)
    train(whole, *flags, processes=2)
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step_00000004")
    assert "resuming after step 2 of 4" in train(stopped, *flags).stdout
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(stopped)[name], atol=1e-5, rtol=0)

    row = rows(whole, "val_loss")[-1]
    assert row["val_loss"] == pytest.approx(0.75 * row["val_loss_prepared"] + 0.25 * row["val_loss_reversed"])
    assert row["val_loss_prepared"] != row["val_loss_reversed"]
    record = yaml.safe_load((whole / "recipe.yaml").read_text())["data"]
    assert record["corpus"]["name"] == "75% prepared + 25% reversed"
    assert [source["weight"] for source in record["sources"]] == [0.75, 0.25]
    card = (whole / "model" / "README.md").read_text()
    assert f"| validation loss on reversed, nats per token | {row['val_loss_reversed']:.4f} |" in card
    assert "| data | 75% files + 25% reversed: " in card and "bits per byte" not in card

    argv = ["--config", recipe_file, "--output_dir", whole, *mixed[:2], mixed[2].replace("0.25", "0.2"), *flags[3:]]
    with pytest.raises(UserError, match="holds a run on other data than data="):
        preflight.resolve_and_check(list(map(str, argv)))


def test_a_nanogpt_folder_trains(train, gpt2, topics, tmp_path):
    ids = [token for tokens in gpt2.encode_batch(topics[:20]) for token in (*tokens, gpt2.eot_id)]
    for split, tokens in (("train", ids[2000:]), ("val", ids[:2000])):
        np.array(tokens, np.uint16).tofile(tmp_path / f"{split}.bin")
    done = train(tmp_path / "run", "--data_dir", tmp_path, "--max_steps", 2, "--warmup_steps", 1, "--num_workers", 0)
    assert f"{tmp_path} has no tokenizer; GPT-2's is assumed" in done.stdout
    assert f"validation loss {rows(tmp_path / 'run', 'val_loss')[-1]['val_loss']:.4f} nats per token\n" in done.stdout
    saved = tmp_path / "run" / "model"
    assert json.loads((saved / "config.json").read_text())["unpadded_vocab_size"] == 50257
    assert AutoTokenizer.from_pretrained(saved)("The ").input_ids == gpt2.encode_batch(["The "])[0].tolist()
    assert "bits per byte" not in (saved / "README.md").read_text()


# ---- mistakes ----


def test_an_interrupted_start_is_repeated(data_dir, recipe_file, tmp_path):
    for name in (".lock", "recipe.yaml.tmp"):
        (tmp_path / name).write_text("")
    argv = ["--config", recipe_file, "--data_dir", data_dir, "--output_dir", tmp_path]
    preflight.resolve_and_check(list(map(str, argv)))


def test_a_run_has_the_architecture_of_its_newest_readable_checkpoint(tmp_path):
    """It differs from init_from's here, to show which one was read. An evaluation reads that of init_from."""
    GPT2ReproConfig(n_layer=1).save_pretrained(tmp_path / "base")
    for step in (2, 4):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        GPT2ReproConfig(n_layer=3).save_pretrained(folder)
        hashes = dict.fromkeys(("model.safetensors", "optimizer.safetensors", "trainer_state.json"), "not read here")
        hashes["config.json"] = file_sha256(folder / "config.json")
        (folder / "hashes.json").write_text(json.dumps(hashes))
    recipe = Recipe(init_from=str(tmp_path / "base"), output_dir=str(tmp_path / "run"))
    run = RunFolder(tmp_path / "run")
    config, pretrained = preflight.starting_point(recipe, folder=run)
    assert config.n_layer == 3 and pretrained is None
    os.truncate(folder / "config.json", 10)
    config, pretrained = preflight.starting_point(recipe, folder=run)
    assert config.n_layer == 3 and pretrained is None
    config, pretrained = preflight.starting_point(recipe, folder=None)
    assert config.n_layer == 1 and pretrained is not None


@pytest.fixture
def refused(data_dir, recipe_file, tmp_path):
    """The message with which the trainer refuses some flags."""

    def message_of(*flags):
        argv = ["--config", recipe_file, "--data_dir", data_dir, "--output_dir", tmp_path / "run", *flags]
        with pytest.raises(UserError) as error:
            preflight.resolve_and_check(list(map(str, argv)))
        return str(error.value)

    return message_of


def test_all_mistakes_come_at_once_and_end_in_exit_code_2(train, tmp_path):
    done = train(tmp_path / "run", "--max_stepz", 3, "--sequence_length", 64, "--sampling", "often", check=False)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 3 and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_attention_kernel_that_cannot_run_ends_the_run_before_it_writes_anything(train, tmp_path):
    """On a CPU torch's flash kernel takes no dropout."""
    flags = ("--attention", "flash", "--model.attn_pdrop", 0.1)
    done = train(tmp_path / "run", *flags, processes=2, check=False)
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith("error: attention=flash cannot run here (")
    assert not (tmp_path / "run").exists()


def test_missing_data_model_and_network_are_said_together(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(task_data, "_ask_hub_once", lambda source: (_ for _ in ()).throw(ConnectionError("no DNS")))
    flags = ("--data_dir", tmp_path / "none", "--init_from", "./no_model", "--hellaswag_every", 3)
    about_data, about_model, about_hellaswag = refused(*flags).splitlines()
    assert "none does not exist" in about_data and "./no_model does not exist" in about_model
    assert "--hellaswag_data FILE" in about_hellaswag


@pytest.mark.parametrize(
    ("corpus", "remedy"),
    [
        ("fineweb-edu", "`python prepare_data.py fineweb-edu --output_dir {}` prepares this recipe's data"),
        (
            "fineweb --hub_config x",
            "`python prepare_data.py fineweb --hub_config x --output_dir {}` prepares this recipe's data",
        ),
        ("files", "`python prepare_data.py files --source FOLDER --output_dir {}` prepares this recipe's data"),
        ("50% a + 50% b", "{} does not exist; make it with `python prepare_data.py`"),
        ("mine (nanoGPT's tokens)", "{} does not exist; make it with `python prepare_data.py`"),
    ],
)
def test_missing_data_names_the_command_that_prepares_it(refused, tmp_path, corpus, remedy):
    message = refused("--data_dir", tmp_path / "none", "--corpus", corpus)
    assert message.endswith(remedy.format(tmp_path / "none"))


def test_data_without_its_manifest_is_refused(refused, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "half", ignore=shutil.ignore_patterns("manifest.json"))
    message = refused("--data_dir", tmp_path / "half")
    assert "has no manifest.json" in message and "copy that file too" in message


def not_prepared(folder, kind):
    if kind == "empty":
        folder.mkdir()
    elif kind == "save_to_disk":
        datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(folder)
    elif kind.startswith("a "):
        folder.write_text("some text")
    else:
        folder.mkdir()
        (folder / f"part{kind}").write_text("some text")


@pytest.mark.parametrize(
    ("kind", "what", "command"),
    [
        ("empty", "is empty", "`python prepare_data.py CORPUS --output_dir {}`"),
        ("save_to_disk", "holds a dataset saved by save_to_disk", "`load_from_disk(...).to_parquet(FILE)`"),
        ("a file", "is a file of text, not of tokens", "`python prepare_data.py files --source {} --output_dir"),
        (".txt", "holds text (part.txt), not tokens", "`python prepare_data.py files --source {} --output_dir"),
        (".csv", "holds a table (part.csv), not tokens", "`python prepare_data.py {} --output_dir"),
        (
            ".jsonl.gz",
            "holds text (part.jsonl.gz), not tokens",
            "`python prepare_data.py files --source {} --output_dir",
        ),
        ("a .bin", "is a file, but token files are opened by their folder", "give "),
        (".docx", "holds no tokens", "`python prepare_data.py` makes"),
    ],
)
def test_what_is_no_prepared_data_is_named_with_the_command_that_prepares_it(refused, tmp_path, kind, what, command):
    folder = tmp_path / ("mine.bin" if kind == "a .bin" else "mine")
    not_prepared(folder, kind)
    message = refused("--data_dir", folder)
    assert f"{folder} {what}" in message and command.format(folder) in message
    assert "unfinished" not in message and "this recipe's data" not in message and "\n" not in message


def test_a_damaged_folder_of_another_trainer_is_refused_in_one_line(refused, tmp_path):
    (tmp_path / "train.bin").write_bytes(b"123")
    message = refused("--data_dir", tmp_path)
    assert "train.bin has 3 bytes, an odd number" in message and "this recipe's" not in message


def test_sequence_longer_than_the_positions_is_refused(refused):
    assert "sequence_length=64 is longer than n_positions=32" in refused("--sequence_length", 64)


def test_an_indivisible_batch_is_refused_with_sizes_that_divide(refused):
    assert "use global_batch_tokens=768 or 1024" in refused("--global_batch_tokens", 1000)


@pytest.mark.parametrize("prompt", ["x" * 40, "漢字"])
def test_a_prompt_that_the_model_cannot_take_is_refused(refused, prompt):
    assert f"sample_prompts: {prompt!r}" in refused("--sample_prompts", prompt)


@pytest.mark.parametrize("field", ["n_head=0", "n_layer=-1", "resid_pdrop=5", "activation_function='gelu_neww'"])
def test_a_model_field_out_of_range_is_refused(refused, field):
    name, value = field.split("=")
    assert f"{name}=" in refused(f"--model.{name}", value.strip("'"))


def test_a_diverged_model_is_rolled_back_until_the_run_gives_up(train, tmp_path):
    """The first update breaks the weights; every checkpoint after it is broken too, and no token can be drawn."""
    flags = ("--max_steps", 50, "--learning_rate", "1e30", "--validate_every", 0, "--sample_every", 2)
    done = train(tmp_path / "run", *flags, "--checkpoint_every", 1, "--max_bad_steps", 3, check=False)
    assert done.returncode == 2
    assert done.stdout.count("rolled back to step 1,") == 3
    assert "step 2: no sample, as the model's predictions are not finite" in done.stdout
    assert "error: 3 bad steps in a row" in done.stderr and "Traceback" not in done.stderr
    assert "after 3 rollbacks; start another run with a lower learning_rate" in done.stderr
    done = train(tmp_path / "none", *flags, "--max_bad_steps", 3, check=False)
    assert done.returncode == 2 and "there is no checkpoint to roll back to" in done.stderr


def test_a_vocabulary_other_than_the_datas_is_refused(refused):
    assert "unpadded_vocab_size=50" in refused("--model.unpadded_vocab_size", 50)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sequence_length", 0), "sequence_length=0 must be at least 1"),
        (("--global_batch_tokens", 10**15), f"global_batch_tokens={10**15} must be at least 1 and at most {2**40}"),
        (("--global_batch_tokens", 2**40 - 2**5), "or micro_batch_size=1"),
        (("--model.n_layer", 10**9), "n_layer=1000000000 must be at most"),
        (("--model.n_embd", 2**17, "--model.n_layer", 999), "GB of memory; lower n_layer=999, n_embd=131072 or n_pos"),
        (
            ("--model.n_positions", 2**24, "--model.n_embd", 2**17),
            "lower n_layer=2, n_embd=131072 or n_positions=167",
        ),
    ],
)
def test_sizes_are_checked_before_anything_is_computed_or_built(refused, flags, message):
    assert message in refused(*flags) and "\n" not in refused(*flags)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--max_steps", "six"), "max_steps='six' is not a whole number"),  # and not "19073 here"
        (("--max_stepz", 60), "unknown recipe field --max_stepz; did you mean --max_steps?"),
    ],
)
def test_what_could_not_be_read_is_not_compared_with_the_run(refused, trained, flags, line):
    assert refused("--output_dir", trained[0], "--seed", 5, *flags) == line


def test_a_mixture_that_could_not_be_read_is_not_opened(recipe_file, tmp_path):
    argv = ["--config", recipe_file, "--output_dir", tmp_path / "run", "--data", "a", "b"]
    with pytest.raises(UserError) as error:
        preflight.resolve_and_check(list(map(str, argv)))
    assert str(error.value) == "data=['a', 'b'] is not a list of DIR=WEIGHT"


def test_mistakes_of_model_data_and_hellaswag_are_said_together(refused, recipe_file):
    about_model = ("--model.n_positions", 0, "--model.n_embd", 33)
    lines = refused(*about_model, "--hellaswag_every", 1, "--hellaswag_data", recipe_file).splitlines()
    assert len(lines) == 3 and "n_positions=0" in lines[0] and "n_embd=33" in lines[1] and "not JSON" in lines[2]


def test_a_split_shorter_than_a_window_is_refused(refused):
    message = refused("--sequence_length", 2**20, "--model.n_positions", 2**20, "--global_batch_tokens", 2**23)
    assert "fewer than a window" in message


def test_the_output_directory_of_another_recipe_is_not_touched(refused, trained):
    before = {path: path.stat().st_mtime_ns for path in trained[0].rglob("*")}
    message = refused("--output_dir", trained[0], "--max_steps", 60, "--seed", 5)
    assert "another recipe (seed=1337 there, 5 here" in message
    assert {path: path.stat().st_mtime_ns for path in trained[0].rglob("*")} == before


def test_a_run_does_not_resume_on_other_data(refused, trained, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "other")
    manifest = dataclasses.replace(Manifest.read(data_dir), corpus={"name": "other"})
    manifest.write(tmp_path / "other")
    flags = ("--output_dir", trained[0], "--max_steps", 60, "--checkpoint_every", 20)
    assert "a run on other data" in refused(*flags, "--data_dir", tmp_path / "other")


def test_a_directory_that_holds_something_else_is_not_touched(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    assert "is not a run" in refused()


def test_a_start_that_ended_before_its_first_step_takes_another_recipe(refused, trained, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(trained[0] / "recipe.yaml", tmp_path / "run")
    assert "another recipe" not in refused("--seed", 5, "--hellaswag_data", "nowhere")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert "another recipe" in refused("--seed", 5, "--hellaswag_data", "nowhere")


def test_a_run_is_not_overwritten_without_resume(refused, trained):
    flags = ("--max_steps", 60, "--checkpoint_every", 20, "--resume", "false")
    assert "resume is off; pass --resume true, or choose" in refused("--output_dir", trained[0], *flags)


def test_what_concerns_one_start_is_not_recorded(data_dir, monkeypatch):
    monkeypatch.setattr(launch, "provenance", dict)
    recipe = Recipe(resume=False, extend=True, override_recipe=True)
    record = launch.run_record(recipe, RunData.open({str(data_dir): 1.0}), hardware="")
    assert (record["resume"], record["extend"], record["override_recipe"]) == (True, False, False)


def test_a_record_that_was_edited_is_refused(refused, trained, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "run")
    (run / "model").rename(tmp_path / "model")
    flags = ("--config", run / "recipe.yaml", "--hellaswag_every", 1, "--hellaswag_data", "nowhere")
    assert "edited" not in refused(*flags)
    record = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(record | {"adam_beta2": 0.9}))
    assert "recipe.yaml was edited by hand (adam_beta2=0.9, not 0.95)" in refused(*flags)


def test_a_model_whose_checkpoints_were_deleted_is_not_replaced(refused, tmp_path):
    run = RunFolder(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    run.write_record({})
    assert "checkpoint to resume from" not in refused()
    run.model.mkdir()
    assert (
        f"no checkpoint to resume from, so this would train it anew; to continue, set --init_from {run.path}"
        in refused()
    )


def test_a_config_for_gpus_is_refused_without_one(refused, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")  # what the launcher makes of single_gpu.yaml
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert "asks for a GPU, but torch finds none" in refused()


def test_more_processes_than_gpus_are_refused(refused, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    message = "starts 8 processes on this machine, but it has 4 GPU(s); pass --num_processes 4"
    assert message in refused()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert message not in refused("--no_such_flag", 1)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="shows what happens without a GPU")
def test_single_gpu_config_is_refused_without_a_gpu(train, tmp_path):
    done = train(tmp_path / "run", config="single_gpu", check=False)
    assert "error: the launch command asks for a GPU" in done.stderr and not (tmp_path / "run").exists()


def test_a_resumed_run_of_two_processes_is_one_in_tensorboard(train, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    flags = ("--max_steps", 4, "--report_to", "tensorboard")
    assert train(tmp_path / "run", *flags, "--max_hours", 1e-9, processes=2, check=False).returncode == 75
    train(tmp_path / "run", *flags, processes=2)
    stored = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "run")).Reload()
    for key in ("loss", "grad_norm", "val_loss"):
        events = [(event.step, pytest.approx(event.value)) for event in stored.Scalars("gpt2repro", key)]
        assert events == [(row["step"], row[key]) for row in rows(tmp_path / "run", key)]


def test_hellaswag_without_the_hub_names_the_recipes_field(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    plan = SimpleNamespace(recipe=Recipe(hellaswag_every=1))
    with pytest.raises(UserError, match="--hellaswag_data FILE"):
        load_hellaswag(plan)


def test_a_name_that_the_hub_would_not_accept_is_refused(refused):
    message = refused("--push_to_hub", "--hub_model_id", "me/my model")
    assert message.startswith("hub_model_id='me/my model' is no name of a repository") and "\n" not in message


def test_a_reference_curve_that_does_not_exist_is_refused_with_the_nearest_name(refused):
    message = refused("--reference_curve", "shakespeare-char")
    assert message == "reference_curve=shakespeare-char does not exist; did you mean shakespeare-char-cpu?"


def test_a_missing_tracker_names_its_pip_install(refused, monkeypatch):
    monkeypatch.setattr(command_line, "find_spec", lambda package: None)
    assert "pip install trackio" in refused("--report_to", "trackio")


@pytest.mark.parametrize("folder", ["", "recipes"])
def test_init_from_something_other_than_a_model_is_refused(refused, folder):
    assert "holds no model" in refused("--init_from", ROOT / folder)


def test_init_from_another_architecture_is_refused(refused, tmp_path):
    LlamaConfig().save_pretrained(tmp_path / "llama")
    assert "is a llama model" in refused("--init_from", tmp_path / "llama")


def test_init_from_a_model_with_another_tokenizer_is_refused(refused, trained, gpt2, tmp_path):
    shutil.copytree(trained[0] / "model", tmp_path / "model")
    gpt2.fast.save_pretrained(tmp_path / "model")
    message = refused("--init_from", tmp_path / "model")
    assert "has another tokenizer than" in message and f"--tokenizer {tmp_path / 'model'}" in message


def fresh_gpt2(folder, tokenizer, **fields):
    """A GPT-2 of some tokenizer, which is saved with it."""
    sizes = dict(n_positions=48, n_layer=1, n_head=2, n_embd=16, bos_token_id=None, eos_token_id=None) | fields
    GPT2LMHeadModel(GPT2Config(**{"vocab_size": len(tokenizer)} | sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_init_from_a_model_whose_tokenizer_has_a_token_without_row_is_refused(refused, data_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizer")
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    fresh_gpt2(tmp_path / "model", tokenizer, vocab_size=rows)
    for flags in ((), ("--eval_only",)):
        assert "[PAD] was added without a row; add it with" in refused("--init_from", tmp_path / "model", *flags)


def test_init_from_a_model_with_a_damaged_tokenizer_is_refused(refused, data_dir, tmp_path):
    fresh_gpt2(tmp_path / "model", AutoTokenizer.from_pretrained(data_dir / "tokenizer"))
    os.truncate(tmp_path / "model" / "tokenizer.json", 100)
    assert f"{tmp_path / 'model'}: no tokenizer can be loaded" in refused("--init_from", tmp_path / "model")


def test_the_tokenizer_of_a_chat_model_keeps_its_end_of_text_and_that_is_said(data_dir, recipe_file, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizer")
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    fresh_gpt2(tmp_path / "chat", tokenizer, eos_token_id=tokenizer.eos_token_id)
    argv = ["--config", recipe_file, "--data_dir", data_dir, "--output_dir", tmp_path / "run"]
    plan = preflight.resolve_and_check(list(map(str, [*argv, "--init_from", tmp_path / "chat"])))
    assert plan.tokenizer.eos_token_id == tokenizer.eos_token_id == plan.config.eos_token_id
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"keeps the tokenizer of {tmp_path / 'chat'}: the data's lacks " in line
    assert line.endswith("; its end of text is <|im_end|>") and "<|im_start|>" in line


def test_init_from_a_model_of_another_size_is_refused(refused, trained):
    assert "model.n_layer=3" in refused("--init_from", trained[0], "--model.n_layer", 3)


def test_init_from_has_its_own_sizes_whatever_the_recipe_says(data_dir, recipe_file, tmp_path, capsys):
    """The recipe has 2 layers of width 32; its dropout and fewer positions count."""
    vocab_size = Manifest.read(data_dir).tokenizer.vocab_size
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=48, n_layer=3, n_head=2, n_embd=16))
    gpt2.save_pretrained(tmp_path / "gpt2")
    with_recipe = ["--config", recipe_file, "--output_dir", tmp_path / "run"]
    without = ["--eval_only", "--sequence_length", 32]
    for flags in (with_recipe, without):
        argv = [*flags, "--init_from", tmp_path / "gpt2", "--data_dir", data_dir, "--model.resid_pdrop", 0.5]
        plan = preflight.resolve_and_check(list(map(str, argv)))
        config = plan.config
        assert (config.n_layer, config.n_embd, config.n_positions, config.resid_pdrop) == (3, 16, 32, 0.5)
        assert plan.recipe.model.keys() <= {"n_head", "n_positions", "resid_pdrop"}
        said = capsys.readouterr().out
        assert "n_layer=3, n_head=2, n_embd=16; the recipe's n_" in said or "n_layer=3, n_embd=16; the recipe's" in said


def test_a_directory_that_cannot_be_written_is_refused_at_the_start(refused, small_disk, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert f"output_dir={file / 'a' / 'b'}: {file} is a file; correct that" in refused("--output_dir", file / "a" / "b")
    disk = small_disk(2**20, flags=1)  # MS_RDONLY: not even root may write
    message = refused("--output_dir", disk / "runs" / "a")
    assert f"{disk} cannot be written (Read-only file system); correct that, or choose another --out" in message


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints"])
def test_a_part_of_a_run_that_cannot_be_written_is_refused_at_the_start(refused, small_disk, tmp_path, name):
    disk = small_disk(2**20)
    part = tmp_path / "run" / name
    part.parent.mkdir()
    part.symlink_to(disk if name == "checkpoints" else disk / name)
    (disk / "metrics.jsonl").touch()
    assert "cannot be written" not in refused()
    small_disk(2**20, flags=33)  # MS_REMOUNT | MS_RDONLY
    assert f"{part} cannot be written (Read-only file system)" in refused()
