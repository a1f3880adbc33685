"""What our training loop adds to a bare one in plain PyTorch: signals, bad steps, telemetry, Accelerate.

    python benchmarks/overhead.py --sequence_length 512

Both loops drive the same model with the same optimizer in one process, alternating step by step, so that the machine's
noise affects both alike; the overhead is the ratio of the medians. Then checkpoints are saved: how long training pauses
for one, and how much slower the steps are that run while it is written.
"""

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from accelerate import Accelerator

from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.errors import quiet_broken_pipe
from gpt2repro.processes import device_name
from gpt2repro.recipe import Recipe
from gpt2repro.train.checkpoint import Checkpoints
from gpt2repro.train.guard import Guard
from gpt2repro.train.optimizers import build_optimizers, set_lr
from gpt2repro.train.report import provenance
from gpt2repro.train.schedule import lr_at
from gpt2repro.train.stopping import StopRequest
from gpt2repro.train.telemetry import UPDATE_RATIO_EVERY, Telemetry
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from train_accelerate import agree, forward_backward, step_all, zero_grad_all


WARMUP_STEPS = 2


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as output_dir:
        loops = Loops(args, output_dir)
        seconds = time_steps(loops, args.steps)
        update_ratio_seconds = time_update_ratio(loops)
        saves = time_saves(loops, args.saves)

    medians = {name: statistics.median(measured) for name, measured in seconds.items()}
    update_ratio_share = update_ratio_seconds / UPDATE_RATIO_EVERY / medians["bare"]
    overhead = medians["ours"] / medians["bare"] - 1 + update_ratio_share
    print(f"ours {medians['ours']:.4f} s, bare {medians['bare']:.4f} s per step: {overhead:.2%} more, of which the")
    print(f"update ratio, {update_ratio_seconds:.3f} s every {UPDATE_RATIO_EVERY} steps, is {update_ratio_share:.2%}")
    print("a checkpoint: " + ", ".join(f"{name} {value:.2f}" for name, value in saves.items()))
    if args.output:
        report = {
            "date": str(datetime.date.today()),
            "device": device_name(loops.accelerator.device),
            "versions": provenance(),
            "settings": {
                "batch_size": args.batch_size,
                "sequence_length": args.sequence_length,
                "precision": args.precision,
                "steps": args.steps,
            },
            "seconds": seconds,
            "median_seconds": medians,
            "seconds of the update ratio, every 100 steps": update_ratio_seconds,
            "overhead": overhead,
            "medians of the saves": saves,
        }
        args.output.write_text(json.dumps(report, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=2, help="sequences per step (default: %(default)s)")
    parser.add_argument("--sequence_length", type=int, default=256, help="tokens (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="measured steps of each loop (default: %(default)s)")
    parser.add_argument("--saves", type=int, default=3, help="checkpoints to save (default: %(default)s)")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="autocast; no is float32")
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    return parser.parse_args()


class Loops:
    """One model with one optimizer, and a step of either loop to train them."""

    def __init__(self, args: argparse.Namespace, output_dir: str):
        self.recipe = Recipe(
            output_dir=output_dir,
            global_batch_tokens=args.batch_size * args.sequence_length,
            micro_batch_size=args.batch_size,
            sequence_length=args.sequence_length,
            max_steps=10**6,
        )
        self.uses_bf16 = args.precision == "bf16"
        self.accelerator = Accelerator(mixed_precision=args.precision)
        torch.set_float32_matmul_precision("high")
        self.raw_model = GPT2ReproForCausalLM(GPT2ReproConfig())
        self.raw_optimizers = build_optimizers(self.raw_model, self.recipe)
        self.model, *self.optimizers = self.accelerator.prepare(self.raw_model, *self.raw_optimizers)
        self.model.train()
        self.raw_forward = type(self.raw_model).forward.__get__(self.raw_model)  # without accelerate's autocast
        self.telemetry = Telemetry(self.recipe, self.accelerator, self.raw_model)
        self.guard, self.stop_request = Guard(self.recipe), StopRequest(self.recipe.max_hours)

    def tokens(self) -> torch.Tensor:
        """A batch of random tokens, whose values do not affect the speed."""
        return torch.randint(0, 50_257, (self.recipe.micro_batch_size, self.recipe.sequence_length + 1))

    def ours(self, step: int) -> None:
        lr = set_lr(self.optimizers, lr_at(step, self.recipe))
        loss, grad_norm = forward_backward(self.accelerator, self.model, [self.tokens()], self.recipe, step)
        loss, grad_norm, _ = agree(self.accelerator, loss, grad_norm, self.stop_request)
        if self.guard.accepts(step, loss, grad_norm, self.accelerator.scaler):
            with self.telemetry.measuring_update(step):
                step_all(self.optimizers)
        zero_grad_all(self.optimizers)
        self.telemetry.log_step(step + 1, loss, lr, grad_norm, self.guard)

    def bare(self, step: int) -> None:
        tokens = self.tokens().to(self.accelerator.device)
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.uses_bf16):
            loss = self.raw_forward(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.raw_model.parameters(), self.recipe.max_grad_norm)
        self.raw_optimizers[0].step()
        self.raw_optimizers[0].zero_grad()
        loss.item()  # a loop that prints its loss waits for it


def time_steps(loops: Loops, steps: int) -> dict[str, list[float]]:
    """Seconds of each measured step of the two loops, which take turns at going first."""
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    for step in range(1, WARMUP_STEPS + steps + 1):  # from 1: the update ratio is measured at step 0, and separately
        in_turn = ("ours", "bare") if step % 2 else ("bare", "ours")
        for name in in_turn:
            began = time.perf_counter()
            getattr(loops, name)(step)
            if loops.accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            if step > WARMUP_STEPS:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def time_update_ratio(loops: Loops) -> float:
    """Seconds to measure the update ratio once."""
    began = time.perf_counter()
    with loops.telemetry.measuring_update(0):
        pass
    return time.perf_counter() - began


def time_saves(loops: Loops, count: int) -> dict[str, float]:
    """Medians over `count` checkpoints."""
    tokenizer = build_tokenizer("gpt2", []).fast
    checkpoints = Checkpoints(
        loops.recipe, loops.accelerator, loops.raw_model, loops.raw_optimizers, tokenizer, loops.telemetry.say
    )
    saves = [time_save(loops, checkpoints, number) for number in range(1, count + 1)]
    return {name: statistics.median(save[name] for save in saves) for name in saves[0]}


def time_save(loops: Loops, checkpoints: Checkpoints, number: int) -> dict[str, float]:
    """Save a checkpoint while training continues, and compare its steps with as many undisturbed ones."""
    began = time.perf_counter()
    checkpoints.save({"step": number, "val_loss": None})
    pause = time.perf_counter() - began
    steps_meanwhile = 0
    while checkpoints.writer.is_alive():
        loops.ours(1)
        steps_meanwhile += 1
    written = time.perf_counter() - began
    checkpoints.wait()
    for _ in range(steps_meanwhile):
        loops.ours(1)
    undisturbed = time.perf_counter() - began - written
    return {
        "seconds that training stands still": pause,
        "in steps": pause / (undisturbed / steps_meanwhile),
        "seconds until it is written": written,
        "seconds that it costs in all": written - undisturbed,
    }


if __name__ == "__main__":
    with quiet_broken_pipe():
        main()
