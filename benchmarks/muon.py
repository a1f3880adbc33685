"""Muon beside AdamW: steps to the same validation loss, on real text, with train_accelerate.py as a user runs it.

    python benchmarks/muon.py --text wikitext2_valid.txt wikitext2_test.txt
    python benchmarks/muon.py --draw benchmarks/results/muon_cpu.json

The text is the documentation of Python (the corpus python-docs) and the files of --text, with WikiText's articles as
documents. Both optimizers train the same small GPT-2 on the same batches with the same schedule. As Muon leaves the
embeddings to AdamW with a learning rate of their own, a third contender is AdamW with two rates, one for the matrices
of the blocks, as Muon has them, and one for the rest. First several learning rates are tried on the first seed, AdamW
with --steps steps, Muon with half of them. With the best ones every seed trains four models: each with --steps steps,
and Muon with half of them, its schedule over these. The table says what each ends at, and after how many steps Muon's
validation loss is at most AdamW's last. --output has every number, --picture the curves.
"""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpt2repro.prepare.corpora import python_docs
from gpt2repro.train.metrics import read_metrics
from gpt2repro.train.report import provenance


ROOT = Path(__file__).resolve().parents[1]
# Tried on the first seed. Beside Muon's learning rate or matrix_learning_rate, learning_rate is that of embeddings,
# biases and LayerNorms.
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


# train_accelerate.py with AdamW at two rates: the first word is that of the matrices of the blocks.
TWO_RATES = """
import sys
import train_accelerate
from gpt2repro.errors import run_script

rate = float(sys.argv.pop(1))
build_optimizers = train_accelerate.build_optimizers


def two_rates(model, recipe):
    (adamw,) = build_optimizers(model, recipe)
    of_blocks = {p for p in model.transformer.h.parameters() if p.dim() == 2}
    group = adamw.param_groups[0]
    adamw.add_param_group(group | {"params": [], "lr_ratio": rate / recipe.learning_rate})
    adamw.param_groups[-1]["params"] = [p for p in group["params"] if p in of_blocks]
    group["params"] = [p for p in group["params"] if p not in of_blocks]
    return [adamw]


train_accelerate.build_optimizers = two_rates
run_script(train_accelerate.main)
"""


