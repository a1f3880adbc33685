"""What only a GPU can show: mixed precision on CUDA, loss scaling, NCCL, compiled and sharded training, memory. Runs of
the trainer are started as users start them, with the configs of accelerate_configs/ on one process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import PATIENCE, ROOT, measured, metric_rows
from tiny_models import as_gpt2_tensors, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2repro.run_folder import RunFolder
from gpt2repro.train.metrics import without_clock
from modeling_gpt2repro import MAX_CHUNKS, GPT2ReproConfig, GPT2ReproForCausalLM


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

RECIPE = """
max_steps: 40
warmup_steps: 4
global_batch_tokens: 4096
micro_batch_size: 16
sequence_length: 64
learning_rate: 3e-3
min_learning_rate: 3e-4
validate_every: 20
validation_tokens: 8192
sample_prompts: ["The "]
sample_tokens: 16
checkpoint_every: 20
num_workers: 1
model: {n_positions: 64, n_layer: 2, n_head: 2, n_embd: 64}
"""
# Each is an accelerate config and flags of the launcher, then flags of the trainer.
LAUNCHES = {
    "float32": ("single_gpu", ["--mixed_precision", "no"], []),
    "bf16": ("single_gpu", [], []),
    "fp16": ("single_gpu", ["--mixed_precision", "fp16"], []),
    "compile": ("single_gpu", [], ["--compile", "true"]),
    "recompute": ("single_gpu", [], ["--gradient_checkpointing", "true"]),
    "muon": ("single_gpu", [], ["--optimizer", "muon"]),
    "ddp": ("ddp_8gpu", [], []),
    "ddp_compile": ("ddp_8gpu", [], ["--compile", "true"]),
    "fsdp2": ("fsdp2_8gpu", [], []),
    "fsdp2_compile": ("fsdp2_8gpu", [], ["--compile", "true"]),
    "fsdp2_offload": ("fsdp2_offload_8gpu", [], []),
    "deepspeed": ("deepspeed_zero2_8gpu", [], []),
    "fp8": ("single_gpu_fp8", [], ["--compile", "true"]),
}
NEEDS = {"deepspeed": "deepspeed", "fp8": "torchao"}


class Run:
    """A run of the trainer in `output_dir`, under `accelerate launch` with one process."""

    def __init__(self, output_dir: Path, data_dir: Path):
        self.output_dir = output_dir
        self.recipe = output_dir.with_suffix(".yaml")
        self.recipe.write_text(f"data_dir: {data_dir}\n{RECIPE}")

    def start(self, config: str, *launcher_flags, flags=(), fault=None, fault_arguments=None, **environment):
        """Returns the finished process, whatever its exit code."""
        script = ["train_accelerate.py"]
        if fault:
            script = ["tests/trainer_faults.py", fault, json.dumps(fault_arguments)]
        command = ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}.yaml"]
        command += ["--num_processes", 1, "--main_process_port", 0, *launcher_flags, *script]
        command += ["--config", self.recipe, "--output_dir", self.output_dir, *flags]
        return subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"} | environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def train(self, config: str, *launcher_flags, **kwargs) -> "Run":
        """Start it, and expect success."""
        done = self.start(config, *launcher_flags, **kwargs)
        assert done.returncode == 0, done.stderr + done.stdout
        return self

    def launch(self, name: str, **kwargs) -> "Run":
        """Train as one of LAUNCHES."""
        config, launcher_flags, flags = LAUNCHES[name]
        return self.train(config, *launcher_flags, flags=[*flags, *kwargs.pop("flags", [])], **kwargs)

    @property
    def val_loss(self) -> float:
        return measured(self.output_dir, "val_loss")[-1]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.output_dir / "model" / "model.safetensors")

    @property
    def rows(self) -> list[dict]:
        """The metrics without those of the clock and the machine."""
        lines = (self.output_dir / "metrics.jsonl").read_text().splitlines()
        rows = [without_clock(json.loads(line)) for line in lines]
        return [row | dict.fromkeys(row.keys() & {"mfu", "peak_memory_bytes"}) for row in rows]


@pytest.fixture
def new_run(data_dir, tmp_path):
    return lambda name="run": Run(tmp_path / name, data_dir)


@pytest.fixture(scope="session")
def on_cpu(data_dir, tmp_path_factory) -> Run:
    """The reference: float32 on the CPU. Each process of pytest makes its own, so it must not take all cores."""
    return Run(tmp_path_factory.mktemp("cpu") / "run", data_dir).train("cpu", OMP_NUM_THREADS="2")


# ---- every way to launch ----


@pytest.mark.parametrize("name", LAUNCHES)
def test_every_launch_learns_what_the_cpu_learns_in_float32(new_run, on_cpu, name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"pip install {NEEDS[name]}")
    run = new_run().launch(name)
    record = yaml.safe_load((run.output_dir / "recipe.yaml").read_text())
    assert record["hardware"] == f"1 x {torch.cuda.get_device_name()}"
    first, reference = metric_rows(run.output_dir, "loss")[0], metric_rows(on_cpu.output_dir, "loss")[0]
    assert first["loss"] == pytest.approx(reference["loss"], abs=0.01)
    if name != "muon":
        assert run.val_loss == pytest.approx(on_cpu.val_loss, abs=0.1 if name in NEEDS else 0.02)
    assert run.val_loss < reference["loss"] - 0.5
    last = metric_rows(run.output_dir, "loss")[-1]
    assert last["bad_steps"] == 0 and last["peak_memory_bytes"] > 0


def test_a_gpu_machine_still_trains_on_the_cpu_when_asked(on_cpu):
    record = yaml.safe_load((on_cpu.output_dir / "recipe.yaml").read_text())
    assert record["hardware"].startswith("1 x CPU")


# ---- exact resume ----


@pytest.mark.parametrize("name", ["float32", "bf16", "fp16", "compile", "ddp", "fsdp2", "muon"])
def test_a_stopped_run_resumes_as_if_it_had_not_stopped(new_run, name):
    """Bit for bit: the kernels that this size needs add in a fixed order."""
    undisturbed = new_run("undisturbed").launch(name)
    stopped = new_run("stopped")
    config, launcher_flags, flags = LAUNCHES[name]
    stop = {"step": 29, "name": "SIGTERM"}
    done = stopped.start(config, *launcher_flags, flags=flags, fault="signal_after_step", fault_arguments=stop)
    assert done.returncode != 0 and "stopped and saved after step 30" in done.stdout, done.stderr + done.stdout
    stopped.launch(name)
    assert stopped.rows == undisturbed.rows
    assert all(torch.equal(tensor, undisturbed.weights[name]) for name, tensor in stopped.weights.items())


def test_a_run_changes_between_cpu_and_gpu_and_between_ddp_and_fsdp2(new_run, on_cpu):
    run = new_run()
    stop = {"name": "SIGTERM"}
    for number, name in enumerate(("bf16", "fsdp2", "ddp"), start=1):
        config, launcher_flags, flags = LAUNCHES[name]
        arguments = stop | {"step": 10 * number - 1}
        done = run.start(config, *launcher_flags, flags=flags, fault="signal_after_step", fault_arguments=arguments)
        assert f"stopped and saved after step {10 * number}" in done.stdout, done.stderr + done.stdout
    done = run.start("cpu")
    assert done.returncode == 0 and "resuming after step 30" in done.stdout + done.stderr, done.stderr
    assert run.val_loss == pytest.approx(on_cpu.val_loss, abs=0.02)


# ---- fp16 ----


def test_an_overflow_of_the_loss_scale_skips_the_step_and_is_not_a_bad_step(new_run, on_cpu):
    run = new_run().train(
        "single_gpu", "--mixed_precision", "fp16", fault="loss_scale", fault_arguments={"scale": 2.0**26}
    )
    steps = metric_rows(run.output_dir, "loss")
    overflown = [row["grad_norm"] is None for row in steps]
    skipped = sum(overflown)
    assert 1 <= skipped <= 15 and overflown == [True] * skipped + [False] * (len(steps) - skipped)
    assert steps[-1]["bad_steps"] == 0
    assert run.val_loss == pytest.approx(on_cpu.val_loss, abs=0.3)  # it has made fewer updates
    state = json.loads((RunFolder(run.output_dir).checkpoint(40) / "trainer_state.json").read_text())
    assert state["scaler"]["scale"] == 2.0 ** (26 - skipped)


# ---- a user's mistakes ----


def test_out_of_memory_is_one_line_with_its_remedy(new_run):
    huge = ["--micro_batch_size", 2**17, "--global_batch_tokens", 2**17 * 64, "--model.n_embd", 1024]
    done = new_run().start("single_gpu", flags=huge)
    assert done.returncode != 0 and "Traceback" not in done.stderr.split("error: ")[0]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "out of memory" in line and "micro_batch_size" in line


def test_more_processes_than_gpus_is_one_line(new_run):
    count = torch.cuda.device_count()
    done = new_run().start("ddp_8gpu", "--num_processes", count + 1)
    assert done.returncode != 0
    assert re.search(rf"error: .*starts {count + 1} processes.*--num_processes {count}", done.stderr), done.stderr


# ---- the model ----


@pytest.fixture
def pair():
    """Ours and transformers' GPT-2 with the same weights, in float32 on the GPU."""
    ours = tiny_model(n_embd=64).eval()
    config = GPT2Config(
        vocab_size=60, n_positions=32, n_embd=64, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    theirs = GPT2LMHeadModel(config).eval()
    theirs.load_state_dict(as_gpt2_tensors(ours.state_dict(), 60))
    return ours.cuda(), theirs.cuda()


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(0, 60, (3, 24), device="cuda")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_and_gradients_equal_transformers(pair, ids, attention):
    ours, theirs = pair
    ours.set_attn_implementation(attention)
    torch.testing.assert_close(ours(ids).logits[..., :60], theirs(ids).logits, atol=1e-4, rtol=1e-4)
    loss, expected = ours(ids, labels=ids).loss, theirs(ids, labels=ids).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.backward()
    ours_grad = as_gpt2_tensors({name: p.grad for name, p in ours.named_parameters()}, 60)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours_grad[name], parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_as_close_to_float32_as_transformers(pair, ids, dtype):
    ours, theirs = pair
    exact = theirs(ids).logits
    error = (ours.to(dtype)(ids).logits[..., :60].float() - exact).abs().max()
    expected_error = (theirs.to(dtype)(ids).logits.float() - exact).abs().max()
    assert error < 2 * expected_error


def test_padded_and_generated_text_equals_transformers(pair, ids):
    ours, theirs = pair
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[2, :11] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(ids, **options)
    assert torch.equal(ours.generate(ids, **options), expected)
    assert torch.equal(ours.generate(ids, cache_implementation="static", **options), expected)  # compiled


def test_the_loss_never_holds_all_logits():
    config = GPT2ReproConfig(n_positions=1024, n_embd=128, n_layer=1, n_head=2)
    model = GPT2ReproForCausalLM(config).cuda()
    ids = torch.randint(0, 50257, (32, 1024), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16):
        model(ids, labels=ids).loss.backward()
    float32_bytes_of_all_logits = 4 * ids.numel() * config.vocab_size
    # A chunk's logits exist in bf16, and its probabilities in float32 and bf16.
    assert torch.cuda.max_memory_allocated() < 3 * float32_bytes_of_all_logits / MAX_CHUNKS


# ---- scripts ----


def test_scripts_use_the_gpu_and_agree_with_the_cpu(new_run, run_script, tmp_path):
    run = new_run().launch("bf16")
    items = [
        {
            "ind": i,
            "ctx": "The value of",
            "endings": [f"{word} {i}" for word in ("an expression", "list", "a", "of")],
            "label": 1,
        }
        for i in range(20)
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    model = run.output_dir / "model"
    outputs = []
    for visible in (os.environ.get("CUDA_VISIBLE_DEVICES", "0"), "-1"):
        out = tmp_path / f"scores{visible}.json"
        done = run_script(
            "eval_hellaswag.py",
            model,
            "--data",
            tmp_path / "items.jsonl",
            "--output",
            out,
            CUDA_VISIBLE_DEVICES=visible,
        )
        assert done.returncode == 0, done.stderr
        sampled = run_script(
            "sample.py", model, "--prompt", "The ", "--max_new_tokens", 20, CUDA_VISIBLE_DEVICES=visible
        )
        assert sampled.returncode == 0, sampled.stderr
        outputs.append(json.loads(out.read_text()))
    assert outputs[0]["results"] == outputs[1]["results"]
