"""Muon against AdamW: steps to the same validation loss, on real text, with train_accelerate.py as a user runs it.

    python benchmarks/muon.py --text wikitext2_valid.txt wikitext2_test.txt
    python benchmarks/muon.py --draw benchmarks/results/muon_cpu.json

The text is Python's documentation (the corpus python-docs) and the files given with --text, in which each WikiText
article is a document. All contenders train the same small GPT-2 on the same batches with the same schedule. Because
Muon leaves the embeddings to AdamW at their own learning rate, the third contender is AdamW with two learning rates:
one for the matrices of the blocks, which Muon would update, and one for the rest. A sweep with the first seed tries
several learning rates, with --steps steps for AdamW and half of them for Muon. With the best ones, each seed trains
four models: each contender for --steps steps, and Muon also for half of them, with its schedule over these. The table
shows the final validation losses, and after how many steps Muon's reaches the better AdamW's final one. --output gets
every number, --picture the curves.

AdamW with two learning rates is an optimizer that only this file knows. It trains through an entry of its own:

    python benchmarks/muon.py train --matrix_learning_rate 3e-3 --config recipes/demo.yaml [--field value ...]
"""

import argparse
import datetime
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_accelerate
from gpt2repro.errors import quiet_broken_pipe, run_script
from gpt2repro.prepare.built_in import python_docs
from gpt2repro.recipe import Recipe
from gpt2repro.train.metrics import read_metrics
from gpt2repro.train.optimizers import OPTIMIZERS, adamw_for, block_matrices
from gpt2repro.train.report import provenance


ROOT = Path(__file__).resolve().parents[1]
# Tried with the first seed. Next to muon_learning_rate or matrix_learning_rate, which the block matrices get,
# learning_rate is that of embeddings, biases and LayerNorms.
SWEEP = {
    "adamw": [{"learning_rate": 1.5e-3}, {"learning_rate": 3e-3}, {"learning_rate": 6e-3}],
    "adamw, two rates": [
        {"matrix_learning_rate": 1.5e-3, "learning_rate": 6e-3},
        {"matrix_learning_rate": 3e-3, "learning_rate": 6e-3},
        {"matrix_learning_rate": 3e-3, "learning_rate": 1.2e-2},
        {"matrix_learning_rate": 3e-3, "learning_rate": 2.4e-2},
    ],
    "muon": [
        {"optimizer": "muon", "muon_learning_rate": 0.005, "learning_rate": 6e-3},
        {"optimizer": "muon", "muon_learning_rate": 0.01, "learning_rate": 3e-3},
        {"optimizer": "muon", "muon_learning_rate": 0.01, "learning_rate": 6e-3},
        {"optimizer": "muon", "muon_learning_rate": 0.01, "learning_rate": 1.2e-2},
        {"optimizer": "muon", "muon_learning_rate": 0.01, "learning_rate": 2.4e-2},
        {"optimizer": "muon", "muon_learning_rate": 0.02, "learning_rate": 3e-3},
        {"optimizer": "muon", "muon_learning_rate": 0.02, "learning_rate": 6e-3},
    ],
}
SETTINGS = {
    "lr_schedule": "linear",
    "min_learning_rate": 0,
    "sequence_length": 128,
    "global_batch_tokens": 1024,
    "micro_batch_size": 8,
    "model.n_positions": 128,
    "model.n_layer": 4,
    "model.n_head": 4,
    "model.n_embd": 128,
    "sample_every": 0,
    "sample_tokens": 1,
    "num_workers": 0,
    "log_every": 10,
}
COLORS = {"AdamW": "tab:blue", "AdamW, two rates": "tab:green", "Muon": "tab:orange", "Muon, half the steps": "tab:red"}


@dataclass(frozen=True)
class Run:
    """One training run: the recipe fields in which the contenders differ, its seed and its length in steps."""

    fields: dict
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return "_".join([*map(str, self.fields.values()), f"seed{self.seed}", f"{self.steps}steps"])


