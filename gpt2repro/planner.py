"""What a recipe takes before it is started: memory, the micro-batch that fits, hours, dollars and kWh.

    python -m gpt2repro.planner recipes/gpt2-124m-fineweb-edu.yaml --gpu h100 --num_gpus 8 --dollars_per_hour 20
    python -m gpt2repro.planner recipes/gpt2-124m-fineweb-edu.yaml --gpu rtx4090           # one 24 GB card
    python -m gpt2repro.planner recipes/demo.yaml --gpu cpu                                # this machine, measured

Flags of train_accelerate.py override the recipe, e.g. --micro_batch_size 8 or --model.n_layer 24. Everything follows
from formulas (gpt2repro/plan/); of the speed, the share of the peak that is assumed (MFU) is named with its source.
"""

import argparse
import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any, get_args

import yaml

from gpt2repro.errors import Parser, UserError, refuse, run_script
from gpt2repro.evaluation.published import openai_model, openai_models
from gpt2repro.files import CHECKOUT
from gpt2repro.model_fields import model_defaults, model_fields
from gpt2repro.plan.cost import LINK_EFFICIENCY, Step, bill, step_time
from gpt2repro.plan.hardware import CPU, Device, devices
from gpt2repro.plan.memory import CPU_SHARE, Setup, Strategy, capacity, largest_micro_batch, peak_memory
from gpt2repro.plan.sizes import Sizes
from gpt2repro.recipe import Recipe
from gpt2repro.recipe_file import parse_recipe


DEMO = CHECKOUT / "recipes" / "demo.yaml"
MIB = 2**20
PLANNED = [key for key, device in devices().items() if device.has_bf16]
# Of accelerate_configs/, for one machine and for several.
CONFIGS = {"ddp": ("ddp_8gpu", "ddp_2node"), "fsdp2": ("fsdp2_8gpu",) * 2, "hsdp": ("fsdp2_8gpu", "hsdp_2node")}


def main(argv: list[str]) -> None:
    args, recipe = parse_arguments(argv)
    sizes = model_sizes(recipe)
    device = this_cpu(recipe, args.mixed_precision) if args.gpu == CPU else known_device(args, recipe)
    room = capacity(device.memory_mib) if args.gpu != CPU else float(device.memory_mib * MIB)
    recipe = planned_micro_batch(recipe, sizes, args, room)
    setups = {strategy: setup_of(recipe, args, strategy) for strategy in strategies(args)}

    print(f"{args.recipe} on {args.num_gpus} x {device.name}, mixed_precision={args.mixed_precision}\n")
    print(model_text(sizes, recipe))
    print(memory_table(sizes, setups, args, recipe, room))
    chosen = setups[args.strategy]
    fitting = proposal(sizes, chosen, sequences_per_gpu(recipe, args.num_gpus), room)
    if fitting is None:
        print(no_room(device, args))
        return
    step = step_time(sizes, fitting, device, args.gpus_per_machine, args.network_gbit)
    print(run_text(sizes, fitting, step, recipe, device, args))
    print(command_text(recipe, fitting, args))


