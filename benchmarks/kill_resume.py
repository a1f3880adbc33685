"""Kill a training run at random moments, start it again with the same command, and compare it with one that nobody
disturbed: the weights bit by bit, metrics.jsonl row by row.

    python benchmarks/kill_resume.py --kills 50
    python benchmarks/kill_resume.py --kills 50 --num_processes 2

A small GPT-2 learns the text that every CPython carries, with dropout, and saves every third step. SIGKILL goes to the
launcher and all its processes at once, at a moment drawn from the whole life of the run: half of the kills fall while a
checkpoint is being written, if there are such moments to be had.
"""

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpt2repro.train.metrics import CLOCK_KEYS


ROOT = Path(__file__).resolve().parents[1]
RECIPE = """
max_steps: 60
warmup_steps: 5
global_batch_tokens: 1024
micro_batch_size: 4
sequence_length: 64
learning_rate: 4e-3
log_every: 2
validate_every: 15
validation_tokens: 2048
sample_every: 30
sample_tokens: 8
checkpoint_every: 3
num_workers: 1
model: {n_layer: 2, n_head: 2, n_embd: 128, n_positions: 64, resid_pdrop: 0.1, embd_pdrop: 0.1, attn_pdrop: 0.1}
"""


def main() -> None:
    args = parse_arguments()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "recipe.yaml").write_text(RECIPE)
        prepare = [sys.executable, ROOT / "prepare_data.py", "python-docs", "--output_dir", root / "data"]
        subprocess.run([*prepare, "--tokenizer", "bpe:512"], check=True, capture_output=True)
        undisturbed = Run(root, "undisturbed", args.num_processes)
        began = time.monotonic()
        undisturbed.start()
        assert undisturbed.wait() == 0, undisturbed.printed()
        life = time.monotonic() - began
        expected = undisturbed.result()

        kills, in_saving, lost, different, runs = 0, 0, 0, 0, 0
        while kills < args.kills:
            run = Run(root, f"killed_{runs}", args.num_processes)
            runs += 1
            while True:
                run.start()
                saving = rng.random() < 0.5
                moment = rng.uniform(0, life)
                if kills == args.kills or not run.alive_at(moment, saving):
                    break
                run.kill()
                kills += 1
                in_saving += run.is_saving()
                print(f"kill {kills}: {run.newest()}", file=sys.stderr, flush=True)
            status = run.wait()
            lost += status != 0
            different += status == 0 and run.result() != expected
            if status:
                print(run.printed(), file=sys.stderr)
        report = {
            "date": str(datetime.date.today()),
            "processes": args.num_processes,
            "runs": runs,
            "kills": kills,
            "kills while a checkpoint was being written": in_saving,
            "lost runs": lost,
            "runs with other weights or other rows": different,
            "rows of metrics.jsonl": len(expected[1]),
        }
    print(json.dumps(report, indent=2))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(bool(lost or different))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all (default: %(default)s)")
    parser.add_argument("--num_processes", type=int, default=1, help="of the run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    return parser.parse_args()


class Run:
    """A training run in an output directory of its own, started as often as need be."""

    def __init__(self, root: Path, name: str, num_processes: int):
        config = "multi_cpu" if num_processes > 1 else "cpu"
        self.output_dir, self.log = root / name, root / f"{name}.log"
        self.command = [sys.executable, "-m", "accelerate.commands.launch"]
        self.command += ["--config_file", ROOT / "accelerate_configs" / f"{config}.yaml"]
        self.command += ["--num_processes", str(num_processes), ROOT / "train_accelerate.py"]
        self.command += ["--config", root / "recipe.yaml", "--data_dir", root / "data", "--output_dir", self.output_dir]

    def start(self) -> None:
        self.stale = self.unfinished()  # which the run sweeps away when it saves
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=ROOT
            )

    def alive_at(self, moment: float, saving: bool) -> bool:
        """Wait so many seconds, and then, if `saving`, for a checkpoint that is being written; False: the run ended."""
        end = time.monotonic() + moment
        while time.monotonic() < end or (saving and not self.is_saving()):
            if self.process.poll() is not None:
                return False
            time.sleep(0 if saving else 0.01)
        return self.process.poll() is None

    def unfinished(self) -> set[tuple[str, int]]:
        """Half-written checkpoints, each with the time of the last change."""
        found = set()
        for path in self.output_dir.glob("checkpoints/writing_*"):
            with contextlib.suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_mtime_ns))
        return found

    def is_saving(self) -> bool:
        """Whether a checkpoint is half-written since the last start; after a kill, whether it came then."""
        return bool(self.unfinished() - self.stale)

    def kill(self) -> None:
        launcher = psutil.Process(self.process.pid)
        doomed = [launcher, *launcher.children(recursive=True)]  # torchrun gives each process a session of its own
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(doomed)

    def wait(self) -> int:
        return self.process.wait()

    def newest(self) -> str:
        return max((path.name for path in self.output_dir.glob("checkpoints/*")), default="no checkpoint yet")

    def printed(self) -> str:
        return self.log.read_text()

    def result(self) -> tuple[str, list[dict]]:
        """What must not depend on interruptions: the hash of the final weights, and the metrics without the clock."""
        weights = hashlib.sha256((self.output_dir / "model" / "model.safetensors").read_bytes()).hexdigest()
        rows = [json.loads(line) for line in (self.output_dir / "metrics.jsonl").read_text().splitlines()]
        return weights, [{key: value for key, value in row.items() if key not in CLOCK_KEYS} for row in rows]


if __name__ == "__main__":
    main()