def main() -> None:
    args = parse_arguments()
    if args.draw:
        draw(json.loads(Path(args.draw).read_text()), args.picture)
        return
    work = Path(args.work_dir)
    prepare(args.text, work, args.vocab_size)
    steps_of = dict.fromkeys(SWEEP, args.steps) | {"muon": args.steps // 2}
    runs = [(fields, args.seeds[0], steps_of[name]) for name in SWEEP for fields in SWEEP[name]]
    tried = train_all(runs, work, args)
    best = {
        name: min((run for run in tried if run["fields"] in SWEEP[name]), key=lambda run: run["val_loss"][-1])["fields"]
        for name in SWEEP
    }
    runs = [
        run
        for seed in args.seeds
        for run in (*((best[name], seed, args.steps) for name in SWEEP), (best["muon"], seed, args.steps // 2))
    ]
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.jobs} runs at once of one thread each",
        "date": datetime.date.today().isoformat(),
        "versions": provenance(),
        "settings": SETTINGS | {"max_steps": args.steps, "vocab_size": args.vocab_size},
        "data": json.loads((work / "data" / "manifest.json").read_text())["splits"],
        "best": best,
        "sweep": tried,
        "runs": train_all(runs, work, args),
    }
    result["seeds"] = {seed: compare(result["runs"], seed, args.steps) for seed in args.seeds}
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
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, each with one thread")
    parser.add_argument(
        "--work_dir", default="runs/benchmark-muon", help="text, tokens and runs; what is there is kept"
    )
    parser.add_argument("--output", help="JSON file for every number")
    parser.add_argument("--picture", default="docs/muon.png", help="PNG file of the curves")
    parser.add_argument("--draw", metavar="JSON", help="only draw the picture of an earlier --output")
    return parser.parse_args()


def prepare(texts: list[str], work: Path, vocab_size: int) -> None:
    """The documents as one jsonl file in `work`, and their tokens in `work`/data; a fiftieth is for validation."""
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


def train_all(runs: list[tuple[dict, int, int]], work: Path, args: argparse.Namespace) -> list[dict]:
    """Train (fields, seed, steps) each, `jobs` at a time; the same ones only once."""
    with ThreadPoolExecutor(args.jobs) as pool:
        return list(pool.map(lambda run: train(*run, work, args.steps), runs))


def train(fields: dict, seed: int, steps: int, work: Path, full_steps: int) -> dict:
    """The metrics of one run of the trainer, validated twenty times in `full_steps`; a finished one is only read."""
    name = "_".join([*map(str, fields.values()), f"seed{seed}", f"{steps}steps"])
    output_dir = work / name
    if not (output_dir / "model").exists():
        schedule = {"max_steps": steps, "warmup_steps": steps // 10, "validate_every": max(1, full_steps // 20)}
        given = SETTINGS | schedule | {"checkpoint_every": steps} | fields | {"seed": seed}
        matrix_rate = given.pop("matrix_learning_rate", None)
        flags = [word for field, value in given.items() for word in (f"--{field}", str(value))]
        paths = ["--data_dir", str(work / "data"), "--output_dir", str(output_dir)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        script = ["-c", TWO_RATES, str(matrix_rate)] if matrix_rate else ["train_accelerate.py"]
        with (work / f"{name}.log").open("w") as log:
            command = [sys.executable, *script, "--config", "recipes/demo.yaml", *flags, *paths]
            subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)
    rows = read_metrics(output_dir / "metrics.jsonl")
    run = {
        "fields": fields,
        "seed": seed,
        "steps": steps,
        "step": [row["step"] for row in rows if "val_loss" in row],
        "val_loss": [row["val_loss"] for row in rows if "val_loss" in row],
    }
    print(f"{time.strftime('%H:%M:%S')} {name}: validation loss {run['val_loss'][-1]:.4f}", flush=True)
    return run


def compare(runs: list[dict], seed: int, steps: int) -> dict:
    """The four runs of a seed: their last validation losses, and when Muon's curve is at the better AdamW's last."""
    adamw, two_rates, muon, half = [run for run in runs if run["seed"] == seed]
    target = min(adamw["val_loss"][-1], two_rates["val_loss"][-1])
    return {
        "adamw": adamw["val_loss"][-1],
        "adamw_two_rates": two_rates["val_loss"][-1],
        "muon": muon["val_loss"][-1],
        "muon_half": half["val_loss"][-1],
        "muon_reaches_adamw_at_step": next(
            (step for step, loss in zip(muon["step"], muon["val_loss"]) if loss <= target), None
        ),
        "half_reaches_adamw_at_step": next(
            (step for step, loss in zip(half["step"], half["val_loss"]) if loss <= target), None
        ),
    }


def report(result: dict) -> None:
    print("\nlearning rates tried on the first seed")
    for run in result["sweep"]:
        print(f"  {run['val_loss'][-1]:.4f}  {run['fields']}")
    steps = result["settings"]["max_steps"]
    seeds = list(result["seeds"].values())
    print(
        f"\nlast validation loss after {steps} steps of AdamW, AdamW with two rates, Muon, and {steps // 2} of "
        "Muon; Muon's steps to the better AdamW's last, in both"
    )
    for seed, row in result["seeds"].items():
        print(f"  seed {seed}: " + "  ".join(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()))
    medians = {
        key: statistics.median(row[key] for row in seeds) for key in ("adamw", "adamw_two_rates", "muon", "muon_half")
    }
    print("  median:    " + "  ".join(f"{value:.4f}" for value in medians.values()))


def draw(result: dict, path: str) -> None:
    """The validation losses over the steps, of every seed."""
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    from matplotlib import pyplot

    steps = result["settings"]["max_steps"]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    labels = {}
    for run in result["runs"]:
        muon = run["fields"].get("optimizer") == "muon"
        two_rates = "matrix_learning_rate" in run["fields"]
        color = "tab:green" if two_rates else "tab:blue" if not muon else "tab:orange"
        color = "tab:red" if muon and run["steps"] < steps else color
        label = f"{'Muon' if muon else 'AdamW, two rates' if two_rates else 'AdamW'}, {run['steps']} steps"
        labels.setdefault(label, axes.plot(run["step"], run["val_loss"], color=color, linewidth=1)[0])
    target = statistics.median(min(row["adamw"], row["adamw_two_rates"]) for row in result["seeds"].values())
    labels[f"the better AdamW's last, median {target:.3f}"] = axes.axhline(
        target, color="tab:blue", linestyle="--", linewidth=1
    )
    axes.set(xlabel="step", ylabel="validation loss, nats per token", ylim=(None, target + 1.5))
    axes.set_title(f"Muon beside AdamW: small GPT-2, {len(result['seeds'])} seeds")
    axes.grid(alpha=0.3)
    axes.legend(labels.values(), labels.keys())
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
