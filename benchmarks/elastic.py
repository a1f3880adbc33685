"""Stop a run, and resume it with another world size and other micro-batches: same tokens, same losses?

    python benchmarks/elastic.py

A small GPT-2 trains on the text that every CPython carries, in one process. From its checkpoints after a third and two
thirds of the steps it resumes in 1, 2 and 4 processes with several micro-batch sizes. For each, the table shows whether
all ranks together read the same tokens (sha256 over all steps), and by how much training loss, gradient norm and the
last validation loss differ at most from those of the uninterrupted run.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from gpt2repro.data.batches import MicroBatches
from gpt2repro.data.mixture import RunData
from gpt2repro.errors import quiet_broken_pipe
from gpt2repro.recipe import Recipe
from gpt2repro.run_folder import checkpoint_step
from gpt2repro.train.metrics import read_metrics
from gpt2repro.train.report import provenance


ROOT = Path(__file__).resolve().parents[1]
STEPS = 30
SEQUENCES = 16  # per step
T = 64  # tokens per sequence
RECIPE = f"""
max_steps: {STEPS}
warmup_steps: 5
global_batch_tokens: {SEQUENCES * T}
micro_batch_size: 16
sequence_length: {T}
learning_rate: 4e-3
validate_every: 0
validation_tokens: 8192
sample_every: 0
sample_tokens: 4
checkpoint_every: 10
keep_last: 3
num_workers: 0
model: {{n_layer: 2, n_head: 2, n_embd: 128, n_positions: {T}}}
"""
LAYOUTS = [(processes, micro) for processes in (1, 2, 4) for micro in (2, 4)]  # micro: sequences per micro-batch
KINDS = ("loss", "grad_norm", "val_loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "recipe.yaml").write_text(RECIPE)
        prepare = [sys.executable, ROOT / "prepare_data.py", "python-docs", "--output_dir", root / "data"]
        subprocess.run([*prepare, "--tokenizer", "bpe:512"], check=True, capture_output=True)
        uninterrupted = root / "uninterrupted"
        train(root, uninterrupted, processes=1, micro=SEQUENCES)
        expected = values_by_step(uninterrupted)
        expected_stream = stream_hash(root / "data", processes=1, micro=SEQUENCES)
        print(
            "| stopped after | processes x micro-batch x accumulation | same tokens | loss | gradient norm | val_loss |"
        )
        print("| ---: | --- | --- | ---: | ---: | ---: |")
        for stop in (STEPS // 3, 2 * STEPS // 3):
            for processes, micro in LAYOUTS:
                run = root / f"{stop}_{processes}_{micro}"
                copy_until(stop, uninterrupted, run)
                train(root, run, processes, micro)
                found = values_by_step(run)
                assert min(found["loss"]) == stop + 1 and max(found["loss"]) == STEPS
                layout = f"{processes} x {micro} x {SEQUENCES // processes // micro}"
                same_tokens = stream_hash(root / "data", processes, micro) == expected_stream
                differences = {kind: largest_difference(found[kind], expected[kind]) for kind in KINDS}
                columns = [stop, layout, same_tokens, *(f"{value:.1e}" for value in differences.values())]
                print("| " + " | ".join(map(str, columns)) + " |")
                rows.append({"stopped after": stop, "layout": layout, "same tokens": same_tokens, **differences})
    if args.output:
        facts = {"date": str(datetime.date.today()), "versions": provenance(), "rows": rows}
        args.output.write_text(json.dumps(facts, indent=2) + "\n")


def train(root: Path, output_dir: Path, processes: int, micro: int) -> None:
    config = "multi_cpu" if processes > 1 else "cpu"
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", ROOT / "accelerate_configs" / f"{config}.yaml", "--num_processes", str(processes)]
    command += [ROOT / "train_accelerate.py", "--config", root / "recipe.yaml", "--data_dir", root / "data"]
    command += ["--output_dir", output_dir, "--micro_batch_size", str(micro)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT)


def copy_until(step: int, run: Path, copy: Path) -> None:
    """Copy a finished run as if it had been stopped after `step`; the copy logs its own metrics."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("model", "metrics.jsonl"))
    for checkpoint in (copy / "checkpoints").iterdir():
        if checkpoint_step(checkpoint) > step:
            shutil.rmtree(checkpoint)


def values_by_step(run: Path) -> dict[str, dict[int, float]]:
    """For each of KINDS, its values by step."""
    rows = read_metrics(run / "metrics.jsonl")
    return {kind: {row["step"]: row[kind] for row in rows if kind in row} for kind in KINDS}


def largest_difference(found: dict[int, float], expected: dict[int, float]) -> float:
    """Over the steps in `found`."""
    return max(abs(value - expected[step]) for step, value in found.items())


def stream_hash(data_dir: Path, processes: int, micro: int) -> str:
    """SHA-256 of the tokens that all ranks read in the run, sample by sample."""
    recipe = Recipe(max_steps=STEPS, global_batch_tokens=SEQUENCES * T, micro_batch_size=micro, sequence_length=T)
    data = RunData.open({str(data_dir): 1.0}).train
    ranks = [MicroBatches(data, recipe, rank, processes) for rank in range(processes)]
    digest = sha256()
    for step in range(STEPS):
        for number in range(recipe.accumulation(processes, step)):
            tokens = torch.cat([rank[step, number] for rank in ranks])
            digest.update(tokens.numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    with quiet_broken_pipe():
        main()
