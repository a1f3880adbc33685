"""What the training loop costs beyond a bare one in plain PyTorch: signals, bad steps, telemetry, Accelerate.

    python benchmarks/overhead.py --sequence_length 512

Both loops drive the same model with the same optimizer in one process, a step each in turn, so that the noise of the
machine falls on both alike; the figure is the ratio of the medians. Then a checkpoint is saved: for how long training
stands still, and how much slower the steps are that are made while it is written.
"""

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from accelerate import Accelerator

from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.processes import device_name
from gpt2repro.recipe import Recipe
from gpt2repro.train.checkpoint import Checkpoints
from gpt2repro.train.guard import Guard
from gpt2repro.train.optimizers import build_optimizers, set_lr
from gpt2repro.train.report import provenance
from gpt2repro.train.schedule import lr_at
from gpt2repro.train.stopping import StopRequest
from gpt2repro.train.telemetry import Telemetry
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from train_accelerate import agree, forward_backward, step_all, zero_grad_all


def main() -> None:
    args = parse_arguments()

    B, T = args.batch_size, args.sequence_length
    folder = tempfile.TemporaryDirectory()
    recipe = Recipe(
        output_dir=folder.name, global_batch_tokens=B * T, micro_batch_size=B, sequence_length=T, max_steps=10**6
    )
    accelerator = Accelerator(mixed_precision=args.precision)
    torch.set_float32_matmul_precision("high")
    raw_model = GPT2ReproForCausalLM(GPT2ReproConfig())
    raw_optimizers = build_optimizers(raw_model, recipe)
    model, *optimizers = accelerator.prepare(raw_model, *raw_optimizers)
    raw_forward = type(raw_model).forward.__get__(raw_model)  # without Accelerate's autocast around it
    telemetry, guard, stop = Telemetry(recipe, accelerator, raw_model), Guard(recipe), StopRequest(recipe.max_hours)
    stream = iter(lambda: torch.randint(0, 50_257, (B, T + 1)), None)  # token ids do not matter for the speed
    model.train()

    def ours(step: int) -> None:
        lr = set_lr(optimizers, lr_at(step, recipe))
        loss, norm = forward_backward(accelerator, model, [next(stream)], recipe, step)
        loss, _ = agree(accelerator, loss, stop)
        if guard.accepts(step, loss, norm, accelerator.scaler):
            with telemetry.measuring_update(step):
                step_all(optimizers)
        zero_grad_all(optimizers)
        telemetry.log_step(step + 1, loss, lr, norm, guard)

    def bare(step: int) -> None:
        tokens = next(stream).to(accelerator.device)
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = raw_forward(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(raw_model.parameters(), recipe.max_grad_norm)
        raw_optimizers[0].step()
        raw_optimizers[0].zero_grad()
        loss.item()  # which a loop that shows its loss waits for

    seconds: dict = {ours: [], bare: []}
    for step in range(1, args.steps + 3):  # from 1: the size of the update is measured at step 0, 100, ...
        for loop in (ours, bare) if step % 2 else (bare, ours):
            began = time.perf_counter()
            loop(step)
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            if step > 2:
                seconds[loop].append(time.perf_counter() - began)
    medians = {loop.__name__: statistics.median(measured) for loop, measured in seconds.items()}
    began = time.perf_counter()
    with telemetry.measuring_update(0):
        pass
    every_hundredth = time.perf_counter() - began
    overhead = medians["ours"] / medians["bare"] - 1 + every_hundredth / 100 / medians["bare"]

    tokenizer = build_tokenizer("gpt2", []).fast
    checkpoints = Checkpoints(recipe, accelerator, raw_model, raw_optimizers, tokenizer, telemetry.say)
    saves = [save_once(checkpoints, number, lambda: ours(1)) for number in range(1, args.saves + 1)]
    saves = {name: statistics.median(save[name] for save in saves) for name in saves[0]}
    report = {
        "date": str(datetime.date.today()),
        "device": device_name(accelerator.device),
        "versions": provenance(),
        "settings": {"batch_size": B, "sequence_length": T, "precision": args.precision, "steps": args.steps},
        "seconds": {loop.__name__: measured for loop, measured in seconds.items()},
        "median_seconds": medians,
        "seconds of the update ratio, every 100 steps": every_hundredth,
        "overhead": overhead,
        "medians of the saves": saves,
    }
    ratio = every_hundredth / 100 / medians["bare"]
    print(
        f"ours {medians['ours']:.4f} s, bare {medians['bare']:.4f} s a step: {overhead:.2%} more, of which the ratio of"
    )
    print(f"update to weights, {every_hundredth:.3f} s every 100 steps, is {ratio:.2%}")
    print("a checkpoint: " + ", ".join(f"{name} {value:.2f}" for name, value in saves.items()))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=2, help="sequences a step (default: %(default)s)")
    parser.add_argument("--sequence_length", type=int, default=256, help="tokens (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="of each loop (default: %(default)s)")
    parser.add_argument("--saves", type=int, default=3, help="checkpoints (default: %(default)s)")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="autocast; no is float32")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    return parser.parse_args()


def save_once(checkpoints: Checkpoints, number: int, step: Callable[[], None]) -> dict[str, float]:
    """Save a checkpoint while training goes on, and compare its steps with as many that are made in peace."""
    began = time.perf_counter()
    checkpoints.save({"step": number, "val_loss": None})
    stall = time.perf_counter() - began
    beside = 0
    while checkpoints.writer.is_alive():
        step()
        beside += 1
    written = time.perf_counter() - began
    checkpoints.wait()
    for _ in range(beside):
        step()
    peace = time.perf_counter() - began - written
    return {
        "seconds that training stands still": stall,
        "in steps": stall / (peace / beside),
        "seconds until it is written": written,
        "seconds that it costs in all": written - peace,
    }


if __name__ == "__main__":
    main()