def main() -> None:
    args = parse_arguments()
    if args.draw:
        draw(json.loads(Path(args.draw).read_text()), args.picture)
        return
    work = Path(args.work_dir)
    prepare(args.text, work, args.vocab_size)
    swept = train_all(sweep_runs(args.seeds[0], args.steps), work, args)
    best = {name: best_fields(swept, candidates) for name, candidates in SWEEP.items()}
    final = train_all([run for seed in args.seeds for run in final_runs(best, seed, args.steps)], work, args)
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.jobs} runs at once of one thread each",
        "date": datetime.date.today().isoformat(),
        "versions": provenance(),
        "settings": SETTINGS | {"max_steps": args.steps, "vocab_size": args.vocab_size},
        "data": json.loads((work / "data" / "manifest.json").read_text())["splits"],
        "best": best,
        "sweep": swept,
        "runs": final,
        "seeds": {seed: compare(final, seed) for seed in args.seeds},
    }
    report(result)
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    draw(result, args.picture)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="*", default=[], metavar="FILE", help="more text, e.g. WikiText-2's files")
    parser.add_argument("--steps", type=int, default=400, help="steps of the long runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    parser.add_argument("--vocab_size", type=int, default=2048, help="tokens of the byte-level BPE")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, with one thread each")
    parser.add_argument(
        "--work_dir", default="runs/benchmark-muon", help="text, tokens and runs; finished runs are reused"
    )
    parser.add_argument("--output", help="JSON file for every number")
    parser.add_argument("--picture", default="docs/muon.png", help="PNG file of the curves")
    parser.add_argument("--draw", metavar="JSON", help="only draw the picture of an earlier --output")
    return parser.parse_args()


# ---- the third contender ----


def adamw_two_rates(model: torch.nn.Module, recipe: Recipe, matrix_learning_rate: float) -> list[torch.optim.Optimizer]:
    """AdamW with a learning rate of its own, on the same schedule, for the matrices that Muon would update."""
    matrices = block_matrices(model)
    in_blocks = set(matrices)
    optimizer = adamw_for([p for p in model.parameters() if p not in in_blocks], recipe)
    lr_ratio = matrix_learning_rate / recipe.learning_rate
    optimizer.add_param_group({"params": matrices, "weight_decay": recipe.weight_decay, "lr_ratio": lr_ratio})
    return [optimizer]


def train_two_rates(argv: list[str]) -> None:
    """`muon.py train`: train_accelerate.py with the optimizer above."""
    parser = argparse.ArgumentParser("muon.py train", allow_abbrev=False)
    parser.add_argument("--matrix_learning_rate", type=float, required=True)
    args, recipe_flags = parser.parse_known_args(argv)
    rate = args.matrix_learning_rate
    OPTIMIZERS["adamw_two_rates"] = functools.partial(adamw_two_rates, matrix_learning_rate=rate)
    train_accelerate.main([*recipe_flags, "--optimizer", "adamw_two_rates"])


# ---- runs ----


