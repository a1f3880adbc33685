"""How long a command takes to answer, and where the seconds go from the launch of a run to its first step.

    python benchmarks/startup.py --data_dir data/python-docs

The first table has every script: its --help, and a mistake in its flags. The second follows the demo, started with
`accelerate launch`, through the parts of train_accelerate.py up to the end of its first optimizer step; the third says
which packages the seconds of importing belong to. All are medians; every command is a process of its own.
"""

import argparse
import contextlib
import datetime
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn


BEGAN = time.time()  # the launcher's part ends here
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
DOORS = {  # script -> a mistake in its flags
    "train_accelerate.py": ["--max_step", "3"],
    "prepare_data.py": ["python-docs"],
    "eval_hellaswag.py": ["./no-model"],
    "scorecard.py": ["./no-model"],
    "sample.py": ["./no-model"],
    "publish.py": ["./no-model"],
    "-m gpt2repro.plot": ["./no-run"],
    "-m gpt2repro.report": ["./no-run"],
    "-m gpt2repro.planner": ["./no-recipe.yaml"],
}
STARTED = "STARTUP_BENCHMARK_BEGAN"  # environment variable: when `accelerate launch` was started
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml")]
FUNCTIONS = {  # of train_accelerate.py, in the order of its main -> what they do
    "resolve_and_check": "recipe, data, tokenizer and model's configuration",
    "build_accelerator": "Accelerator",
    "load_hellaswag": "HellaSwag's items",
    "build_model": "model",
    "build_optimizers": "optimizers",
    "wrap": "accelerate's wrappers",
    "begin_run": "data verified, recipe.yaml",
    "rehearse_export": "export rehearsed",
    "Telemetry": "telemetry",
    "Batches": "batches",
    "forward_backward": "first step: forward and backward pass",
    "step_all": "first step: optimizer",
}
SHOWN_PACKAGES = 8


def main() -> None:
    args, _ = parse_arguments().parse_known_args()
    if STARTED in os.environ:
        follow_run()
    doors = measure_doors(args.rounds)
    print_table("seconds to answer", ["--help", "a mistake"], doors)
    launches = [launch_once(args) for _ in range(args.rounds)]
    parts = {name: statistics.median(launch.get(name, 0.0) for launch in launches) for name in launches[0]}
    total = statistics.median(sum(launch.values()) for launch in launches)
    print_table("from launch to first step", ["seconds"], {name: [seconds] for name, seconds in parts.items()})
    print(f"{'total':44}{total:10.2f}")
    packages = imports_by_package()
    print_table("of the imports", ["seconds"], {name: [seconds] for name, seconds in packages.items()})
    if args.output:
        write_report(args, doors, launches, packages)


def parse_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data/python-docs", help="the demo's data (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="processes for each median (default: %(default)s)")
    parser.add_argument("--output", help="write every measurement as JSON")
    return parser


# ---- scripts ----


def measure_doors(rounds: int) -> dict[str, list[float]]:
    """Median seconds of each script's --help and of a mistake in its flags."""
    seconds: dict[str, list[list[float]]] = {door: [[], []] for door in DOORS}
    for _ in range(rounds):
        for door, mistake in DOORS.items():
            for kind, flags in enumerate((["--help"], mistake)):
                began = time.perf_counter()
                done = subprocess.run([sys.executable, *door.split(), *flags], cwd=ROOT, capture_output=True)
                seconds[door][kind].append(time.perf_counter() - began)
                assert done.returncode == (2 if kind else 0), done.stderr.decode()
    return {door: [statistics.median(kind) for kind in kinds] for door, kinds in seconds.items()}


# ---- a run ----


def launch_once(args: argparse.Namespace) -> dict[str, float]:
    """Launch the demo; the seconds of each part until its first step is done."""
    with tempfile.TemporaryDirectory() as scratch:
        flags = ["--config", "recipes/demo.yaml", "--data_dir", args.data_dir, "--output_dir", f"{scratch}/run"]
        command = [sys.executable, *LAUNCH, __file__, *flags]
        environment = os.environ | {STARTED: str(time.time())}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def follow_run() -> NoReturn:
    """What the launched process does: run train_accelerate.py with a clock around its parts, print them, and end."""
    seconds = {"accelerate launch": BEGAN - float(os.environ[STARTED])}
    with clocked(seconds, "flags and recipe checked"):
        from gpt2repro.errors import check_before_imports, run_script
        from gpt2repro.train.command_line import check_command_line

        check_before_imports(check_command_line)
    with clocked(seconds, "imports"):
        import train_accelerate
        from gpt2repro.train.run_state import RunState
    for name, what in FUNCTIONS.items():
        setattr(train_accelerate, name, with_clock(seconds, what, getattr(train_accelerate, name)))

    def end(run: RunState) -> NoReturn:
        seconds["the rest"] = time.time() - float(os.environ[STARTED]) - sum(seconds.values())
        print(json.dumps(seconds), flush=True)
        os._exit(0)

    RunState.advance = end  # type: ignore[method-assign]
    run_script(train_accelerate.main)
    raise AssertionError("the run ended without a step")


def with_clock(seconds: dict[str, float], what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def clocked_function(*args, **kwargs):
        with clocked(seconds, what):
            return function(*args, **kwargs)

    return clocked_function


@contextlib.contextmanager
def clocked(seconds: dict[str, float], what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - began


def imports_by_package() -> dict[str, float]:
    """Seconds that the modules of each package took by themselves when train_accelerate.py was imported."""
    command = [sys.executable, "-X", "importtime", "-c", "import gc; gc.disable(); import train_accelerate"]
    log = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr
    seconds: Counter[str] = Counter()
    for microseconds, module in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", log):
        seconds[module.split(".")[0]] += int(microseconds) / 1e6
    largest = dict(seconds.most_common(SHOWN_PACKAGES))
    return largest | {"others": sum(seconds.values()) - sum(largest.values())}


# ---- output ----


def print_table(title: str, columns: list[str], rows: dict[str, list[float]]) -> None:
    print(f"\n{title:44}" + "".join(f"{column:>10}" for column in columns))
    for name, values in rows.items():
        print(f"{name:44}" + "".join(f"{value:10.2f}" for value in values))


def write_report(args: argparse.Namespace, doors: dict, launches: list[dict], packages: dict) -> None:
    from gpt2repro.train.report import provenance

    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": provenance(),
        "rounds": args.rounds,
        "doors": {door: dict(zip(("help", "mistake"), seconds)) for door, seconds in doors.items()},
        "launches": launches,
        "imports": packages,
    }
    Path(args.output).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    from gpt2repro.errors import quiet_broken_pipe  # not before the clock runs

    with quiet_broken_pipe():
        main()
