"""HellaSwag scored with each context encoded once, against whole rows: same model, items, precision and machine.

    python benchmarks/hellaswag.py --data hellaswag_val.jsonl.gz
    python benchmarks/hellaswag.py --data hellaswag_val.jsonl.gz --batch_sizes 16 64 --precision bf16

The model has GPT-2's sizes and random weights, which do not affect the speed. Of the batches of the whole set, as
`plan_batches` makes them, evenly spaced ones are scored, each in both ways in turn. The table shows medians over the
rounds; --output writes every measurement as JSON.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpt2repro.data.tokenization import fast_from_tiktoken, gpt2_encoding
from gpt2repro.evaluation.hellaswag import encode_item, load_items, positions
from gpt2repro.evaluation.multiple_choice import Question, plan_batches, score_on_cache, score_whole_rows
from gpt2repro.models.folder import open_model
from gpt2repro.train.report import provenance
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM


WAYS = {"context once": score_on_cache, "whole rows": score_whole_rows}


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision=args.precision)
    if args.model:
        model, tokenizer = open_model(args.model, "float32")
    else:
        model, tokenizer = GPT2ReproForCausalLM(GPT2ReproConfig()), fast_from_tiktoken(gpt2_encoding())
    model = model.to(accelerator.device).eval()
    encoded = [encode_item(item, tokenizer, positions(model)) for item in load_items(args.data)]
    questions = [item.questions[0] for item in encoded if not item.cut]

    results = {}
    for batch_size in args.batch_sizes:
        batches = plan_batches(questions, batch_size, has_cache=True)
        spacing = min(max(1, len(batches) * batch_size // args.items), len(batches))
        sample = [[questions[i] for i in batch.indices] for batch in batches[spacing // 2 :: spacing]]
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(args.rounds + 1):  # the first is a warm-up
            times = [{way: time_batch(accelerator, model, way, batch) for way in WAYS} for batch in sample]
            for way in WAYS:
                seconds[way].append(sum(batch_times[way] for batch_times in times))
        items = sum(map(len, sample))
        results[batch_size] = {way: [1000 * s / items for s in measured[1:]] for way, measured in seconds.items()}
        show(batch_size, items, results[batch_size])
    if args.output:
        report = {
            "date": datetime.date.today().isoformat(),
            "device": str(accelerator.device),
            "threads": torch.get_num_threads(),
            "versions": provenance(),
            "settings": {name: value for name, value in vars(args).items() if name != "output"},
            "milliseconds_per_item": results,
        }
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n")


@torch.no_grad()
def time_batch(accelerator: Accelerator, model, way: str, batch: list[Question]) -> float:
    """Seconds until the scores are on the CPU."""
    began = time.perf_counter()
    with accelerator.autocast():
        WAYS[way](model, batch, accelerator.device)
    return time.perf_counter() - began


def show(batch_size: int, items: int, milliseconds: dict[str, list[float]]) -> None:
    medians = {way: statistics.median(measured) for way, measured in milliseconds.items()}
    once, whole = medians["context once"], medians["whole rows"]
    print(
        f"{batch_size:3} items a batch, {items} items: context once {once:8.1f} ms an item, whole rows {whole:8.1f}: "
        f"{whole / once:.2f} times as fast",
        flush=True,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="local hellaswag_val.jsonl or .jsonl.gz (default: from the Hub)")
    parser.add_argument("--model", help="run, model folder or Hub id (default: GPT-2 124M with random weights)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16], help="items a batch")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="autocast; no is float32")
    parser.add_argument("--items", type=int, default=32, help="how many items to score, about")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", help="write every measurement to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
