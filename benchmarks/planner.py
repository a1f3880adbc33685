"""What the planner says of memory, beside what training steps hold.

    python benchmarks/planner.py                        # on the CPU: growth of the process, several sizes
    python benchmarks/planner.py --device cuda          # on a GPU: peak of torch's allocator
    python benchmarks/planner.py --device cuda --fits   # and the largest micro-batch of the four GPT-2s that trains

Each measurement runs in its own process: a step of a tiny model first, so that libraries are loaded, then two steps of
the measured one.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpt2repro.errors import quiet_broken_pipe
from gpt2repro.plan.memory import Setup, capacity, largest_micro_batch, peak_memory
from gpt2repro.plan.sizes import Sizes


ROWS = [  # layers, width, rows of the vocabulary, sequences, tokens, micro-batches, flags
    (12, 768, 50304, 2, 256, 1, ()),
    (12, 768, 50304, 4, 256, 2, ()),
    (12, 768, 50304, 4, 512, 1, ("half",)),
    (12, 768, 50304, 4, 512, 1, ("half", "compile")),
    (12, 768, 50304, 4, 512, 1, ("half", "gradient_checkpointing")),
    (12, 768, 2048, 8, 512, 1, ("half",)),
    (6, 384, 50304, 16, 256, 1, ()),
    (4, 192, 2048, 128, 128, 1, ()),
    (4, 192, 2048, 256, 128, 1, ("gradient_checkpointing",)),
]
TINY_ROWS = [(2, 256, 4096, 64, 64, 1, ())]
GPU_ROWS = [
    (12, 768, 50304, 32, 1024, 1, ("half", "compile")),
    (12, 768, 50304, 32, 1024, 1, ("half",)),
    (12, 768, 50304, 16, 1024, 2, ("half", "compile")),
    (12, 768, 50304, 16, 1024, 1, ("compile",)),
    (24, 1024, 50304, 32, 1024, 1, ("half", "gradient_checkpointing")),
]
GPT2 = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
OUT_OF_MEMORY = 3  # exit code
MIB = 2**20


def main() -> None:
    args = parse_arguments()
    if args.measure:
        return print(json.dumps(measure(args.device, *json.loads(args.measure))))
    rows = TINY_ROWS if args.tiny else GPU_ROWS if args.device == "cuda" else ROWS
    results = []
    print("| layers x width, vocabulary, micro-batch | planned, MiB | measured, MiB | planned / measured |")
    print("| --- | ---: | ---: | ---: |")
    for row in rows:
        planned = peak_memory(*described(args.device, *row)).total
        measured = measured_in_child(args.device, row)
        results.append({"row": row, "planned_bytes": planned, "measured_bytes": measured})
        print(f"| {label(*row)} | {planned / MIB:,.0f} | {mib(measured)} | {ratio(planned, measured)} |", flush=True)
    if args.fits:
        results += fits(args)
    if args.output:
        record = {"date": datetime.date.today().isoformat(), "device": args.device, "rows": results}
        args.output.write_text(json.dumps(record, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--fits", action="store_true", help="find the largest micro-batches of the four GPT-2s (cuda)")
    parser.add_argument("--tiny", action="store_true", help="one small model only")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def described(device, layers, width, vocab, sequences, tokens, micro_batches, flags) -> tuple[Sizes, Setup]:
    sizes = Sizes(vocab, tokens, width, layers, max(1, width // 64), 4 * width)
    choices = {flag: True for flag in flags if flag != "half"}
    return sizes, Setup(
        sequences, tokens, micro_batches, half="half" in flags, device=device, has_telemetry=False, **choices
    )


def label(layers, width, vocab, sequences, tokens, micro_batches, flags) -> str:
    precision = "bf16" if "half" in flags else "float32"
    more = [flag.replace("_", " ") for flag in flags if flag != "half"]
    accumulated = f" x {micro_batches}" if micro_batches > 1 else ""
    return f"{layers} x {width}, {vocab:,}, {sequences} x {tokens}{accumulated}, {', '.join([precision, *more])}"


def measured_in_child(device: str, row) -> float | None:
    """Bytes; None if the memory did not suffice."""
    command = [sys.executable, __file__, "--device", device, "--measure", json.dumps(row)]
    # glibc returns what is freed at once, so that the process holds what torch does
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode == OUT_OF_MEMORY:
        return None
    done.check_returncode()
    return json.loads(done.stdout.splitlines()[-1])


def mib(measured: float | None) -> str:
    return "out of memory" if measured is None else f"{measured / MIB:,.0f}"


def ratio(planned: float, measured: float | None) -> str:
    return "" if measured is None else f"{planned / measured:.2f}"


# ---- in the measuring process ----


def measure(device: str, layers, width, vocab, sequences, tokens, micro_batches, flags) -> float:
    """Bytes by which training the model makes the process grow; on a GPU the peak of torch's allocator."""
    import torch

    train(device, 1, 64, 128, 2, 32, 1, flags)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    try:
        train(device, layers, width, vocab, sequences, tokens, micro_batches, flags)
    except torch.OutOfMemoryError:
        sys.exit(OUT_OF_MEMORY)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    return peak - before


def resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def train(device: str, layers, width, vocab, sequences, tokens, micro_batches, flags, steps: int = 2) -> None:
    """Steps of the trainer."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import GradientAccumulationPlugin

    from gpt2repro.recipe import Recipe
    from gpt2repro.train.optimizers import build_optimizers
    from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
    from train_accelerate import forward_backward, step_all, zero_grad_all

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    recipe = Recipe(
        output_dir=tempfile.mkdtemp(),
        global_batch_tokens=micro_batches * sequences * tokens,
        micro_batch_size=sequences,
        sequence_length=tokens,
    )
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="bf16" if "half" in flags else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=micro_batches, sync_with_dataloader=False),
        dynamo_backend="inductor" if "compile" in flags else None,
    )
    sizes = {"n_layer": layers, "n_head": max(1, width // 64), "n_embd": width, "n_positions": tokens}
    raw_model = GPT2ReproForCausalLM(GPT2ReproConfig(vocab_size=vocab, **sizes))
    if "gradient_checkpointing" in flags:
        raw_model.gradient_checkpointing_enable()
    model, *optimizers = accelerator.prepare(raw_model, *build_optimizers(raw_model, recipe))
    model.train()
    batches = torch.randint(0, min(vocab, 50257), (steps, micro_batches, sequences, tokens + 1), device=device)
    for step, batch in enumerate(batches):
        forward_backward(accelerator, model, list(batch), recipe, step)
        step_all(optimizers)
        zero_grad_all(optimizers)


# ---- the largest micro-batch ----


def fits(args: argparse.Namespace) -> list[dict]:
    """For each GPT-2, bf16 and compiled: the largest power of two that is planned and the largest that trains."""
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory
    print(f"\n| bf16, T=1024, on {memory / MIB:,.0f} MiB | planned | trains |\n| --- | ---: | ---: |")
    results = []
    for name, (layers, _, width) in GPT2.items():
        sizes, setup = described(args.device, layers, width, 50304, 1, 1024, 1, ("half",))
        found = largest_micro_batch(sizes, setup, 512, capacity(memory // MIB))
        planned = found.micro_batch_size if found else 0
        size = planned or 1
        while size and measured_in_child(args.device, (layers, width, 50304, size, 1024, 1, ("half",))) is None:
            size //= 2
        if size == planned and planned < 512:
            more = measured_in_child(args.device, (layers, width, 50304, 2 * size, 1024, 1, ("half",)))
            size = size if more is None else 2 * size
        results.append({"model": name, "planned": planned, "trains": size})
        print(f"| {name} | {planned} | {size} |", flush=True)
    return results


if __name__ == "__main__":
    with quiet_broken_pipe():
        main()
