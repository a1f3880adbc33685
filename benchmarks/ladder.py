"""The speed-ups of a GPT-2 training step, one after the other: the ladder of Karpathy's lecture with our own trainer.

    python benchmarks/ladder.py                       # GPT-2 124M; on a GPU with the lecture's batch
    python benchmarks/ladder.py --tiny                # a small model, seconds a row: does it still run?
    python benchmarks/ladder.py --output_dir results  # also ladder_cpu.json and ladder_cpu.png there

Every rung keeps the switches of those below it and is a process of its own: the trainer's model, optimizer and step on
the same real text, Python's documentation, from the same weights. Beside the time stands the loss after the same number
of steps, so that a rung which buys speed with correctness shows: it is marked where it is further than TOLERANCE from
the first rung's.

Source of the lecture's figures: "Let's reproduce GPT-2 (124M)", on an A100 with B=16, T=1024.
"""

import argparse
import dataclasses
import datetime
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import modeling_gpt2repro
from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.errors import quiet_broken_pipe
from gpt2repro.files import write_bytes, write_json
from gpt2repro.plan.sizes import flops_per_token
from gpt2repro.prepare.built_in import python_docs
from gpt2repro.processes import device_name
from gpt2repro.recipe import Recipe
from gpt2repro.show.pictures import INK, PAPER, RUN_COLORS
from gpt2repro.train.attention import TrainingAttention
from gpt2repro.train.optimizers import build_optimizers
from gpt2repro.train.report import provenance
from gpt2repro.train.speed import peak_flops
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from train_accelerate import forward_backward, step_all, zero_grad_all


VOCABULARY, PADDED_VOCABULARY = 50_257, 50_304
TOLERANCE = 0.02  # nats by which the loss of a rung may differ from the first rung's: bf16 rounds differently
DEFAULTS = {  # sequences a step, tokens a sequence, steps a process
    "tiny": (2, 64, 4),
    "cpu": (1, 256, 6),
    "cuda": (16, 1024, 30),
}
WARMUP = 2  # steps of each process that are not timed: compiling, first use of kernels


@dataclass(frozen=True)
class Switches:
    """How a step is computed; the defaults are the lecture's first version.

    matmul_precision: of float32, "highest" or "high", which is TF32 on a GPU.
    attention: as in a recipe.
    """

    matmul_precision: str = "highest"
    mixed_precision: str = "no"
    compile: bool = False
    attention: str = "eager"
    vocab_size: int = VOCABULARY
    fused_adamw: bool = False
    fused_loss: bool = False


@dataclass(frozen=True)
class Rung:
    """One more switch.

    lecture_ms: milliseconds of a step there; None: the lecture does not have it.
    capability: of CUDA that it needs; None: it applies to every device.
    """

    name: str
    switch: dict[str, Any]
    lecture_ms: float | None = None
    capability: tuple[int, int] | None = None


RUNGS = (
    Rung("float32", {}, 1000),
    Rung("TF32", {"matmul_precision": "high"}, 333, capability=(8, 0)),
    Rung("bf16 autocast", {"mixed_precision": "bf16"}, 300),
    Rung("torch.compile", {"compile": True}, 130),
    Rung("fused attention", {"attention": "sdpa"}, 96),
    Rung("vocabulary 50,304", {"vocab_size": PADDED_VOCABULARY}, 93),
    Rung("fused AdamW", {"fused_adamw": True}, 90),
    Rung("fused loss", {"fused_loss": True}),
    Rung("cuDNN attention", {"attention": "cudnn"}, capability=(9, 0)),
    Rung("fp8", {"mixed_precision": "fp8"}, capability=(8, 9)),
)


