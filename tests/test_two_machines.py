"""Two launches that meet over the loopback network, as those of two machines do over theirs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils.other import get_free_port
from safetensors.torch import load_file

import prepare_data
from gpt2repro.train.metrics import read_metrics


ROOT = Path(__file__).resolve().parents[1]
RECIPE = """
sequence_length: 32
global_batch_tokens: 512
micro_batch_size: 4
warmup_steps: 1
max_steps: 3
learning_rate: 3e-3
validation_tokens: 544
sample_tokens: 8
num_workers: 0
model: {n_positions: 32, n_layer: 2, n_head: 2, n_embd: 32}
"""


@pytest.mark.slow
def test_two_machines_learn_what_one_process_learns(topics, tmp_path):
    (tmp_path / "topics.txt").write_text("\n".join(topics))
    source = ("--source", str(tmp_path / "topics.txt"), "--tokenizer", "char")
    prepare_data.main(["files", *source, "--output_dir", str(tmp_path / "data")])
    (tmp_path / "recipe.yaml").write_text(f"data_dir: {tmp_path / 'data'}\n{RECIPE}")

    def launch(config: str, name: str, *flags: str) -> subprocess.Popen:
        command = ["accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}.yaml", *flags]
        command += ["--mixed_precision", "no", "train_accelerate.py", "--config", tmp_path / "recipe.yaml"]
        return subprocess.Popen(
            [sys.executable, "-m", *map(str, command), "--output_dir", tmp_path / name],
            cwd=ROOT,
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    meeting = ("--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(get_free_port()))
    machines = [launch("ddp_2node", "two", *meeting, "--machine_rank", str(rank)) for rank in range(2)]
    for process in (*machines, launch("cpu", "one")):
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr

    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for key in ("loss", "grad_norm", "val_loss"):
        expected = [row[key] for row in one if key in row]
        assert [row[key] for row in two if key in row] == pytest.approx(expected, abs=1e-5) and expected
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-5, rtol=0)