# ---- what is asked for ----


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, Recipe]:
    """The planner's flags, and the recipe that the others describe."""
    parser = Parser(__doc__)
    parser.prog = "-m gpt2repro.planner"
    parser.usage = "python -m gpt2repro.planner [RECIPE] [--field value ...] [flags below]"
    parser.add_argument("--gpu", default="h100", choices=(*PLANNED, CPU), help="which (default: %(default)s)")
    parser.add_argument("--num_gpus", type=int, default=1, metavar="N", help="in all machines (default: %(default)s)")
    parser.add_argument("--gpus_per_machine", type=int, default=8, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--strategy", choices=get_args(Strategy), default="ddp", help="(default: %(default)s)")
    parser.add_argument("--mixed_precision", choices=("bf16", "no"), help="(default: bf16, on the CPU no)")
    parser.add_argument("--mfu", type=float, help="share of the peak FLOP/s that is reached (default: the GPU's own)")
    parser.add_argument(
        "--network_gbit", type=float, default=400.0, metavar="RATE", help="of each GPU's adapter (default: %(default)s)"
    )
    parser.add_argument("--config", dest="recipe", metavar="RECIPE", help="another way to name the recipe")
    args, rest = parser.parse_known_args(argv)
    if rest and not rest[0].startswith("-"):
        args.recipe = rest.pop(0)
    args.recipe = args.recipe or DEMO
    args.overrides = rest
    args.mixed_precision = args.mixed_precision or ("no" if args.gpu == CPU else "bf16")
    recipe, problems = parse_recipe(["--config", str(args.recipe), *rest], DEMO, model_fields())
    problems += argument_problems(args)
    refuse(problems or recipe.bound_problems() or batch_problems(recipe, args.num_gpus) + recipe.schedule_problems())
    return args, recipe


def argument_problems(args: argparse.Namespace) -> list[str]:
    at_least_one = {"num_gpus": args.num_gpus, "gpus_per_machine": args.gpus_per_machine}
    problems = [f"--{name} {value} must be at least 1" for name, value in at_least_one.items() if value < 1]
    if args.mfu is not None and not 0 < args.mfu <= 1:
        problems.append(f"--mfu {args.mfu} must be above 0 and at most 1, e.g. 0.4")
    if not args.network_gbit > 0:
        problems.append(f"--network_gbit {args.network_gbit} must be above 0")
    if args.num_gpus > args.gpus_per_machine >= 1 and args.num_gpus % args.gpus_per_machine:
        problems.append(f"--num_gpus {args.num_gpus} is not a multiple of --gpus_per_machine {args.gpus_per_machine}")
    return problems


def batch_problems(recipe: Recipe, num_gpus: int) -> list[str]:
    """The micro-batch is the planner's to choose, but a step must be whole sequences on every GPU."""
    unit = recipe.sequence_length * num_gpus
    if recipe.global_batch_tokens % unit == 0:
        return []
    nearest = max(1, round(recipe.global_batch_tokens / unit)) * unit
    return [
        f"global_batch_tokens={recipe.global_batch_tokens} is not a multiple of {recipe.sequence_length} x {num_gpus} "
        f"= {unit} (sequence_length x GPUs); use global_batch_tokens={nearest}, or another --num_gpus"
    ]


def model_sizes(recipe: Recipe) -> Sizes:
    """The sizes of the model that the recipe trains, as the trainer would build it.

    Raises:
        UserError: of init_from nothing is known without downloading it.
    """
    fields = model_defaults()
    fields |= vocabulary(recipe) | recipe.model if recipe.init_from == "scratch" else stored_fields(recipe)
    sizes = Sizes.of(fields | {name: value for name, value in recipe.model.items() if name.endswith("_pdrop")})
    known = dataclasses.asdict(sizes)
    too_small = [name for name, value in known.items() if name not in ("bias", "has_dropout") and value < 1]
    refuse([f"model.{name}={known[name]} must be at least 1" for name in too_small])
    return sizes


def stored_fields(recipe: Recipe) -> dict[str, Any]:
    """The configuration of the model to start from, with the positions that the run keeps of it."""
    init_from, folder = recipe.init_from, Path(recipe.init_from)
    openai = openai_model(init_from)
    if openai is not None:
        stored: dict[str, Any] = {"n_layer": openai.layers, "n_head": openai.heads, "n_embd": openai.width}
    else:
        config = folder / "model" if (folder / "model").is_dir() else folder
        try:
            stored = json.loads((config / "config.json").read_text())
            stored["n_embd"], stored["n_layer"], stored["n_head"]  # a GPT-2's names
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"init_from={init_from}: {config}/config.json is not one of a GPT-2; give a run or model folder, one "
                f"of {', '.join(openai_models())}, or the sizes as --init_from scratch --model.n_layer ..."
            ) from error
    return stored | {"n_positions": min(recipe.sequence_length, stored.get("n_positions", 1024))}


def vocabulary(recipe: Recipe) -> dict[str, int]:
    """That of the prepared data; nothing if there is none yet, which means GPT-2's."""
    prepared = [source for source in recipe.sources if (Path(source) / "manifest.json").is_file()]
    if not prepared:
        return {}
    from gpt2repro.data.manifest import Manifest
    from gpt2repro.data.tokenization import padded_vocab_size

    return {"vocab_size": padded_vocab_size(Manifest.read(prepared[0]).tokenizer.vocab_size)}


def known_device(args: argparse.Namespace, recipe: Recipe) -> Device:
    device = devices()[args.gpu]
    tf32 = device.tflops / 2  # on all of these GPUs half of bf16
    tflops = recipe.peak_tflops or (tf32 if args.mixed_precision == "no" else device.tflops)
    given = {} if args.mfu is None else {"mfu": args.mfu, "mfu_source": "--mfu"}
    return dataclasses.replace(device, tflops=tflops, **given)


def this_cpu(recipe: Recipe, mixed_precision: str) -> Device:
    """This machine: the memory that is free now, and the rate of large matrix products, measured unless peak_tflops
    gives it."""
    import psutil

    free_mib = psutil.virtual_memory().available // MIB
    tflops = recipe.peak_tflops or measured_tflops(mixed_precision)
    return Device(
        name=f"this CPU ({free_mib / 1024:.1f} GiB free, {tflops:.2f} TFLOP/s)",
        memory_mib=int(free_mib * CPU_SHARE),
        tflops=tflops,
        watts=0.0,
        source="measured",
        link="shared memory",
        link_gb_s=10.0,
        mfu=0.7,
        mfu_source="docs/training.md: 69 to 93% on two cores",
    )


