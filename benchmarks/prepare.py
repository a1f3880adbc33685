"""Tokens per second of prepare_data.py, next to the upper limit and to the usual approach.

    python benchmarks/prepare.py                     # the source code of the installed Python packages
    python benchmarks/prepare.py --source my.parquet

All variants run in turn, several times; the table shows medians:

    raw           tiktoken's encode_ordinary on the same documents, already in memory, on one core: the upper limit
    pool          one process reads, a multiprocessing.Pool on all cores returns arrays of tokens to it, and it writes
                  them: the usual approach (build-nanogpt)
    1, 2 workers  the processes of prepare_data.py, which read, tokenize, hash and write to disk

The clock runs only while documents are processed: no variant includes process start-up, a few seconds for any corpus.
Memory is the peak resident set of a process, shared libraries included.
"""

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import platform
import re
import shutil
import site
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import pyarrow
import pyarrow.parquet

from gpt2repro.data.tokenization import END_OF_TEXT, gpt2_encoding
from gpt2repro.errors import quiet_broken_pipe
from gpt2repro.prepare.corpora import CorpusQuery, open_corpus
from gpt2repro.prepare.parts import Counts, Job, finalize_shards
from gpt2repro.prepare.plan import Quota
from gpt2repro.prepare.prepared import OutputDirectory
from gpt2repro.prepare.readers import Piece
from gpt2repro.prepare.request import Execution
from gpt2repro.prepare.workers import prepare_parts
from gpt2repro.train.report import provenance


EOT = 50_256


def main() -> None:
    args = parse_arguments()
    if args.variant:
        print(json.dumps(measure(args.variant, Path(args.source))))
        return
    with tempfile.TemporaryDirectory() as folder:
        source = args.source or str(own_text(Path(folder) / "text.parquet", args.megabytes))
        variants = ["raw", "pool", *(f"{n} worker{'s' if n > 1 else ''}" for n in args.num_workers)]
        runs: dict[str, list[dict]] = {name: [] for name in variants}
        for _ in range(args.rounds):
            for name in variants:
                command = [sys.executable, __file__, "--variant", name, "--source", source]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(name, runs[name][-1], file=sys.stderr, flush=True)
    report(args, runs)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", help="a Parquet file with a column `text` (default: source code of Python packages)"
    )
    parser.add_argument("--megabytes", type=int, default=200, help="size of the default text (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of all variants (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for every number")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    return parser.parse_args()


def own_text(path: Path, megabytes: int) -> Path:
    """Write the source code of the installed Python packages to a Parquet file."""
    size, documents = 0, []
    for file in sorted(Path(site.getsitepackages()[0]).rglob("*.py")):
        text = file.read_text(encoding="utf-8", errors="ignore")
        if text and size < megabytes * 10**6:
            documents.append(text)
            size += len(text)
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path, row_group_size=500)
    return path


def measure(variant: str, source: Path) -> dict:
    """Tokens, seconds and peak memory in MiB of one variant, in this process."""
    out = Path(tempfile.mkdtemp())
    try:
        if variant == "raw":
            encoding, documents = gpt2_encoding(), list(open_corpus(CorpusQuery("files", str(source))).texts())
            began = time.perf_counter()
            tokens = sum(len(encoding.encode_ordinary(text)) + 1 for text in documents)
            seconds = time.perf_counter() - began
            note_memory()
        elif variant == "pool":
            tokens, seconds = usual_way(source, out)
        else:
            tokens, seconds = our_way(source, out, int(variant.split()[0]))
    finally:
        shutil.rmtree(out)
    return {"tokens": tokens, "seconds": seconds, "peak_mib": max(_peaks.values())}


_peaks: dict[int, float] = {}  # process id -> MiB


def note_memory() -> None:
    """Record the peak memory of each working process: the children, or this one if it has none."""
    for pid in [child.pid for child in multiprocessing.active_children()] or [os.getpid()]:
        with contextlib.suppress(OSError):  # it has ended
            status = Path(f"/proc/{pid}/status").read_text()
            _peaks[pid] = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


_encoding = None


def _start() -> None:
    global _encoding
    _encoding = gpt2_encoding()


def _tokenize(text: str) -> np.ndarray:
    return np.array([EOT, *_encoding.encode_ordinary(text)], np.uint16)


def usual_way(source: Path, out: Path) -> tuple[int, float]:
    """Tokens and seconds. All cores tokenize; this process writes shards of 100M tokens from an array in memory."""
    total, filled, number = 0, 0, 0
    shard = np.empty(100_000_000, np.uint16)
    with multiprocessing.Pool(os.cpu_count(), _start) as pool:
        pool.map(_tokenize, [END_OF_TEXT] * 8)  # wait until the processes are up
        began = time.perf_counter()
        for tokens in pool.imap(_tokenize, open_corpus(CorpusQuery("files", str(source))).texts(), chunksize=16):
            if filled + len(tokens) > len(shard):
                np.save(out / f"{number}.npy", shard[:filled])
                filled, number = 0, number + 1
            shard[filled : filled + len(tokens)] = tokens
            filled, total = filled + len(tokens), total + len(tokens)
        np.save(out / f"{number}.npy", shard[:filled])
        note_memory()
        return total, time.perf_counter() - began


def our_way(source: Path, out: Path, num_workers: int) -> tuple[int, float]:
    """Tokens and seconds from the first batch that a process reports to the last shard on disk."""
    job = Job(OutputDirectory(out), "gpt2", EOT + 1, EOT, 100_000_000)
    pieces: list[Piece] = open_corpus(CorpusQuery("files", str(source))).pieces
    # Enough parts for all processes to finish at about the same time, as with a large corpus.
    groups = range(pieces[0].start, pieces[-1].stop)
    parts = [(Piece("parquet", str(source), start=group, stop=group + 1),) for group in groups]
    began: list[tuple[float, int]] = []

    def progress(counts: Counts) -> None:
        if counts.tokens and not began:
            began.append((time.perf_counter(), counts.tokens))
        note_memory()

    records = prepare_parts(parts, job, Quota(), Execution(num_workers), progress)
    finalize_shards(records, job)
    tokens = sum(record.total("tokens") for record in records)
    return tokens - began[0][1], time.perf_counter() - began[0][0]


def report(args: argparse.Namespace, runs: dict[str, list[dict]]) -> None:
    rates = {name: [run["tokens"] / run["seconds"] for run in results] for name, results in runs.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, {datetime.date.today()}\n")
    print("| | tokens/s | relative to raw, per process | relative to the pool | peak memory per process, MiB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, rate in medians.items():
        processes = process_count(name)
        memory = max(run["peak_mib"] for run in runs[name])
        relative = f"{rate / processes / medians['raw']:.2f} | {rate / medians['pool']:.2f}"
        print(f"| {name} | {rate:,.0f} | {relative} | {memory:,.0f} |")
    if args.output:
        facts = {"date": str(datetime.date.today()), "cores": os.cpu_count(), "versions": provenance()}
        args.output.write_text(json.dumps(facts | {"runs": runs, "median_tokens_per_second": medians}, indent=2) + "\n")


def process_count(variant: str) -> int:
    if variant == "raw":
        return 1
    return (os.cpu_count() or 1) if variant == "pool" else int(variant.split()[0])


if __name__ == "__main__":
    with quiet_broken_pipe():
        main()
