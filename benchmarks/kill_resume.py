"""Kill a training run at random moments, resume it with the same command, and compare the result with an uninterrupted
run: the weights bit for bit, metrics.jsonl row by row.

    python benchmarks/kill_resume.py --kills 50
    python benchmarks/kill_resume.py --kills 50 --num_processes 2

A small GPT-2 trains on the text that every CPython carries, with dropout, and saves every third step. SIGKILL goes to
the launcher and all its processes at once or, every other time on average, to the launcher alone, which its processes
must notice; at a random moment of the run, its start included. Every other kill waits until a checkpoint is being
written.
"""

import argparse
import contextlib
import datetime
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.killable import ROOT, Killable, count_outlived
from gpt2repro.errors import quiet_broken_pipe
from gpt2repro.files import file_sha256
from gpt2repro.run_folder import RunFolder
from gpt2repro.train.metrics import without_clock


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
        uninterrupted = Run(root, "uninterrupted", args.num_processes)
        began = time.monotonic()
        uninterrupted.start()
        assert uninterrupted.wait() == 0, uninterrupted.printed()
        duration = time.monotonic() - began
        expected = uninterrupted.result()

        runs = kills = kills_while_saving = kills_of_launcher = outlived = lost = different = 0
        while kills < args.kills:
            run = Run(root, f"killed_{runs}", args.num_processes)
            runs += 1
            while True:
                run.start()
                while_saving = rng.random() < 0.5
                moment = rng.uniform(0, duration)
                if kills == args.kills or not run.reaches(moment) or (while_saving and not run.reaches_save()):
                    break
                launcher_alone = rng.random() < 0.5
                outlived += count_outlived(run.kill(launcher_alone))
                kills_of_launcher += launcher_alone
                kills += 1
                kills_while_saving += run.is_saving()
                print(f"kill {kills}: {run.newest()}", file=sys.stderr, flush=True)
            if run.wait() != 0:
                lost += 1
                print(run.printed(), file=sys.stderr)
            elif run.result() != expected:
                different += 1
        report = {
            "date": str(datetime.date.today()),
            "processes": args.num_processes,
            "seed": args.seed,
            "runs": runs,
            "kills": kills,
            "kills of the launcher alone": kills_of_launcher,
            "kills while a checkpoint was being written": kills_while_saving,
            "processes that outlived their launcher": outlived,
            "lost runs": lost,
            "runs with other weights or other rows": different,
            "rows of metrics.jsonl": len(expected[1]),
        }
    print(json.dumps(report, indent=2))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(bool(lost or different or outlived))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kills over all runs (default: %(default)s)")
    parser.add_argument("--num_processes", type=int, default=1, help="world size of the run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed for the moments of the kills (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    return parser.parse_args()


class Run(Killable):
    """A training run in its own output directory."""

    def __init__(self, root: Path, name: str, num_processes: int):
        self.output_dir = root / name
        config = "multi_cpu" if num_processes > 1 else "cpu"
        command = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs" / f"{config}.yaml"]
        command += ["--num_processes", num_processes, ROOT / "train_accelerate.py", "--config", root / "recipe.yaml"]
        command += ["--data_dir", root / "data", "--output_dir", self.output_dir]
        super().__init__(command, root / f"{name}.log")

    def start(self) -> None:
        self.stale = self.unfinished()  # left by the last kill; the run deletes it at its first save
        super().start()

    def reaches_save(self) -> bool:
        """Wait for a checkpoint being written; False: the run ended first."""
        while not self.is_saving():
            if self.process.poll() is not None:
                return False
        return True

    def unfinished(self) -> set[tuple[str, int]]:
        """Partially written checkpoints, each with its modification time."""
        found = set()
        for path in self.output_dir.glob("checkpoints/writing_*"):
            with contextlib.suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_mtime_ns))
        return found

    def is_saving(self) -> bool:
        """Whether a checkpoint has been partially written since the last start; after a kill, whether it hit a save."""
        return bool(self.unfinished() - self.stale)

    def newest(self) -> str:
        return max((path.name for path in self.output_dir.glob("checkpoints/*")), default="no checkpoint yet")

    def result(self) -> tuple[str, list[dict]]:
        """What must not depend on interruptions: the hash of the final weights, and the metrics without timings."""
        folder = RunFolder(self.output_dir)
        rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
        without_timings = [without_clock(row) for row in rows]
        return file_sha256(folder.model / "model.safetensors"), without_timings


if __name__ == "__main__":
    with quiet_broken_pipe():
        main()
