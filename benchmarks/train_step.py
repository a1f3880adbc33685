"""Our training step compared with GPT2LMHeadModel in plain PyTorch: same size, batch, precision and machine. With
--nanogpt also with nanoGPT's, whose model.py is given by its path.

    python benchmarks/train_step.py --device cpu
    python benchmarks/train_step.py --device cuda --batch_size 64 --sequence_length 1024 --precision bf16 --compile
    python benchmarks/train_step.py --device cpu --profile          # where our step's time goes

Each measurement runs in its own process, alternating between the variants, so that they share neither memory nor drifts
of the clock rate. The table shows medians over all measured steps; --output writes every measurement as JSON.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch._inductor.config as inductor_config
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from transformers import GPT2Config, GPT2LMHeadModel


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpt2repro.errors import quiet_broken_pipe
from gpt2repro.plan.sizes import flops_per_token
from gpt2repro.processes import keep_freed_memory
from gpt2repro.recipe import Recipe
from gpt2repro.train.optimizers import build_optimizers, set_lr
from gpt2repro.train.report import provenance
from gpt2repro.train.schedule import lr_at
from gpt2repro.train.speed import peak_flops
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from train_accelerate import forward_backward, step_all, zero_grad_all


VARIANTS = {
    "ours": "gpt2repro, Accelerate",
    "reference": "GPT2LMHeadModel, plain PyTorch",
    "nanogpt": "nanoGPT's model.py, its step",
}
# Where a step's time goes: the first part whose pattern matches an operator's name counts; the shapes of its inputs
# tell the head and the loss, whose matrices have a row for each token of the vocabulary, from the blocks.
PARTS = {
    "attention": r"scaled_dot_product|flash_attention|fmha",
    "optimizer and clipping": r"adam|_foreach|clip_grad|linalg_vector_norm",
    "GELU": r"gelu|tanh",
    "LayerNorm": r"layer_norm",
    "casts and copies": r"copy_|_to_copy|aten::cat",
}
PRODUCTS = r"::(mm|addmm|bmm|_?linear|_linear_pointwise)|gemm"


def main() -> None:
    args = parse_arguments()
    if args.variant:
        print(json.dumps(measure(args)))
        return
    if args.profile:
        report_profile(args, profile_step(args))
        return
    variants = [name for name in VARIANTS if name != "nanogpt" or args.nanogpt]
    runs: dict[str, list[dict]] = {name: [] for name in variants}
    for _ in range(args.rounds):
        for name in variants:
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    report(args, runs)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="autocast; no is float32")
    parser.add_argument("--batch_size", type=int, default=2, help="sequences per step")
    parser.add_argument("--sequence_length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_head", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--compile", action="store_true", help="torch.compile both models")
    parser.add_argument("--steps", type=int, default=6, help="measured steps per run")
    parser.add_argument("--warmup", type=int, default=2, help="unmeasured steps before them")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--nanogpt", metavar="PATH", help="measure nanoGPT, too: its model.py")
    parser.add_argument("--profile", action="store_true", help="print where our step's time goes instead")
    parser.add_argument("--output", help="write every measurement as JSON")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(args: argparse.Namespace) -> dict:
    """Milliseconds of each step, peak memory, and the FLOP/s that MFU is relative to."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    # A different batch for each step; the values of the tokens do not affect the speed.
    count = args.warmup + args.steps
    tokens = torch.randint(0, 50257, (count, args.batch_size, args.sequence_length + 1), device=args.device)
    build_step = {"ours": our_step, "reference": reference_step, "nanogpt": nanogpt_step}[args.variant]
    step, config, parameters = build_step(args, iter(tokens))
    milliseconds = []
    for i in range(count):
        if args.device == "cuda" and i == args.warmup:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        step(i)
        if args.device == "cuda":
            torch.cuda.synchronize()
        milliseconds.append((time.perf_counter() - began) * 1000)
    if args.device == "cuda":
        peak_memory = torch.cuda.max_memory_allocated()
    else:
        peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    known_peak = peak_flops(torch.device(args.device), args.precision)
    return {
        "milliseconds": milliseconds[args.warmup :],
        "peak_memory_bytes": peak_memory,
        "flops_per_token": flops_per_token(config, parameters, args.sequence_length),
        "peak_flops": known_peak or matmul_flops(args),
        "peak_source": "datasheet" if known_peak else "2048 x 2048 matrix products, same run",
    }


