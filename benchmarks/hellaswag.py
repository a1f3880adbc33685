"""HellaSwag items a second: packed rows, rows that are written out, and build-nanogpt's own evaluation.

    python benchmarks/hellaswag.py --data hellaswag_val.jsonl.gz --build_nanogpt build-nanogpt/hellaswag.py

All score the same items with the same weights, of GPT-2's size and drawn as GPT-2's are (--model takes real ones), in
turn, first in float32 and then under bfloat16 autocast. build-nanogpt's `evaluate` runs as it stands, on our items and
a folder with the weights. The items are evenly spaced batches of the whole set, each of items of similar length.

The table shows medians over the rounds, and of how many items acc_norm says the same, right or wrong, as for rows that
are written out in the first precision; in float32 of all. GFLOP/s are those of the matrix products of packed rows: more
than the machine can do is not to be had.
"""

import argparse
import contextlib
import copy
import datetime
import importlib.util
import io
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpt2repro.data.tokenization import fast_from_tiktoken, gpt2_encoding
from gpt2repro.errors import quiet_broken_pipe
from gpt2repro.evaluation.hellaswag import EncodedItem, default_batch_size, encode_item
from gpt2repro.evaluation.hellaswag_items import load_items
from gpt2repro.evaluation.multiple_choice import Question, plan_batches, score_questions
from gpt2repro.evaluation.rows import positions
from gpt2repro.models.folder import open_model
from gpt2repro.models.openai_weights import to_gpt2
from gpt2repro.models.packed_weights import pack_weights
from gpt2repro.train.report import provenance
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM


PRECISIONS = {"no": "float32", "bf16": "bfloat16"}


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    accelerator = Accelerator()
    device = accelerator.device
    if args.model:
        model, tokenizer = open_model(args.model, "float32")
    else:
        model, tokenizer = GPT2ReproForCausalLM(GPT2ReproConfig()), fast_from_tiktoken(gpt2_encoding())
    model = model.to(device)
    items, encoded = sample(load_items(args.data), tokenizer, positions(model), args.items, device)
    work = flops(model, encoded)

    def ours(model: PreTrainedModel, packs: bool) -> tuple[float, np.ndarray]:
        questions = [question for item in encoded for question in (item.questions if packs else written_out(item))]
        began = time.perf_counter()
        nll = np.array(score_questions(model, questions, accelerator, default_batch_size(device))).reshape(
            len(encoded), -1
        )
        seconds = time.perf_counter() - began
        mean = nll / [item.ending_tokens for item in encoded]
        return seconds, mean.argmin(axis=1) == [item.label for item in encoded]

    with tempfile.TemporaryDirectory() as folder:
        ways = {"written out": lambda: ours(model, packs=False), "packed": lambda: ours(model, packs=True)}
        if args.build_nanogpt:
            to_gpt2(model).save_pretrained(folder)
            theirs = imported(args.build_nanogpt)
            ways["build-nanogpt"] = lambda: build_nanogpt(theirs, folder, device, items)
        results: dict[str, dict] = {}
        right_as_expected: np.ndarray | None = None
        for precision in [PRECISIONS[name] for name in args.precision]:
            if device.type == "cpu":
                ways["packed, weights too"] = packed_weights(model, precision, ours)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                measured: dict[str, list[tuple[float, np.ndarray]]] = {way: [] for way in ways}
                for _ in range(args.rounds + 1):  # the first is a warm-up
                    for way, score in ways.items():
                        measured[way].append(score())
            if right_as_expected is None:
                right_as_expected = measured["written out"][0][1]
            results[precision] = {}
            for way, runs in measured.items():
                same = int((runs[0][1] == right_as_expected).sum())
                assert same == len(items) or precision == "bfloat16", f"{way}: only {same} of {len(items)} are the same"
                results[precision][way] = {"seconds": [seconds for seconds, _ in runs[1:]], "same": same}
            show(precision, results[precision], len(items), work)
    if args.output:
        report = {
            "date": datetime.date.today().isoformat(),
            "device": str(device),
            "threads": torch.get_num_threads(),
            "versions": provenance(),
            "settings": {"model": args.model, "items": len(items), "rounds": args.rounds},
            "flops_per_item": work / len(items),
            "results": results,
        }
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n")


