"""Two launches that find each other over loopback, as those of two machines do over their network."""

import os
import subprocess
import sys

import pytest
import torch
from accelerate.utils.other import get_free_port
from safetensors.torch import load_file
from support import PATIENCE, ROOT, measured


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


def test_two_machines_learn_what_one_process_learns(data_dir, trainer_server, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"data_dir: {data_dir}\n{RECIPE}")
    one, two, log = tmp_path / "one", tmp_path / "two", tmp_path / "log"
    script = ["train_accelerate.py", "--config", tmp_path / "recipe.yaml", "--output_dir"]

    def launch(rank: int) -> subprocess.Popen:
        command = ["accelerate.commands.launch", "--config_file", "accelerate_configs/ddp_2node.yaml"]
        command += ["--num_processes", 2, "--mixed_precision", "no", "--machine_rank", rank]
        command += ["--main_process_ip", "127.0.0.1", "--main_process_port", port, *script, two]
        return subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            cwd=ROOT,
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    port = get_free_port()
    machines = [launch(rank) for rank in range(2)]
    pid = trainer_server.start([*script, one], log, log)
    for machine in machines:
        _, stderr = machine.communicate(timeout=PATIENCE)
        assert machine.returncode == 0, stderr
    assert trainer_server.wait(pid) == 0, log.read_text()

    for key in ("loss", "grad_norm", "val_loss"):
        assert measured(two, key) == pytest.approx(measured(one, key), abs=1e-5) and measured(one, key)
    expected, exported = (load_file(run / "model" / "model.safetensors") for run in (one, two))
    for name, tensor in expected.items():
        torch.testing.assert_close(exported[name], tensor, atol=1e-5, rtol=0)