def our_step(args: argparse.Namespace, batches):
    """Build the trainer's step as train_accelerate.py does.

    Returns:
        The step, the model's configuration, and its number of parameters.
    """
    recipe = Recipe(
        output_dir=tempfile.mkdtemp(),
        global_batch_tokens=args.batch_size * args.sequence_length,
        micro_batch_size=args.batch_size,
        sequence_length=args.sequence_length,
    )
    accelerator = Accelerator(
        cpu=args.device == "cpu",
        mixed_precision=args.precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        dynamo_backend="inductor" if args.compile else None,
    )
    if args.device == "cpu":
        keep_freed_memory()
    sizes = {"n_layer": args.n_layer, "n_head": args.n_head, "n_embd": args.n_embd}
    raw_model = GPT2ReproForCausalLM(GPT2ReproConfig(**sizes))
    model, *optimizers = accelerator.prepare(raw_model, *build_optimizers(raw_model, recipe))
    model.train()

    def step(i: int) -> None:
        set_lr(optimizers, lr_at(i, recipe))
        forward_backward(accelerator, model, [next(batches)], recipe, i)
        step_all(optimizers)
        zero_grad_all(optimizers)

    return step, raw_model.config, raw_model.num_parameters()


def reference_step(args: argparse.Namespace, batches):
    """Build the step of a plain loop around transformers' GPT-2, with its own vocabulary, SDPA attention and loss.

    Returns:
        As our_step.
    """
    sizes = {"n_layer": args.n_layer, "n_head": args.n_head, "n_embd": args.n_embd}
    raw_model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, **sizes))
    raw_model.to(args.device).train()
    model = torch.compile(raw_model) if args.compile else raw_model
    optimizer = torch.optim.AdamW(raw_model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(i: int) -> None:
        tokens = next(batches)[:, :-1].contiguous()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(raw_model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, raw_model.config, raw_model.num_parameters()


def nanogpt_step(args: argparse.Namespace, batches):
    """Build nanoGPT's step (its train.py): autocast around the model, which has 50,304 rows, its own configuration of
    AdamW, and clipping.

    Returns:
        As our_step; parameters as nanoGPT counts them, plus the positions, which `flops_per_token` takes off.
    """
    spec = importlib.util.spec_from_file_location("nanogpt_model", args.nanogpt)
    nanogpt = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = nanogpt
    spec.loader.exec_module(nanogpt)
    sizes = {"n_layer": args.n_layer, "n_head": args.n_head, "n_embd": args.n_embd}
    raw_model = nanogpt.GPT(nanogpt.GPTConfig(block_size=1024, vocab_size=50304, dropout=0.0, bias=True, **sizes))
    raw_model.to(args.device).train()
    model = torch.compile(raw_model) if args.compile else raw_model
    optimizer = raw_model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), args.device)

    def step(i: int) -> None:
        tokens = next(batches)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            _, loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(raw_model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    config = GPT2ReproConfig(**sizes)
    return step, config, raw_model.get_num_params(non_embedding=False)


def profile_step(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds that each part of our step takes, by torch's profiler."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    inductor_config.cpp.enable_kernel_profile = True  # compiled kernels appear under their names
    count = args.warmup + args.steps
    tokens = torch.randint(0, 50257, (count, args.batch_size, args.sequence_length + 1), device=args.device)
    step, config, _ = our_step(args, iter(tokens))
    for i in range(args.warmup):
        step(i)
    with torch.profiler.profile(record_shapes=True) as profiler:
        for i in range(args.warmup, count):
            step(i)
        if args.device == "cuda":
            torch.cuda.synchronize()
    milliseconds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages(group_by_input_shape=True):
        microseconds = event.self_device_time_total if args.device == "cuda" else event.self_cpu_time_total
        milliseconds[part_of(event, config.vocab_size)] += microseconds / 1000 / args.steps
    return dict(sorted(milliseconds.items(), key=lambda item: -item[1]))


def part_of(event, vocab_size: int) -> str:
    """The row of the profile that an operator or compiled kernel belongs to."""
    is_of_vocabulary = str(vocab_size) in str(event.input_shapes)
    if re.search(PRODUCTS, event.key):
        return "products of the head" if is_of_vocabulary else "products of the blocks"
    is_loss = "CrossEntropy" in event.key or "softmax" in event.key or "scatter" in event.key
    if is_loss or is_of_vocabulary:
        return "loss beside its products, embedding"
    for part, pattern in PARTS.items():
        if re.search(pattern, event.key, re.IGNORECASE):
            return part
    return "compiled kernels" if "fused" in event.key else "rest"


def report_profile(args: argparse.Namespace, milliseconds: dict[str, float]) -> None:
    """Print the profile's table, and write --output."""
    total = sum(milliseconds.values())
    print(f"{describe(args)}; torch {torch.__version__}\n")
    print("| part of a training step | ms | share |\n| --- | ---: | ---: |")
    for part, ms in milliseconds.items():
        print(f"| {part} | {ms:,.0f} | {ms / total:.1%} |")
    print(f"| all | {total:,.0f} | |")
    if args.output:
        Path(args.output).write_text(json.dumps({"settings": settings(args), "milliseconds": milliseconds}, indent=2))


def describe(args: argparse.Namespace) -> str:
    """Size and precision, in words."""
    precision = "bf16 autocast" if args.precision == "bf16" else "float32"
    if args.compile:
        precision += ", compiled"
    return f"{args.n_layer} layers, width {args.n_embd}, B={args.batch_size}, T={args.sequence_length}, {precision}"


def settings(args: argparse.Namespace) -> dict:
    return {name: value for name, value in vars(args).items() if name not in ("variant", "output", "nanogpt")}


def matmul_flops(args: argparse.Namespace) -> float:
    """Measured FLOP/s of large square matrix products: the peak that MFU is relative to if no datasheet is known."""
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    a, b = torch.randn(2, 2048, 2048, device=args.device).to(dtype)
    rates = []
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        if args.device == "cuda":
            torch.cuda.synchronize()
        rates.append(2 * 2048**3 / (time.perf_counter() - began))
    return statistics.median(rates)


def report(args: argparse.Namespace, runs: dict[str, list[dict]]) -> None:
    """Print the table, and write --output."""
    tokens = args.batch_size * args.sequence_length
    peak = statistics.median(run["peak_flops"] for measured in runs.values() for run in measured)
    results = {}
    for name, measured in runs.items():
        milliseconds = statistics.median(ms for run in measured for ms in run["milliseconds"])
        rate = tokens / milliseconds * 1000
        results[name] = {
            "milliseconds": milliseconds,
            "tokens_per_second": rate,
            "mfu": rate * measured[0]["flops_per_token"] / peak,
            "peak_memory_bytes": statistics.median(run["peak_memory_bytes"] for run in measured),
        }
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} x {processor_name()}"
    header = {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "versions": provenance(),
        "settings": settings(args),
        "peak_flops": peak,
        "peak_source": runs["ours"][0]["peak_source"],
    }
    print(f"{describe(args)}; {device}; torch {torch.__version__}; {header['date']}")
    print(f"MFU against {peak / 1e12:.2f} TFLOP/s ({header['peak_source']})\n")
    print("| training step | ms per step | tokens/s | MFU | peak memory, MiB |\n| --- | ---: | ---: | ---: | ---: |")
    for name, row in results.items():
        print(
            f"| {VARIANTS[name]} | {row['milliseconds']:,.1f} | {row['tokens_per_second']:,.0f} | {row['mfu']:.1%} "
            f"| {row['peak_memory_bytes'] / 2**20:,.0f} |"
        )
    ours = results["ours"]
    for name in list(results)[1:]:
        times, memory = (results[name][key] / ours[key] for key in ("milliseconds", "peak_memory_bytes"))
        print(f"| ratio, {name} / ours | {times:.2f} | | | {memory:.2f} |")
    if args.output:
        Path(args.output).write_text(json.dumps(header | {"results": results, "runs": runs}, indent=2) + "\n")


def processor_name() -> str:
    """From /proc/cpuinfo, or else the architecture."""
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(": ")[1].strip()
    return platform.machine()


if __name__ == "__main__":
    with quiet_broken_pipe():
        main()
