"""What the number of chunks costs the loss: time and memory of the head's products, softmax and gradients alone.

    python benchmarks/chunks.py --device cuda
    python benchmarks/chunks.py --device cpu --tokens 2048

One row a number of chunks, medians over the rounds; "trainer" is what the trainer takes for this size.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import modeling_gpt2repro
from gpt2repro.errors import quiet_broken_pipe
from gpt2repro.processes import keep_freed_memory
from modeling_gpt2repro import linear_cross_entropy


CHUNKS = (1, 2, 4, 8, 16, 32)


def main() -> None:
    args = parse_arguments()
    if args.device == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    dtype = torch.float32 if args.precision == "no" else torch.bfloat16
    hidden = torch.randn(args.tokens, args.n_embd, device=args.device, requires_grad=True)
    weight = (0.02 * torch.randn(args.vocab_size, args.n_embd, device=args.device)).requires_grad_()
    labels = torch.randint(0, args.vocab_size, (args.tokens,), device=args.device)
    print(
        f"{args.tokens:,} tokens, width {args.n_embd}, {args.vocab_size:,} rows, {dtype}; torch {torch.__version__}\n"
    )
    print("| chunks | ms | peak memory, MiB | loss |\n| --- | ---: | ---: | ---: |")
    for chunks in ("trainer", *CHUNKS):
        if chunks != "trainer":
            modeling_gpt2repro.MAX_CHUNKS = chunks
            # so that MAX_CHUNKS alone counts
            modeling_gpt2repro.LOGITS_PER_CHUNK = modeling_gpt2repro.LOGITS_PER_CHUNK_ON_CPU = 1
        milliseconds, peak, loss = measure(args, hidden, weight, labels, dtype)
        memory = f"{peak / 2**20:,.0f}" if peak else ""
        print(f"| {chunks} | {milliseconds:,.2f} | {memory} | {loss:.5f} |", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16", help="autocast; no is float32")
    parser.add_argument("--tokens", type=int, default=32_768, help="of a micro-batch")
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--vocab_size", type=int, default=50_304)
    parser.add_argument("--rounds", type=int, default=5, help="measured repetitions, after an unmeasured one")
    return parser.parse_args()


def measure(args: argparse.Namespace, hidden, weight, labels, dtype) -> tuple[float, int, float]:
    """Milliseconds of forward and backward, bytes beside the inputs (0 on a CPU), and the loss."""
    on_gpu = args.device == "cuda"
    seconds = []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(args.rounds + 1):
        hidden.grad = weight.grad = None
        began = time.perf_counter()
        with torch.autocast(args.device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = linear_cross_entropy(hidden, weight, labels, args.vocab_size)
        loss.backward()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    return 1000 * statistics.median(seconds[1:]), peak, loss.item()


if __name__ == "__main__":
    with quiet_broken_pipe():
        main()