def prepare(texts: list[str], work: Path, vocab_size: int) -> None:
    """Write the documents to one jsonl file in `work`, and their tokens to `work`/data; a fiftieth is validation."""
    documents = list(python_docs())
    for path in texts:
        articles = re.split(r"(?m)^(?= = [^=]+ = $)", Path(path).read_text())
        documents += [article for article in articles if article.strip()]
    work.mkdir(parents=True, exist_ok=True)
    (work / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    command = ["prepare_data.py", "files", "--source", work / "documents.jsonl", "--output_dir", work / "data"]
    subprocess.run(
        [sys.executable, *map(str, command), "--tokenizer", f"bpe:{vocab_size}", "--val_fraction", "0.02"],
        cwd=ROOT,
        check=True,
    )


def sweep_runs(seed: int, steps: int) -> list[Run]:
    """Every candidate of every contender, Muon's for half the steps."""
    runs = []
    for name, candidates in SWEEP.items():
        budget = steps // 2 if name == "muon" else steps
        runs += [Run(fields, seed, budget) for fields in candidates]
    return runs


def best_fields(swept: list[dict], candidates: list[dict]) -> dict:
    """The candidate with the lowest final validation loss."""
    runs = [run for run in swept if run["fields"] in candidates]
    return min(runs, key=lambda run: run["val_loss"][-1])["fields"]


def final_runs(best: dict[str, dict], seed: int, steps: int) -> list[Run]:
    """The four runs of a seed, in the order in which compare() expects them."""
    return [*(Run(best[name], seed, steps) for name in SWEEP), Run(best["muon"], seed, steps // 2)]


def train_all(runs: list[Run], work: Path, args: argparse.Namespace) -> list[dict]:
    """The metrics of each run, of which `args.jobs` train at a time."""
    validate_every = max(1, args.steps // 20)
    with ThreadPoolExecutor(args.jobs) as pool:
        return list(pool.map(lambda run: train(run, work, validate_every), runs))


def train(run: Run, work: Path, validate_every: int) -> dict:
    """The metrics of one run of the trainer; a finished run is not repeated."""
    output_dir = work / run.name
    if not (output_dir / "model").exists():
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        with (work / f"{run.name}.log").open("w") as log:
            command = train_command(run, work, validate_every)
            subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)
    validations = [row for row in read_metrics(output_dir / "metrics.jsonl") if "val_loss" in row]
    val_losses = [row["val_loss"] for row in validations]
    print(f"{time.strftime('%H:%M:%S')} {run.name}: validation loss {val_losses[-1]:.4f}", flush=True)
    return {
        "fields": run.fields,
        "seed": run.seed,
        "steps": run.steps,
        "step": [row["step"] for row in validations],
        "val_loss": val_losses,
    }


def train_command(run: Run, work: Path, validate_every: int) -> list[str]:
    """The command line of a run; that of AdamW with two learning rates goes through `muon.py train`."""
    schedule = {"max_steps": run.steps, "warmup_steps": run.steps // 10, "checkpoint_every": run.steps}
    paths = {"data_dir": work / "data", "output_dir": work / run.name}
    script = ["train_accelerate.py"]
    if "matrix_learning_rate" in run.fields:
        script = ["benchmarks/muon.py", "train"]
    fields = {**SETTINGS, **schedule, **run.fields, **paths, "validate_every": validate_every, "seed": run.seed}
    flags = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    return [sys.executable, *script, "--config", "recipes/demo.yaml", *flags]


# ---- results ----


def compare(runs: list[dict], seed: int) -> dict:
    """The final validation losses of a seed's four runs, and when Muon reaches the better AdamW's."""
    adamw, two_rates, muon, half = [run for run in runs if run["seed"] == seed]
    target = min(adamw["val_loss"][-1], two_rates["val_loss"][-1])
    return {
        "adamw": adamw["val_loss"][-1],
        "adamw_two_rates": two_rates["val_loss"][-1],
        "muon": muon["val_loss"][-1],
        "muon_half": half["val_loss"][-1],
        "muon_reaches_adamw_at_step": first_step_at(target, muon),
        "half_reaches_adamw_at_step": first_step_at(target, half),
    }


def first_step_at(target: float, run: dict) -> int | None:
    """The first validated step whose loss is at most `target`."""
    steps = [step for step, loss in zip(run["step"], run["val_loss"]) if loss <= target]
    return steps[0] if steps else None


def report(result: dict) -> None:
    print("\nlearning rates tried with the first seed")
    for run in result["sweep"]:
        print(f"  {run['val_loss'][-1]:.4f}  {run['fields']}")
    steps = result["settings"]["max_steps"]
    print(
        f"\nfinal validation loss after {steps} steps of AdamW, AdamW with two learning rates, Muon, and after "
        f"{steps // 2} of Muon; the step at which either Muon reaches the better AdamW's final loss"
    )
    seeds = result["seeds"]
    for seed, row in seeds.items():
        cells = [f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()]
        print(f"  seed {seed}: " + "  ".join(cells))
    contenders = ("adamw", "adamw_two_rates", "muon", "muon_half")
    medians = [statistics.median(row[name] for row in seeds.values()) for name in contenders]
    print("  median:    " + "  ".join(f"{median:.4f}" for median in medians))


def contender_of(run: dict, full_steps: int) -> str:
    """What the picture calls the contender that a run belongs to, one of COLORS."""
    if "matrix_learning_rate" in run["fields"]:
        return "AdamW, two rates"
    if run["fields"].get("optimizer") != "muon":
        return "AdamW"
    return "Muon" if run["steps"] == full_steps else "Muon, half the steps"


def draw(result: dict, path: str) -> None:
    """Plot the validation losses of every seed over the steps."""
    import matplotlib

    matplotlib.use("Agg")  # needs no display
    from matplotlib import pyplot

    full_steps = result["settings"]["max_steps"]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    lines = {}  # one a label, for the legend
    for run in result["runs"]:
        contender = contender_of(run, full_steps)
        (line,) = axes.plot(run["step"], run["val_loss"], color=COLORS[contender], linewidth=1)
        label = f"{contender.removesuffix(', half the steps')}, {run['steps']} steps"
        lines.setdefault(label, line)
    target = statistics.median(min(row["adamw"], row["adamw_two_rates"]) for row in result["seeds"].values())
    target_line = axes.axhline(target, color="tab:blue", linestyle="--", linewidth=1)
    lines[f"the better AdamW's final loss, median {target:.3f}"] = target_line
    axes.set(xlabel="step", ylabel="validation loss, nats per token", ylim=(None, target + 1.5))
    axes.set_title(f"Muon against AdamW: small GPT-2, {len(result['seeds'])} seeds")
    axes.grid(alpha=0.3)
    axes.legend(lines.values(), lines.keys())
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        run_script(lambda argv: train_two_rates(argv[1:]))
    else:
        with quiet_broken_pipe():
            main()
