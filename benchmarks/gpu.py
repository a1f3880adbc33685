"""Everything that a GPU has to show, in one command: tests, speed, memory. One Markdown page and its JSON.

    make gpu                                                         # at most 25 minutes on one H100 or H200
    python benchmarks/gpu.py --hellaswag_data hellaswag_val.jsonl    # for machines that cannot reach the Hub
    python benchmarks/gpu.py --parts step chunks                     # some of it
    python benchmarks/gpu.py --tiny                                  # on a CPU, in seconds: that it runs at all

Each part is a process with a time limit of its own, and the page is written anew after each: a run that is cut short
keeps what it has, and a part that fails or takes too long is a row that says so.
"""

import argparse
import contextlib
import datetime
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpt2repro.errors import Parser, refuse, run_script
from gpt2repro.files import CHECKOUT, write_json, write_problem, write_text


LLM_C = "llm.c publishes 468,000 tokens/s an H100 for the same step (140 ms on eight)."
SUMMARY_LINES = 40  # of a failed part's output that the page keeps


@dataclass(frozen=True)
class Part:
    """One process.

    minutes: its time limit.
    command: what Python runs, with words for the GPU; tiny: instead of them with --tiny; None: not run there.
    note: a sentence under the heading.
    """

    title: str
    minutes: float
    command: list[str]
    tiny: list[str] | None
    note: str = ""


STEP = ["benchmarks/train_step.py", "--device", "cuda", "--precision", "bf16", "--compile", "--batch_size", "32"]
STEP += ["--sequence_length", "1024", "--steps", "12", "--rounds", "2"]
TINY_STEP = ["benchmarks/train_step.py", "--device", "cpu", "--n_layer", "1", "--n_head", "1", "--n_embd", "64"]
TINY_STEP += ["--batch_size", "1", "--sequence_length", "16", "--steps", "1", "--warmup", "0", "--rounds", "1"]
PARTS = {
    "tests": Part(
        "Tests that need a GPU",
        8,
        ["-m", "pytest", "-n", "6", "--dist", "worksteal", "tests/test_gpu.py", "-p", "no:cacheprovider"],
        ["-m", "pytest", "tests/test_gpu.py", "-p", "no:cacheprovider"],
    ),
    "step": Part("Training step", 2.5, STEP, TINY_STEP, LLM_C),
    "ladder": Part(
        "The lecture's ladder",
        4,
        ["benchmarks/ladder.py", "--device", "cuda"],
        ["benchmarks/ladder.py", "--device", "cpu", "--tiny"],
    ),
    "attention": Part(
        "Attention backends",
        1.5,
        ["benchmarks/attention.py", "--device", "cuda", "--batch_size", "32"],
        ["benchmarks/attention.py", "--device", "cpu", "--batch_size", "1", "--sequence_length", "16", "--rounds", "2"],
    ),
    "chunks": Part(
        "Chunks of the loss",
        1.5,
        ["benchmarks/chunks.py", "--device", "cuda"],
        ["benchmarks/chunks.py", "--device", "cpu", "--tokens", "64", "--n_embd", "32", "--vocab_size", "128"],
    ),
    "memory": Part(
        "Memory and the largest micro-batch, beside the planner",
        3.5,
        ["benchmarks/planner.py", "--device", "cuda", "--fits"],
        ["benchmarks/planner.py", "--device", "cpu", "--tiny"],
    ),
    "hellaswag": Part(
        "HellaSwag, the full set",
        2.5,
        ["benchmarks/hellaswag.py", "--precision", "bf16", "--items", "10042", "--rounds", "1"],
        None,
    ),
    "generation": Part("Generation", 1.5, ["benchmarks/generation.py", "--device", "cuda"], None),
}


