"""Kill preparations, deduplications or exports at random moments, repeat each command until it ends, and compare what
it leaves with what an uninterrupted one leaves, byte for byte.

    python benchmarks/kill_prepare.py --what prepare --kills 100
    python benchmarks/kill_prepare.py --what dedup --kills 40
    python benchmarks/kill_prepare.py --what publish --kills 60

SIGKILL goes to all processes of the command or, every other time on average, to its first one alone; the repetition
then starts while the others may still be ending. Every other kill, on average, waits until the command has begun to
write. Beside the output lie folders of somebody else with names such as our own temporary ones.
"""

import argparse
import contextlib
import datetime
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.kill_resume import RECIPE
from benchmarks.killable import ROOT, Killable, count_outlived
from benchmarks.power_cut import Job, contents, prepare_into, publish_into, run, train_into
from gpt2repro.errors import quiet_broken_pipe
from gpt2repro.prepare.built_in import python_docs


FILES = 8
WORKERS = ("--num_workers", 3)
SMALL_PARTS = """
from gpt2repro.prepare import readers

readers.PART_BYTES = 200_000  # else one part holds the whole corpus

import prepare_data

prepare_data.run_script(prepare_data.main)
"""
FOREIGN = ("writing_out", "replaced_out", "removing_out", "unfinished_out", "unfinished_essay", "out.tmp")


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        job = JOBS[args.what](Path(folder))
        report = {"date": str(datetime.date.today()), "command": job.name, "seed": args.seed}
        report |= kill_and_repeat(job, args.kills, Path(folder), random.Random(args.seed))
    print(json.dumps(report, indent=2))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(any(report[fault] for fault in FAULTS))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=JOBS, required=True, help="the command to kill")
    parser.add_argument("--kills", type=int, default=50, help="kills over all repetitions (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed for the moments of the kills (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    return parser.parse_args()


# ---- the commands ----


def preparation(root: Path) -> Job:
    """Some 20 parts in 3 processes, with a tokenizer of the corpus's own."""
    write_corpus(root / "source")
    flags = ["--source", root / "source", "--tokenizer", "bpe:512", "--shard_tokens", 200_000, *WORKERS]
    return Job(
        "preparation",
        lambda place: ["-c", SMALL_PARTS, "files", *flags, "--output_dir", place / "out"],
        contents,
    )


def deduplication(root: Path) -> Job:
    """By URL and by MinHash, then tokenized; every document occurs twice."""
    write_corpus(root / "source", copies=2)
    flags = ["--source", root / "source", "--tokenizer", "bpe:512", "--dedup", "url,minhash", *WORKERS]
    return Job(
        "deduplication",
        lambda place: [ROOT / "prepare_data.py", "files", *flags, "--output_dir", place / "out"],
        without_logs,
    )


def publishing(root: Path) -> Job:
    """A small run, into a folder."""
    (root / "recipe.yaml").write_text(RECIPE)
    for command in (prepare_into(root / "data"), train_into(root, root / "trained")):
        code, stderr = run(command)
        assert code == 0, stderr
    return Job("publishing", lambda place: publish_into(root, place / "out"), contents, done="exists already")


JOBS = {"prepare": preparation, "dedup": deduplication, "publish": publishing}


def write_corpus(folder: Path, copies: int = 1) -> None:
    """CPython's documentation as FILES files, each document with a URL."""
    folder.mkdir()
    documents = list(python_docs())
    rows = [{"text": text, "url": f"https://example.org/{number}"} for number, text in enumerate(documents)] * copies
    for number in range(FILES):
        own = rows[len(rows) * number // FILES : len(rows) * (number + 1) // FILES]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))


def without_logs(place: Path) -> list[str]:
    """datatrove's logs hold times, and those of every attempt."""
    return [file for file in contents(place) if not file.startswith("out/deduplicated/logs/")]


# ---- kills ----

FAULTS = (
    "processes that outlived their parent",
    "repetitions that failed",
    "results that differ",
    "outputs that were neither absent nor whole",
)
MOST_LEFT = "leftovers beside the output, at most"


class Attempted(Killable):
    """A command that writes into a place of its own."""

    def __init__(self, job: Job, place: Path):
        super().__init__(job.command(place), place.with_suffix(".log"))
        self.place = place

    def start(self) -> None:
        self.before = self.written()
        super().start()

    def written(self) -> set[tuple[Path, int]]:
        """Every file and folder there, with its modification time."""
        found = set()
        for folder, _, names in os.walk(self.place):  # unlike rglob, it passes over folders that vanish
            for path in (Path(folder), *(Path(folder) / name for name in names)):
                with contextlib.suppress(FileNotFoundError):
                    found.add((path, path.stat().st_mtime_ns))
        return found

    def reaches_writing(self) -> bool:
        """Wait until something is written; False: the command ended first."""
        while self.written() == self.before:
            if not self.reaches(0.01):
                return False
        return True


def kill_and_repeat(job: Job, kills: int, root: Path, rng: random.Random) -> dict:
    """Kill the command `kills` times in all; returns what to report."""
    undisturbed = Attempted(job, new_place(root / "uninterrupted"))
    began = time.monotonic()
    undisturbed.start()
    assert undisturbed.reaches_writing(), undisturbed.printed()
    first = last = time.monotonic()
    seen = undisturbed.written()
    while undisturbed.reaches(0.01):
        if (written := undisturbed.written()) != seen:
            last, seen = time.monotonic(), written
    assert undisturbed.wait() == 0, undisturbed.printed()
    duration, writing, expected = time.monotonic() - began, last - first, job.result(undisturbed.place)

    found = {"runs": 0, "kills": 0, "kills of the parent alone": 0, "kills after the first write": 0}
    found |= dict.fromkeys((*FAULTS, MOST_LEFT), 0)
    while found["kills"] < kills:
        place = new_place(root / f"killed_{found['runs']}")
        command = Attempted(job, place)
        command.start()
        while found["kills"] < kills:
            anywhere = rng.random() < 0.5
            if not anywhere and not command.reaches_writing():
                break
            if not command.reaches(rng.uniform(0, duration if anywhere else writing)):
                break
            has_written = command.written() != command.before
            alone = rng.random() < 0.5
            orphans = command.kill(alone)
            found["kills"] += 1
            found["kills of the parent alone"] += alone
            found["kills after the first write"] += has_written
            left = leftovers(place)
            found[MOST_LEFT] = max(len(left), found[MOST_LEFT])
            is_partial = job.done is not None and (place / "out").exists() and ours(job.result(place)) != ours(expected)
            found["outputs that were neither absent nor whole"] += is_partial
            print(f"kill {found['kills']}: {left}", file=sys.stderr, flush=True)
            command.start()
            found["processes that outlived their parent"] += count_outlived(orphans)
        code, printed = command.wait(), command.printed()
        found["runs"] += 1
        was_done = job.done is not None and code == 2 and job.done in printed
        if (code != 0 and not was_done) or "Traceback" in printed:
            found["repetitions that failed"] += 1
            print(printed, file=sys.stderr, flush=True)
        elif ours(job.result(place)) != ours(expected) or not foreign(expected) <= set(job.result(place)):
            found["results that differ"] += 1
            print(sorted(set(expected) ^ set(job.result(place))), file=sys.stderr, flush=True)
    seconds = {
        "seconds of an uninterrupted run": round(duration, 1),
        "of these after the first write": round(writing, 1),
    }
    return found | seconds | {"files": len(ours(expected))}


def new_place(place: Path) -> Path:
    """A folder for the output, in which somebody else keeps folders of their own."""
    for name in FOREIGN:
        (place / name).mkdir(parents=True)
        (place / name / "essay.txt").write_text(f"{name}\n")
    return place


def leftovers(place: Path) -> list[str]:
    return sorted({path.name for path in place.iterdir()} - {"out", *FOREIGN})


def ours(files: list[str]) -> list[str]:
    return [file for file in files if file.startswith("out/")]


def foreign(files: list[str]) -> set[str]:
    return set(files) - set(ours(files))


if __name__ == "__main__":
    with quiet_broken_pipe():
        main()