def sample(items: list[dict], tokenizer, max_length: int | None, count: int, device: torch.device):
    """About `count` items, as published and encoded: evenly spaced batches of the whole set."""
    encoded = [encode_item(item, tokenizer, max_length) for item in items]
    fitting = [i for i, item in enumerate(encoded) if not item.cut]
    batches = plan_batches([encoded[i].questions[0] for i in fitting], default_batch_size(device))
    taken = max(1, count // len(batches[0]))
    chosen = [batches[(2 * k + 1) * len(batches) // (2 * taken)] for k in range(taken)]
    indices = [fitting[i] for batch in chosen for i in batch]
    return [items[i] for i in indices], [encoded[i] for i in indices]


def packed_weights(model: PreTrainedModel, precision: str, ours: Callable) -> Callable[[], tuple[float, np.ndarray]]:
    """As eval_hellaswag.py does on a CPU with --dtype float32 or bfloat16, instead of autocast."""
    packed = copy.deepcopy(model).to(getattr(torch, precision))
    pack_weights(packed)

    def score() -> tuple[float, np.ndarray]:
        with torch.autocast("cpu", enabled=False):
            return ours(packed, packs=True)

    return score


def written_out(item: EncodedItem) -> list[Question]:
    return item.questions[0].written_out


def imported(path: str) -> ModuleType:
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location("build_nanogpt_hellaswag", path)
    assert spec and spec.loader, f"{path} is no Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_nanogpt(module: ModuleType, folder: str, device: torch.device, items: list[dict]) -> tuple[float, np.ndarray]:
    """Seconds from the first item on, without opening the model; and which items its acc_norm counts as right."""
    began = []

    def iterate_examples(split):
        began.append(time.perf_counter())
        yield from items

    module.iterate_examples = iterate_examples  # its own downloads the set
    printed = io.StringIO()
    precision = torch.get_float32_matmul_precision()
    with contextlib.redirect_stdout(printed), torch.no_grad():
        module.evaluate(folder, device.type)
    seconds = time.perf_counter() - began[0]
    torch.set_float32_matmul_precision(precision)  # it allows TF32
    right_so_far = [int(count) for count in re.findall(r"^\d+ acc_norm: (\d+)/", printed.getvalue(), re.MULTILINE)]
    return seconds, np.diff([0, *right_so_far]) == 1


def flops(model, encoded: list[EncodedItem]) -> int:
    """Of the matrix products of packed rows, without attention: the blocks at every token, the head at those that
    predict."""
    matrices = [parameter for name, parameter in model.transformer.h.named_parameters() if parameter.dim() == 2]
    questions = [item.questions[0] for item in encoded]
    tokens = sum(len(question.packed_tokens) for question in questions)
    predicting = sum(len(question.packed_tokens) - len(question.context) + 1 for question in questions)
    return 2 * tokens * sum(map(torch.numel, matrices)) + 2 * predicting * model.lm_head.weight.numel()


def show(precision: str, results: dict, items: int, work: int) -> None:
    print(f"\n{precision:20}{'items/s':>9}{'/ written out':>15}{'packed GFLOP/s':>16}{'same':>8}")
    medians = {way: statistics.median(result["seconds"]) for way, result in results.items()}
    for way, seconds in medians.items():
        ratio, rate = medians["written out"] / seconds, work / seconds / 1e9
        print(f"{way:20}{items / seconds:9.2f}{ratio:15.2f}{rate:16.0f}{results[way]['same']:>5}/{items}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="local hellaswag_val.jsonl or .jsonl.gz (default: from the Hub)")
    parser.add_argument("--model", help="run, model folder or Hub id (default: GPT-2 124M with random weights)")
    parser.add_argument("--build_nanogpt", help="its file hellaswag.py")
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", default=list(PRECISIONS), help="bf16: autocast")
    parser.add_argument("--items", type=int, default=16, help="how many items to score, about")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", help="write every measurement to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    with quiet_broken_pipe():
        main()
