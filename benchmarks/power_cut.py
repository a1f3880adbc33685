"""Cut the power at random moments of a preparation, a training run and an export, and repeat the command: nothing
may be lost, the result must be that of an undisturbed run, and no repetition may end in a traceback.

    python benchmarks/power_cut.py --cuts 50            # needs root, and ext4 on a loop device

Each command works on an ext4 image. While it does, the image is copied again and again: a copy holds what had reached
the disk by then, as after a power loss. Later each copy is mounted, which replays its journal, and the command repeated
there.
"""

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.kill_resume import RECIPE
from benchmarks.killable import ROOT
from gpt2repro.errors import quiet_broken_pipe
from gpt2repro.train.metrics import without_clock


IMAGE_BYTES = 96 * 2**20


@dataclass
class Job:
    """A command that writes into a mounted disk.

    name: for the report.
    command: given the mount point, what to run.
    result: given the mount point, what must not depend on power cuts.
    done: what the command says, with exit code 2, if it finds its own finished result; None: it just succeeds.
    """

    name: str
    command: Callable[[Path], list]
    result: Callable[[Path], list[str]]
    done: str | None = None


def main() -> None:
    args = parse_arguments()
    rng = random.Random(args.seed)
    reports = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "recipe.yaml").write_text(RECIPE)
        run(prepare_into(root / "data"))
        run(train_into(root, root / "trained"))
        for job in jobs(root):
            copies, expected = cut(job, args.cuts, root, rng)
            outcomes = [repeat(job, image, expected, root) for image in copies]
            reports.append({"job": job.name, "cuts": len(copies)} | {name: outcomes.count(name) for name in OUTCOMES})
            print(json.dumps(reports[-1]), flush=True)
    if args.output:
        report = {"date": str(datetime.date.today()), "jobs": reports}
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(any(report["lost"] or report["different"] for report in reports))


OUTCOMES = ("equal", "lost", "different")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=50, help="power cuts of each command (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed for their moments (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    return parser.parse_args()


# ---- the commands ----


def jobs(root: Path) -> list[Job]:
    return [
        Job("preparation", lambda disk: prepare_into(disk / "data"), lambda disk: contents(disk / "data")),
        Job("training", lambda disk: train_into(root, disk / "run"), trained),
        Job(
            "export",
            lambda disk: publish_into(root, disk / "out"),
            lambda disk: contents(disk / "out"),
            "exists already",
        ),
    ]


def prepare_into(folder: Path) -> list:
    flags = ["--tokenizer", "bpe:512", "--shard_tokens", 200_000]
    return [ROOT / "prepare_data.py", "python-docs", "--output_dir", folder, *flags]


def train_into(root: Path, folder: Path) -> list:
    return [
        *("-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs" / "cpu.yaml"),
        *(ROOT / "train_accelerate.py", "--config", root / "recipe.yaml"),
        *("--data_dir", root / "data", "--output_dir", folder),
    ]


def publish_into(root: Path, folder: Path) -> list:
    return [ROOT / "publish.py", root / "trained", "--to", folder]


def contents(folder: Path) -> list[str]:
    """The name and hash of every file."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]


def trained(disk: Path) -> list[str]:
    """The exported weights, and the metrics without timings."""
    weights = [file for file in contents(disk / "run" / "model") if file.startswith("model.safetensors")]
    lines = (disk / "run" / "metrics.jsonl").read_text().splitlines()
    return weights + [json.dumps(without_clock(json.loads(line))) for line in lines]


def start(command: list) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # sums depend on the number of threads
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], env=environment, **pipes)


def run(command: list) -> tuple[int, str]:
    """The exit code, and what was printed on stderr."""
    process = start(command)
    _, stderr = process.communicate()
    return process.returncode, stderr


# ---- power cuts ----


def cut(job: Job, count: int, root: Path, rng: random.Random) -> tuple[list[Path], list[str]]:
    """Run the job once to know how long it takes; then run it again and copy its disk `count` times meanwhile, a few
    times also after its end, when not everything has reached the disk.

    Returns:
        The copies, and the result of the undisturbed run.
    """
    copies: list[Path] = []
    with mounted(new_image(root / "disk.img"), root / "disk") as disk:
        began = time.monotonic()
        code, stderr = run(job.command(disk))
        assert code == 0, stderr
        duration, expected = time.monotonic() - began, job.result(disk)
    with mounted(new_image(root / "disk.img"), root / "disk") as disk:
        process = start(job.command(disk))
        began = time.monotonic()
        for moment in sorted(rng.uniform(0, 1.1 * duration) for _ in range(count)):
            time.sleep(max(0.0, began + moment - time.monotonic()))
            copies.append(root / f"{job.name}_{len(copies)}.img")
            shutil.copyfile(root / "disk.img", copies[-1])
        process.communicate()
    return copies, expected


def repeat(job: Job, image: Path, expected: list[str], root: Path) -> str:
    """Repeat the command on a copy of its disk; returns one of OUTCOMES."""
    with mounted(image, root / "after") as disk:
        code, stderr = run(job.command(disk))
        was_done = job.done is not None and code == 2 and job.done in stderr
        if (code != 0 and not was_done) or "Traceback" in stderr:
            print(f"{image.name}: {stderr}", file=sys.stderr, flush=True)
            return "lost"
        found = job.result(disk)
        if found != expected:
            print(f"{image.name}: {sorted(set(expected) ^ set(found))}", file=sys.stderr, flush=True)
    image.unlink()
    return "equal" if found == expected else "different"


def new_image(path: Path) -> Path:
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    subprocess.run(["mkfs.ext4", "-q", path], check=True)
    return path


@contextlib.contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    """Mount an image; its metadata reaches the disk every second, as on a busy machine."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop,commit=1", image, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


if __name__ == "__main__":
    with quiet_broken_pipe():
        main()
