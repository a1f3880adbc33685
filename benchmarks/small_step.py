"""Where the time of a step goes in a model of a few million parameters: recipes/shakespeare-char-cpu-fast.yaml.

    python benchmarks/small_step.py [--micro_batch_size 12]

Every part runs once a round, all on one thread, so that the machine's noise affects all alike. The table shows medians
of the processor time: forward and backward pass in float32 and in bf16, with torch's attention kernel and with eager
attention; the optimizers, beside torch.optim.Muon with one joint matrix for query, key and value; and what the trainer
does around them. The reference of each ratio is the float32 pass with torch's kernel and torch's Muon together.
"""

import argparse
import dataclasses
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from accelerate import Accelerator

from gpt2repro.errors import quiet_broken_pipe
from gpt2repro.processes import device_name
from gpt2repro.recipe import Recipe
from gpt2repro.recipe_file import parse_recipe
from gpt2repro.train.optimizers import adamw, block_matrices, build_optimizers
from gpt2repro.train.report import provenance
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from train_accelerate import forward_backward, step_all, zero_grad_all


RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "shakespeare-char-cpu-fast.yaml"
VOCABULARY = {"vocab_size": 65, "unpadded_vocab_size": 65, "bos_token_id": None, "eos_token_id": None}
REFERENCE = ("forward and backward, float32, sdpa", "torch.optim.Muon")


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    recipe, problems = parse_recipe(["--config", str(RECIPE)], RECIPE, GPT2ReproConfig)
    assert not problems, problems
    recipe = dataclasses.replace(recipe, micro_batch_size=args.micro_batch_size)
    milliseconds = time_parts(parts_of_a_step(recipe), args.rounds)
    medians = {name: statistics.median(measured) for name, measured in milliseconds.items()}
    reference = sum(medians[name] for name in REFERENCE)
    for name, median in medians.items():
        print(f"{name:40s} {median:7.2f} ms  {median / reference:6.1%}")
    if args.output:
        result = {
            "date": datetime.date.today().isoformat(),
            "device": device_name(torch.device("cpu")),
            "versions": provenance(),
            "settings": vars(args),
            "median_milliseconds": medians,
        }
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro_batch_size", type=int, default=24, help="sequences of 64 tokens")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", help="JSON file for every median")
    return parser.parse_args()


def parts_of_a_step(recipe: Recipe) -> dict[str, Callable[[], object]]:
    torch.manual_seed(recipe.seed)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**VOCABULARY, **recipe.model))
    tokens = torch.randint(0, 65, (recipe.micro_batch_size, recipe.sequence_length + 1))
    accelerator = Accelerator(cpu=True)
    of_adamw, of_muon = build_optimizers(model, recipe)
    (adamw_for_all,) = adamw(model, recipe)
    prepared, *optimizers = accelerator.prepare(model, of_adamw, of_muon)

    def forward_and_backward(dtype: torch.dtype, attention: str) -> None:
        model.set_attn_implementation(attention)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:], use_cache=False).loss
        loss.backward()

    def in_the_trainer() -> None:
        zero_grad_all(optimizers)
        model.set_attn_implementation("sdpa")
        forward_backward(accelerator, prepared, [tokens], recipe, step=0)

    parts: dict[str, Callable[[], object]] = {}
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bf16")):
        for attention in ("sdpa", "eager"):
            parts[f"forward and backward, {name}, {attention}"] = lambda d=dtype, a=attention: forward_and_backward(
                d, a
            )
    parts["the first, in the trainer, with clipping"] = in_the_trainer
    parts["torch.optim.Muon"] = torch.optim.Muon(block_matrices(model)).step
    parts["Muon"] = of_muon.step
    parts["AdamW for the rest"] = of_adamw.step
    parts["AdamW for all"] = adamw_for_all.step
    parts["both optimizers, in the trainer"] = lambda: step_all(optimizers)
    return parts


def time_parts(parts: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of the processor, by part; the first rounds do not count."""
    measured: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(-3, rounds):
        for name, run in parts.items():
            began = time.process_time()
            run()
            if number >= 0:
                measured[name].append((time.process_time() - began) * 1e3)
    return measured


if __name__ == "__main__":
    with quiet_broken_pipe():
        main()