@dataclass
class Result:
    """What became of a part: "done", "failed", "timed out", "skipped" or "cut"; what ran, its output, and seconds."""

    name: str
    state: str
    command: str = ""
    output: str = ""
    seconds: float = 0.0


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    deadline = time.monotonic() + 60 * args.minutes
    machine = describe_machine(args.tiny)
    results: list[Result] = []
    for name in args.parts:
        part = PARTS[name]
        left = deadline - time.monotonic()
        print(f"{name}: {part.title} ...", flush=True)
        results.append(run_part(name, part, args, min(60 * part.minutes, left)))
        print(f"{name}: {results[-1].state}, {results[-1].seconds:.0f} s", flush=True)
        write_json(args.output.with_suffix(".json"), machine | {"parts": [asdict(result) for result in results]})
        write_text(args.output.with_suffix(".md"), page(machine, results))
    print(f"written to {args.output.with_suffix('.md')}")
    if args.tiny and any(result.state in ("failed", "timed out") for result in results):
        sys.exit(1)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=25, help="for all parts together (default: %(default)s)")
    parser.add_argument("--hellaswag_data", metavar="FILE", help="hellaswag_val.jsonl (default: from the Hub)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--output", type=Path, metavar="PREFIX", help="(default: benchmarks/results/gpu_DATE)")
    args = parser.parse_args(argv)
    if args.output is None:
        args.output = CHECKOUT / "benchmarks" / "results" / f"gpu_{datetime.datetime.now():%Y-%m-%d_%H%M}"
    problems = []
    if unwritable := write_problem(args.output.parent):
        problems.append(f"--output {args.output}: {unwritable}; choose another")
    if args.hellaswag_data and not Path(args.hellaswag_data).is_file():
        problems.append(f"--hellaswag_data {args.hellaswag_data} is not a file; give hellaswag_val.jsonl")
    if not args.tiny and not has_gpu():
        problems.append("this machine has no GPU that torch can use; --tiny runs the same parts on the CPU")
    refuse(problems)
    return args


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# ---- one part ----


def run_part(name: str, part: Part, args: argparse.Namespace, limit: float) -> Result:
    """Run it, and wait no longer than `limit` seconds; its processes are gone when this returns."""
    words = part.tiny if args.tiny else part.command
    if words is None:
        return Result(name, "skipped", output="--tiny has no size for it")
    script = next(word for word in words if word.endswith(".py"))
    if not (CHECKOUT / script).exists():
        return Result(name, "skipped", output=f"there is no {script} in this checkout")
    if limit <= 0:
        return Result(name, "cut", output="no time was left")
    if name == "hellaswag" and args.hellaswag_data:
        words = [*words, "--data", args.hellaswag_data]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=CHECKOUT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            state = "failed" if process.wait(limit) else "done"
        except subprocess.TimeoutExpired:
            state = "timed out"
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it started, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read()
    plain = re.sub(r"\x1b\[[\d;]*m|.*\r", "", text)  # without colours and progress bars
    return Result(name, state, f"python {shlex.join(words)}", plain, time.monotonic() - began)


# ---- the page ----


def describe_machine(tiny: bool) -> dict:
    import torch

    from gpt2repro.train.report import provenance

    device = torch.cuda.get_device_name() if has_gpu() and not tiny else "CPU"
    return {"date": datetime.date.today().isoformat(), "device": device, "versions": provenance()}


def page(machine: dict, results: list[Result]) -> str:
    """The Markdown page: the machine, a row for each part, and of each part what it printed for a page."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    rows = [f"| {PARTS[result.name].title} | {result.state} | {result.seconds:,.0f} |" for result in results]
    sections = [section(result) for result in results]
    table = ["| part | | seconds |", "| --- | --- | ---: |", *rows]
    return "\n".join([f"# {machine['device']}, {machine['date']}\n", f"{versions}\n", *table, "", *sections])


def section(result: Result) -> str:
    part = PARTS[result.name]
    lines = result.output.splitlines()
    kept = page_lines(lines) if result.state == "done" else ["```", *lines[-SUMMARY_LINES:], "```"]
    command = result.command and f"`{result.command}`"
    return "\n\n".join(filter(None, [f"## {part.title}", command, part.note, "\n".join(kept)])) + "\n"


def page_lines(lines: list[str]) -> list[str]:
    """Tables with the lines before them, and pytest's summary; without warnings and progress bars."""
    is_table = [line.startswith("|") for line in lines]
    kept = []
    for number, line in enumerate(lines):
        introduces = any(is_table[number + 1 : number + 3]) and not line.startswith((" ", "\t"))
        ends_tests = bool(re.search(r"\d+ (passed|skipped|failed)", line))
        if is_table[number] or introduces or ends_tests:
            kept.append(line)
    return kept


if __name__ == "__main__":
    run_script(main)