def measured_tflops(mixed_precision: str) -> float:
    """Of the best of a few matrix products, with all of torch's threads."""
    import time

    import torch

    dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
    a, b = torch.randn(2, 1024, 1024).to(dtype)
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * 1024**3 / min(seconds) / 1e12


# ---- what follows ----


def strategies(args: argparse.Namespace) -> list[Strategy]:
    """What is asked for, and what differs here: one GPU shards nothing, one machine has nothing to replicate."""
    differ = 1 if args.num_gpus == 1 else 2 if args.num_gpus <= args.gpus_per_machine else 3
    shown = {*get_args(Strategy)[:differ], args.strategy}
    return [strategy for strategy in get_args(Strategy) if strategy in shown]


def sequences_per_gpu(recipe: Recipe, num_gpus: int) -> int:
    return recipe.global_batch_tokens // (recipe.sequence_length * num_gpus)


def planned_micro_batch(recipe: Recipe, sizes: Sizes, args: argparse.Namespace, room: float) -> Recipe:
    """The recipe with a number in place of `auto`: the largest that fits with --strategy, or 1."""
    if recipe.micro_batch_size != "auto":
        return recipe
    one = dataclasses.replace(recipe, micro_batch_size=1)
    setup = setup_of(one, args, args.strategy)
    fitting = largest_micro_batch(sizes, setup, sequences_per_gpu(recipe, args.num_gpus), room) or setup
    return dataclasses.replace(recipe, micro_batch_size=fitting.micro_batch_size)


