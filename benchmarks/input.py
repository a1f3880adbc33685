"""How fast one rank's input pipeline delivers batches, when nothing trains: tokens a second by number of workers.

    python benchmarks/input.py
    python benchmarks/input.py --tokens 1000000000      # a larger file than the page cache may hold

The tokens are random ones in nanoGPT's format, read in the shuffled order, as micro-batches of 64 x 1,024. One H100
takes 468,000 tokens a second.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from accelerate import Accelerator


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpt2repro.data.batches import Batches
from gpt2repro.data.mixture import RunData
from gpt2repro.errors import quiet_broken_pipe
from gpt2repro.recipe import Recipe


def main() -> None:
    args = parse_arguments()
    recipe = Recipe(global_batch_tokens=64 * 1024, micro_batch_size=64, sequence_length=1024)
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder), args.tokens)
        train = RunData.open({folder: 1.0}).train
        print(f"{args.tokens:,} tokens\n\n| num_workers | tokens/s |\n| ---: | ---: |")
        for workers in args.num_workers:
            batches = Batches(train, dataclasses.replace(recipe, num_workers=workers), Accelerator(cpu=True))
            rates = [measure(batches, first, args.steps) for first in range(0, args.rounds * args.steps, args.steps)]
            print(f"| {workers} | {statistics.median(rates):,.0f} |", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000_000, help="in the training split; 2 bytes each")
    parser.add_argument("--num_workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40, help="micro-batches a round")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def write_tokens(folder: Path, count: int) -> None:
    """train.bin and val.bin of random tokens."""
    generator = np.random.default_rng(0)
    block = generator.integers(0, 50257, 10_000_000, np.uint16)
    with open(folder / "train.bin", "wb") as file:
        for start in range(0, count, len(block)):
            file.write(block[: count - start].tobytes())
    block[:100_000].tofile(folder / "val.bin")


def measure(batches: Batches, first: int, steps: int) -> float:
    """Tokens a second, without the first micro-batch, at which the workers start."""
    began = tokens = 0
    for step in range(first, first + steps):
        for micro_batch in batches.of_step(step):
            tokens += micro_batch.numel() if began else 0
            began = began or time.perf_counter()
    return tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    with quiet_broken_pipe():
        main()