def main() -> None:
    args = parse_arguments()
    if args.rung is not None:
        print(json.dumps(measure(switches_of(args.rung), args)))
        return
    rows = []
    for number, rung in enumerate(RUNGS):
        if rung.capability and capability_of(args.device) < rung.capability:
            needed = ".".join(map(str, rung.capability))
            print(f"{rung.name} is left out: it needs a GPU of compute capability {needed}", file=sys.stderr)
            continue
        runs = [run_rung(number) for _ in range(args.rounds)]
        rows.append({"name": rung.name, "lecture_ms": rung.lecture_ms} | combined(runs))
        print(f"{rung.name}: {rows[-1]['milliseconds']:,.1f} ms", file=sys.stderr, flush=True)
    report = {
        "date": datetime.date.today().isoformat(),
        "device": device_name(torch.device(args.device)),
        "versions": provenance(),
        "settings": {name: value for name, value in vars(args).items() if name not in ("rung", "output_dir")},
        "tolerance_nats": TOLERANCE,
        "peak_flops": peak_of(args.device),
        "rungs": rows,
    }
    print(as_table(report))
    if args.output_dir:
        name = f"ladder_{args.device}"
        write_json(args.output_dir / f"{name}.json", report)
        write_bytes(args.output_dir / f"{name}.png", picture(report))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="2 layers of width 64, 2 x 64 tokens")
    parser.add_argument("--batch_size", type=int, help="sequences a step (default: 16, on a CPU 1)")
    parser.add_argument("--sequence_length", type=int, help="tokens a sequence (default: 1024, on a CPU 256)")
    parser.add_argument("--steps", type=int, help=f"of which {WARMUP} are not timed (default: 30, on a CPU 6)")
    parser.add_argument("--rounds", type=int, default=1, help="processes a rung; medians over all their steps")
    parser.add_argument("--output_dir", type=Path, help="folder for JSON and picture")
    parser.add_argument("--rung", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    names = ("batch_size", "sequence_length", "steps")
    for name, default in zip(names, DEFAULTS["tiny" if args.tiny else args.device]):
        if getattr(args, name) is None:
            setattr(args, name, default)
    return args


def switches_of(number: int) -> Switches:
    """All switches up to a rung."""
    switches = Switches()
    for rung in RUNGS[: number + 1]:
        switches = dataclasses.replace(switches, **rung.switch)
    return switches


def capability_of(device: str) -> tuple[int, int]:
    return torch.cuda.get_device_capability() if device == "cuda" else (0, 0)


def run_rung(number: int) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--rung", str(number)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def combined(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of several processes of the same rung; what they compute is the same."""
    milliseconds = statistics.median(ms for run in runs for ms in run["step_milliseconds"])
    return runs[0] | {
        "milliseconds": milliseconds,
        "tokens_per_second": runs[0]["tokens_per_step"] / milliseconds * 1000,
        "step_milliseconds": [run["step_milliseconds"] for run in runs],
        "peak_memory_bytes": statistics.median(run["peak_memory_bytes"] for run in runs),
    }


# ---- one rung ----


def measure(switches: Switches, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each step after the warm-up, peak memory, and the last step's loss."""
    torch.set_float32_matmul_precision(switches.matmul_precision)
    batches = text_batches(args)
    step, model = build_step(switches, args)
    milliseconds = []
    for number, batch in enumerate(batches):
        began = time.perf_counter()
        loss = step(batch, number)
        if args.device == "cuda":
            torch.cuda.synchronize()
        milliseconds.append((time.perf_counter() - began) * 1000)
    on_gpu = args.device == "cuda"
    return {
        "switches": dataclasses.asdict(switches),
        "step_milliseconds": milliseconds[WARMUP:],
        "tokens_per_step": args.batch_size * args.sequence_length,
        "flops_per_token": flops_per_token(model.config, model.num_parameters(), args.sequence_length),
        # Linux counts the memory of a process in KiB.
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else max_resident_kib() * 1024,
        "loss": float(loss),
    }


def max_resident_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def text_batches(args: argparse.Namespace) -> list[torch.Tensor]:
    """Consecutive pieces of Python's documentation, one for each step: (B, T + 1) int64."""
    per_step = args.batch_size * (args.sequence_length + 1)
    tokens: list[int] = []
    encode = build_tokenizer("gpt2", []).fast
    for text in python_docs():
        tokens += encode(text, verbose=False).input_ids
        if len(tokens) >= args.steps * per_step:
            break
    cut = torch.tensor(tokens[: args.steps * per_step])
    return list(cut.view(args.steps, args.batch_size, args.sequence_length + 1))


def build_step(
    switches: Switches, args: argparse.Namespace
) -> tuple[Callable[[torch.Tensor, int], torch.Tensor], GPT2ReproForCausalLM]:
    """The trainer's step with these switches, and its raw model."""
    recipe = Recipe(
        output_dir=tempfile.gettempdir(),
        micro_batch_size=args.batch_size,
        sequence_length=args.sequence_length,
        global_batch_tokens=args.batch_size * args.sequence_length,
        attention=switches.attention,
    )
    accelerator = Accelerator(
        cpu=args.device == "cpu",
        mixed_precision=switches.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        dynamo_backend="inductor" if switches.compile else None,
        kwargs_handlers=fp8_handlers(switches),
    )
    raw_model = build_model(switches, args)
    raw_optimizers = build_optimizers(raw_model, recipe)
    if not switches.fused_adamw:
        for group in raw_optimizers[0].param_groups:
            group["fused"] = False  # torch then chooses: a loop over tensors on a CPU, foreach on a GPU
    if not switches.fused_loss:
        modeling_gpt2repro.linear_cross_entropy = cross_entropy_of_all_logits
    attention = TrainingAttention(recipe, raw_model.config, accelerator)
    model, *optimizers = accelerator.prepare(raw_model, *raw_optimizers)
    model.train()

    def step(batch: torch.Tensor, number: int) -> torch.Tensor:
        with attention():
            loss, _ = forward_backward(accelerator, model, [batch], recipe, number)
        step_all(optimizers)
        zero_grad_all(optimizers)
        return loss

    return step, raw_model


def build_model(switches: Switches, args: argparse.Namespace) -> GPT2ReproForCausalLM:
    """GPT-2 124M, or a tiny one, with the same weights whatever the switches."""
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 64} if args.tiny else {}
    attention = "eager" if switches.attention == "eager" else "sdpa"
    torch.manual_seed(0)
    padded = GPT2ReproForCausalLM(GPT2ReproConfig(**sizes, attn_implementation=attention))
    if switches.vocab_size == PADDED_VOCABULARY:
        return padded
    config = GPT2ReproConfig(**sizes, attn_implementation=attention, vocab_size=switches.vocab_size)
    model = GPT2ReproForCausalLM(config)
    weights = padded.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = weights[name][: switches.vocab_size]
    model.load_state_dict(weights)
    return model


def cross_entropy_of_all_logits(hidden, weight, labels, unpadded_vocab_size, num_items_in_batch=None):
    """As the lecture computes it: all logits at once, in the precision of the products, then the loss in float32."""
    logits = F.linear(hidden, weight)[:, :unpadded_vocab_size]
    return F.cross_entropy(logits.float(), labels)


def fp8_handlers(switches: Switches) -> list[Any]:
    """accelerate's settings of fp8, as in accelerate_configs/single_gpu_fp8.yaml."""
    if switches.mixed_precision != "fp8":
        return []
    from accelerate.utils import AORecipeKwargs
    from torchao.float8 import Float8LinearConfig

    return [AORecipeKwargs(config=Float8LinearConfig(pad_inner_dim=True))]


# ---- what is shown ----


def peak_of(device: str) -> float:
    """FLOP/s that MFU is relative to, for every rung: the GPU's in bf16, else those of bf16 products measured here."""
    known = peak_flops(torch.device(device), "bf16")
    return known or measured_flops(device)


def measured_flops(device: str) -> float:
    a, b = torch.randn(2, 2048, 2048, device=device).bfloat16()
    rates = []
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        rates.append(2 * 2048**3 / (time.perf_counter() - began))
    return statistics.median(rates)


def as_table(report: dict[str, Any]) -> str:
    """Markdown."""
    settings = report["settings"]
    size = "a tiny model" if settings["tiny"] else "GPT-2 124M"
    lines = [
        f"{size}, B={settings['batch_size']}, T={settings['sequence_length']}; {report['device']}; torch "
        f"{report['versions']['torch']}; {report['date']}; MFU against {report['peak_flops'] / 1e12:.2f} TFLOP/s",
        "",
        "| rung | ms a step | tokens/s | MFU | peak memory, MiB | gain | lecture (A100), ms | gain there "
        f"| loss after {settings['steps']} steps |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    before: dict[str, Any] | None = None
    for row in report["rungs"]:
        mfu = row["tokens_per_second"] * row["flops_per_token"] / report["peak_flops"]
        gain = f"{before['milliseconds'] / row['milliseconds']:.2f}" if before else ""
        there = f"{row['lecture_ms']:,}" if row["lecture_ms"] else ""
        gain_there = f"{before['lecture_ms'] / row['lecture_ms']:.2f}" if before and row["lecture_ms"] else ""
        mark = "" if agrees(row, report) else " **departs**"
        lines.append(
            f"| {row['name']} | {row['milliseconds']:,.1f} | {row['tokens_per_second']:,.0f} | {mfu:.1%} "
            f"| {row['peak_memory_bytes'] / 2**20:,.0f} | {gain} | {there} | {gain_there} | {row['loss']:.4f}{mark} |"
        )
        before = row
    return "\n".join(lines)


def agrees(row: dict[str, Any], report: dict[str, Any]) -> bool:
    """Whether a rung's loss is the first rung's, up to rounding."""
    return abs(row["loss"] - report["rungs"][0]["loss"]) <= report["tolerance_nats"]


def picture(report: dict[str, Any]) -> bytes:
    """A bar for each rung, its tokens/s beside the gain over the first; a PNG in the style of a run's pictures."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = report["rungs"]
    rates = [row["tokens_per_second"] for row in rows]
    ours, departing = RUN_COLORS["light"][:2]
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        figure = Figure(figsize=(9, 0.45 * len(rows) + 1.6), layout="constrained", facecolor=PAPER["light"])
        axes = figure.subplots()
        colors = [ours if agrees(row, report) else departing for row in rows]
        bars = axes.barh([row["name"] for row in rows], rates, color=colors)
        labels = [f" {rate:,.0f}   {rate / rates[0]:.2f}x" for rate in rates]
        axes.bar_label(bars, labels, color=INK["light"])
        axes.invert_yaxis()
        axes.set_xlim(right=1.2 * max(rates))
        axes.set_xlabel("tokens/s, and times the first rung")
        settings = report["settings"]
        size = "a tiny model" if settings["tiny"] else "GPT-2 124M"
        axes.set_title(
            f"{size}, B={settings['batch_size']}, T={settings['sequence_length']}, {report['device']}", loc="left"
        )
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=120)
    return png.getvalue()


if __name__ == "__main__":
    with quiet_broken_pipe():
        main()