def setup_of(recipe: Recipe, args: argparse.Namespace, strategy: Strategy) -> Setup:
    """The recipe's micro-batch under a strategy; as near as the batch allows."""
    sequences = sequences_per_gpu(recipe, args.num_gpus)
    size = min(recipe.sequences_per_micro_batch, sequences)
    shards = {"ddp": 1, "fsdp2": args.num_gpus, "hsdp": min(args.num_gpus, args.gpus_per_machine)}
    return Setup.of(
        recipe,
        micro_batch_size=size,
        accumulation=-(-sequences // size),
        strategy=strategy,
        num_gpus=args.num_gpus,
        shards=shards[strategy],
        half=args.mixed_precision == "bf16",
        device="cpu" if args.gpu == CPU else "cuda",
    )


def proposal(sizes: Sizes, setup: Setup, sequences: int, room: float) -> Setup | None:
    """The recipe's own setup if it fits; else the largest micro-batch, with gradient checkpointing if not one sequence
    fits without; None if nothing does."""
    is_whole = sequences % setup.micro_batch_size == 0
    if is_whole and peak_memory(sizes, setup).total <= room:
        return setup
    recomputing = dataclasses.replace(setup, gradient_checkpointing=True)
    return largest_micro_batch(sizes, setup, sequences, room) or largest_micro_batch(
        sizes, recomputing, sequences, room
    )


# ---- what is printed ----


def model_text(sizes: Sizes, recipe: Recipe) -> str:
    length, tokens = recipe.sequence_length, recipe.tokens_before(recipe.max_steps)
    flops, exact = sizes.flops_per_token(length, recipe.lora_rank), sizes.exact_flops_per_token(length)
    if recipe.lora_rank:
        return (
            f"model       {sizes.parameters:,} parameters, and {sizes.lora(recipe.lora_rank):,} of LoRA's, which are "
            f"trained\na token     {flops / 1e9:.3f} GFLOP for MFU\nin all      {tokens:,} tokens\n"
        )
    return (
        f"model       {sizes.n_layer} layers, {sizes.n_head} heads, width {sizes.n_embd}, {sizes.vocab_size:,} rows: "
        f"{sizes.parameters:,} parameters\n"
        f"a token     {flops / 1e9:.3f} GFLOP for MFU (6N + attention); {exact / 1e9:.3f} in matrix products\n"
        f"in all      {tokens:,} tokens, {flops * tokens:.2e} FLOP (6ND: {6 * sizes.parameters * tokens:.2e})\n"
    )


def memory_table(
    sizes: Sizes, setups: dict[Strategy, Setup], args: argparse.Namespace, recipe: Recipe, room: float
) -> str:
    peaks = {strategy: peak_memory(sizes, setup) for strategy, setup in setups.items()}
    parts = dict.fromkeys(part for peak in peaks.values() for part in peak.parts)
    size = next(iter(setups.values())).micro_batch_size
    rows = [
        [f"MiB on one GPU, {size} sequences", *peaks],
        *([part, *(f"{peak.parts.get(part, 0) / MIB:,.0f}" for peak in peaks.values())] for part in parts),
        ["peak", *(f"{peak.total / MIB:,.0f}" for peak in peaks.values())],
        ["which is at the", *(peak.moment for peak in peaks.values())],
    ]
    for recompute in (False, True):
        label = "largest micro-batch x accumulation" + (", recomputing" if recompute else "")
        fitting = [dataclasses.replace(setup, gradient_checkpointing=recompute) for setup in setups.values()]
        sequences = sequences_per_gpu(recipe, args.num_gpus)
        rows.append([label, *(fit_text(largest_micro_batch(sizes, setup, sequences, room)) for setup in fitting)])
    header, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([header, "| --- |" + " ---: |" * len(setups), *body, ""])


def fit_text(setup: Setup | None) -> str:
    return "none" if setup is None else f"{setup.micro_batch_size} x {setup.accumulation}"


def run_text(sizes: Sizes, setup: Setup, step: Step, recipe: Recipe, device: Device, args: argparse.Namespace) -> str:
    n = args.num_gpus
    validations = recipe.max_steps // recipe.validate_every + 1 if recipe.validate_every else 1
    price = bill(step, recipe.max_steps, validations * recipe.validation_tokens, n, device, recipe.dollars_per_hour)
    lines = [
        f"batch       {setup.micro_batch_size} sequences x {setup.sequence_length} tokens x {n} (GPUs) x "
        f"{setup.accumulation} (accumulation) = {recipe.global_batch_tokens:,} tokens",
        f"speed       {step.tokens_per_second:,.0f} tokens/s a GPU at {device.mfu:.1%} of {device.tflops:g} TFLOP/s "
        f"({device.mfu_source})",
        f"step        {step.seconds * 1000:,.0f} ms, {recipe.global_batch_tokens / step.seconds:,.0f} tokens/s in all",
    ]
    if n > 1:
        lines.append(network_text(step, device, args))
    dollars = "" if price.dollars is None else f", ${price.dollars:,.0f}"
    energy = f", {price.kwh:,.1f} kWh" if device.watts else ""
    lines.append(
        f"run         {price.hours:,.2f} hours{dollars}{energy}, validation included, HellaSwag and saving not"
    )
    return "\n".join(lines)


def network_text(step: Step, device: Device, args: argparse.Namespace) -> str:
    """What each GPU sends in a step, and whether that takes longer than what hides it."""
    sent = f"{step.link_bytes / 1e9:.2f} GB over {device.link} ({device.link_gb_s:g} GB/s)"
    if step.network_bytes:
        sent += f" and {step.network_bytes / 1e9:.2f} GB over the network ({args.network_gbit:g} Gbit/s)"
    hidden = "hidden by computation" if not step.exposed else f"{step.exposed * 1000:,.1f} ms of them not hidden"
    took = f"{step.communication * 1000:,.1f} ms at {LINK_EFFICIENCY:.0%} of the rate"
    return f"network     each GPU sends {sent} a step: {took}, {hidden}"


def command_text(recipe: Recipe, setup: Setup, args: argparse.Namespace) -> str:
    """The command that trains so, with the flags that were given and what the launcher's file says differently."""
    machines = -(-args.num_gpus // args.gpus_per_machine)
    config = CONFIGS[setup.strategy][machines > 1] if args.num_gpus > 1 else "single_gpu"
    if args.gpu == CPU:
        config = "cpu" if args.num_gpus == 1 else "multi_cpu"
    file = f"accelerate_configs/{config}.yaml"
    in_file = yaml.safe_load((CHECKOUT / file).read_text())
    in_file |= in_file.get("parallelism_config", {})
    asked = {"num_processes": args.num_gpus, "num_machines": machines, "mixed_precision": args.mixed_precision}
    if config == "hsdp_2node":
        asked["parallelism_config_dp_replicate_size"] = machines
        asked["parallelism_config_dp_shard_size"] = args.gpus_per_machine
    launch = [word for name, value in asked.items() if in_file[name] != value for word in (f"--{name}", str(value))]
    if machines > 1:
        launch += ["--machine_rank", "RANK", "--main_process_ip", "ADDRESS_OF_MACHINE_0"]
    train = ["--config", str(args.recipe), *args.overrides, "--micro_batch_size", str(setup.micro_batch_size)]
    if setup.gradient_checkpointing and not recipe.gradient_checkpointing:
        train += ["--gradient_checkpointing", "true"]
    return (
        f"\naccelerate launch {shlex.join(['--config_file', file, *launch])} \\\n"
        f"    train_accelerate.py {shlex.join(train)}"
    )


def no_room(device: Device, args: argparse.Namespace) -> str:
    other = "more memory" if args.strategy == "fsdp2" else "--strategy fsdp2 with more GPUs, or more memory"
    return (
        f"does not fit on {device.name} even with one sequence and gradient checkpointing; it needs {other}, or "
        "accelerate_configs/fsdp2_offload_8gpu.yaml, which is slow"
    )


if __name__ == "__main__":
    run_script(main)
