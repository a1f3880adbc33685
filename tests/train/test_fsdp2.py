"""FSDP2 through the whole trainer, on CPU processes: see fsdp_on_cpu.py. A sharded model requires that every rank runs
every forward pass, and that all ranks gather the weights before any of them exits."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import PATIENCE, ROOT, measured, write_jsonl
from tiny_models import tiny_model
from torch import distributed
from torch.distributed.fsdp import fully_shard

import modeling_gpt2repro
from gpt2repro.data.token_stream import TokenStream
from gpt2repro.evaluation import validation
from gpt2repro.recipe import Recipe
from modeling_gpt2repro import GPT2ReproForCausalLM


RECIPE = """
sequence_length: 32
global_batch_tokens: 512
micro_batch_size: 4
learning_rate: 3e-3
min_learning_rate: 3e-4
warmup_steps: 2
max_steps: 3
max_grad_norm: 0.5
validation_tokens: 544      # 17 windows: 3 batches of 4 in the first of two processes, 2 in the second
sample_prompts: ["The "]
sample_tokens: 8
hellaswag_every: 3
num_workers: 0
model: {n_positions: 32, n_layer: 2, n_head: 2, n_embd: 32}
"""


@pytest.fixture(scope="module")
def recipe_file(data_dir, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("recipe")
    items = [
        {"ind": i, "ctx": "The ", "endings": [f"{word} {i}" for word in ("cat", "list", "a", "of")], "label": 1}
        for i in range(5)
    ]
    hellaswag = write_jsonl(root / "hellaswag.jsonl", items)
    (root / "recipe.yaml").write_text(f"data_dir: {data_dir}\nhellaswag_data: {hellaswag}\n{RECIPE}")
    return root / "recipe.yaml"


def train_sharded(recipe_file: Path, output_dir: Path, config: str, processes: int, *flags: str) -> None:
    """Train under `accelerate launch` with an accelerate config for FSDP2, and the micro-batch that its plan allows."""
    command = ["accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}.yaml", *flags]
    command += ["--num_processes", str(processes), "--main_process_port", "0"]
    command += ["tests/fsdp_on_cpu.py", "--config", recipe_file, "--output_dir", output_dir]
    command += ["--micro_batch_size", "auto"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *map(str, command)]
    # The limit ends ranks that wait for each other for ever.
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert (
        f"auto: {16 // processes} sequences x 1 (accumulation), planned" in done.stdout and "not tried" in done.stdout
    )


HSDP = ("--num_machines", "1", "--parallelism_config_dp_shard_size", "2")  # two times two, on this machine


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, processes, flags, precision, tolerance",
    [("fsdp2_8gpu", 2, (), "no", 1e-5), ("hsdp_2node", 4, HSDP, "bf16", 1e-4)],
)
def test_a_sharded_run_learns_what_one_process_learns(
    recipe_file, trainer_server, tmp_path, config, processes, flags, precision, tolerance
):
    """In bf16 too: Accelerate's own FSDP2 precision returns the loss, and sums gradients, in three digits."""
    one, sharded, log = tmp_path / "one", tmp_path / "sharded", tmp_path / "log"
    argv = ["train_accelerate.py", "--config", recipe_file, "--output_dir", one]
    pid = trainer_server.start(argv, log, log, environment={"ACCELERATE_MIXED_PRECISION": precision})
    assert trainer_server.wait(pid) == 0, log.read_text()
    train_sharded(recipe_file, sharded, config, processes, "--mixed_precision", precision, *flags)
    for key in ("loss", "grad_norm", "val_loss", "hellaswag_acc_norm"):
        assert measured(sharded, key) == pytest.approx(measured(one, key), abs=tolerance)
        assert measured(one, key)
    assert measured(sharded, "samples") == measured(one, "samples")

    files = sorted(path.name for path in (one / "model").iterdir())
    assert sorted(path.name for path in (sharded / "model").iterdir()) == files  # none of torch's code among them
    expected, exported = (GPT2ReproForCausalLM.from_pretrained(run / "model").state_dict() for run in (one, sharded))
    for name, tensor in expected.items():
        torch.testing.assert_close(
            exported[name], tensor, atol=100 * tolerance if precision == "bf16" else tolerance, rtol=0
        )


@pytest.mark.parametrize("n_windows, forwards", [(16, 2), (17, 3), (1, 1)])
def test_every_rank_runs_as_many_forward_passes_in_validation(data_dir, monkeypatch, n_windows, forwards):
    """And the loss is the mean over all windows, even if a rank has none."""
    stream = TokenStream.open(data_dir, "val")
    recipe = Recipe(sequence_length=32, micro_batch_size=4, validation_tokens=32 * n_windows)
    calls, totals = [], []
    model = tiny_model(vocab_size=128, unpadded_vocab_size=128, n_layer=1, n_head=1, n_embd=8)
    model.register_forward_hook(lambda *_: calls.append(len(totals)))
    monkeypatch.setattr(validation, "gather_object", lambda mine: totals.extend(mine) or list(totals))
    device = torch.device("cpu")
    for rank in range(2):
        accelerator = SimpleNamespace(
            process_index=rank, num_processes=2, device=device, autocast=lambda: torch.autocast("cpu", enabled=False)
        )
        loss = validation.validation_loss(model, stream, recipe, accelerator)
    assert [calls.count(rank) for rank in range(2)] == [forwards, forwards]

    tokens = torch.tensor(stream.read(0, 32 * n_windows + 1).astype("int64"))
    with torch.no_grad():
        logits = model(tokens[:-1].view(n_windows, 32)).logits
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:]).item(), abs=1e-5)


def test_a_sharded_model_never_holds_all_logits(monkeypatch):
    """fully_shard changes the head's class; the loss still takes the head's weight and is computed in chunks."""
    used = []
    whole = modeling_gpt2repro.linear_cross_entropy
    monkeypatch.setattr(modeling_gpt2repro, "linear_cross_entropy", lambda *args: used.append(True) or whole(*args))
    plain, sharded = tiny_model(n_layer=1), tiny_model(n_layer=1)
    tokens = torch.randint(0, 50, (2, 9))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(sharded.transformer.h[0])
        fully_shard([sharded.transformer.ln_f, sharded.transformer.wte, sharded.lm_head])  # as Accelerate groups them
        fully_shard(sharded)
        losses = [model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:]).loss for model in (plain, sharded)]
        for loss in losses:
            loss.backward()
        gradient = sharded.lm_head.weight.grad.full_tensor()
    finally:
        distributed.destroy_process_group()
    assert len(used) == 2 and torch.equal(*losses)
    torch.testing.assert_close(gradient, plain.lm_head.weight.grad, atol=1e-6, rtol=0)
