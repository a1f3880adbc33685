"""Stop a run, and let it go on with other numbers of processes and other micro-batches: what is read, what is learnt.

    python benchmarks/elastic.py

A small GPT-2 learns the text that every CPython carries, in one process. From its checkpoints after a third and two
thirds of the steps it goes on in 1, 2 and 4 processes with several micro-batch sizes. The table has, for each, whether
all processes together read the same tokens (sha256 over all steps), and the largest difference of a training loss, a
gradient norm and the last validation loss from those of the run that was not stopped.
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
from gpt2repro.recipe import Recipe
from gpt2repro.train.metrics import read_metrics
from gpt2repro.train.report import provenance


ROOT = Path(__file__).resolve().parents[1]
STEPS, SEQUENCES, T = 30, 16, 64
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
LAYOUTS = [(processes, micro) for processes in (1, 2, 4) for micro in (2, 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "recipe.yaml").write_text(RECIPE)
        prepare = [sys.executable, ROOT / "prepare_data.py", "python-docs", "--output_dir", root / "data"]
        subprocess.run([*prepare, "--tokenizer", "bpe:512"], check=True, capture_output=True)
        whole = root / "whole"
        train(root, whole, 1, 16)
        expected, stream = figures(whole), stream_hash(root / "data", 1, 16)
        rows = []
        print(
            "| stopped after | processes x micro-batch x accumulation | same tokens | loss | gradient norm | val_loss |"
        )
        print("| ---: | --- | --- | ---: | ---: | ---: |")
        for stop in (STEPS // 3, 2 * STEPS // 3):
            for processes, micro in LAYOUTS:
                run = root / f"{stop}_{processes}_{micro}"
                shutil.copytree(whole, run, ignore=lambda _, names: {"model", "metrics.jsonl"} & set(names))
                for checkpoint in (run / "checkpoints").iterdir():
                    if int(checkpoint.name.removeprefix("step_")) > stop:
                        shutil.rmtree(checkpoint)
                train(root, run, processes, micro)
                found = figures(run)
                row = {
                    "stopped after": stop,
                    "layout": f"{processes} x {micro} x {SEQUENCES // processes // micro}",
                    "same tokens": stream_hash(root / "data", processes, micro) == stream,
                } | {key: max(abs(found[key][s] - expected[key][s]) for s in found[key]) for key in expected}
                assert min(found["loss"]) == stop + 1 and max(found["loss"]) == STEPS
                print("| " + " | ".join(f"{v:.1e}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
                rows.append(row)
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


def figures(run: Path) -> dict[str, dict[int, float]]:
    """Of each kind of figure, its values by step."""
    rows = read_metrics(run / "metrics.jsonl")
    kinds = ("loss", "grad_norm", "val_loss")
    return {kind: {row["step"]: row[kind] for row in rows if kind in row} for kind in kinds}


def stream_hash(data_dir: Path, processes: int, micro: int) -> str:
    """Of what all processes read in the run, sample by sample."""
    recipe = Recipe(max_steps=STEPS, global_batch_tokens=SEQUENCES * T, micro_batch_size=micro, sequence_length=T)
    data, digest = RunData.open({str(data_dir): 1.0}).train, sha256()
    ranks = [MicroBatches(data, recipe, rank, processes) for rank in range(processes)]
    for step in range(STEPS):
        for m in range(recipe.accumulation(processes, step)):
            digest.update(torch.cat([rank[step, m] for rank in ranks]).numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
