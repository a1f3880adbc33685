"""The attention kernels that the recipe's `attention` chooses between, forward and backward, on this device.

    python benchmarks/attention.py
    python benchmarks/attention.py --device cpu --batch_size 4 --sequence_length 512

The kernels take turns; the table shows the median time, and the largest difference of output and gradients from plain
attention in float32, relative to its largest value.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpt2repro.errors import quiet_broken_pipe
from gpt2repro.processes import device_name, keep_freed_memory
from gpt2repro.train.attention import KERNELS, preferred_kernel, why_not
from gpt2repro.train.report import provenance
from modeling_gpt2repro import eager_attention_forward


def main() -> None:
    args = parse_arguments()
    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(found if args.device == "auto" else args.device)
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    shape = (args.batch_size, args.n_head, args.sequence_length, args.head_size)
    dtype = torch.float32 if args.precision == "no" else torch.bfloat16
    query, key, value, grad = torch.randn(4, *shape, device=device).to(dtype)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]

    attentions = {"sdpa": plain_sdpa, "eager": eager}
    unavailable = {}
    for name, kernel in KERNELS.items():
        reason = why_not(kernel, device, dtype, shape, dropout=0.0)
        if reason is None:
            attentions[name] = with_kernel(kernel)
        else:
            unavailable[name] = reason

    exact = results_of(eager, [tensor.detach().float().requires_grad_() for tensor in inputs], grad.float())
    differences = {name: largest_difference(results_of(f, inputs, grad), exact) for name, f in attentions.items()}
    milliseconds: dict[str, list[float]] = {name: [] for name in attentions}
    for _ in range(args.rounds):
        for name, attention in attentions.items():
            milliseconds[name].append(time_of(attention, inputs, grad))
    report(args, device, milliseconds, differences, unavailable)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences")
    parser.add_argument("--n_head", type=int, default=12)
    parser.add_argument("--sequence_length", type=int, default=1024, help="tokens")
    parser.add_argument("--head_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20, help="measurements of each kernel")
    parser.add_argument("--output", type=Path, help="write every measurement as JSON")
    return parser.parse_args()


def plain_sdpa(query, key, value):
    """Torch chooses the kernel. (B, H, T, hs) each, as is the result."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def with_kernel(kernel):
    """plain_sdpa with this kernel of torch's."""

    def attention(query, key, value):
        with sdpa_kernel(kernel):
            return plain_sdpa(query, key, value)

    return attention


def eager(query, key, value):
    """The model's plain attention. (B, H, T, hs) each, as is the result."""
    T = query.shape[2]
    causal = torch.full((T, T), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device).triu(1)
    module = SimpleNamespace(training=True)
    mixed, _ = eager_attention_forward(module, query, key, value, causal, scaling=query.shape[-1] ** -0.5)
    return mixed.transpose(1, 2)


def results_of(attention, inputs, grad) -> list[torch.Tensor]:
    """The output, and the gradients of query, key and value."""
    output = attention(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def largest_difference(results: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return max(((got - wanted).abs().max() / wanted.abs().max()).item() for got, wanted in zip(results, exact))


def time_of(attention, inputs, grad) -> float:
    """Milliseconds of forward and backward."""
    began = time.perf_counter()
    results_of(attention, inputs, grad)
    if grad.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1000


def report(args, device, milliseconds, differences, unavailable) -> None:
    """Print the table, and write --output."""
    capability = torch.cuda.get_device_capability() if device.type == "cuda" else None
    kernel = preferred_kernel("auto", device.type, capability)
    auto = next((name for name in KERNELS if KERNELS[name] == kernel), "sdpa")
    print(
        f"B={args.batch_size}, H={args.n_head}, T={args.sequence_length}, head size {args.head_size}, "
        f"{'float32' if args.precision == 'no' else 'bfloat16'}; {device_name(device)}; torch {torch.__version__}; "
        f"auto is {auto}\n"
    )
    medians = {name: statistics.median(times) for name, times in milliseconds.items()}
    print("| attention | forward + backward, ms | eager / this | difference |\n| --- | ---: | ---: | ---: |")
    for name, median in sorted(medians.items(), key=lambda item: item[1]):
        print(f"| {name} | {median:.2f} | {medians['eager'] / median:.2f} | {differences[name]:.1e} |")
    for name, reason in unavailable.items():
        print(f"| {name} | not here: {reason} | | |")
    if args.output:
        settings = {name: value for name, value in vars(args).items() if name != "output"}
        measured = {"medians": medians, "differences": differences, "unavailable": unavailable}
        header = {"device": device_name(device), "versions": provenance(), "settings": settings}
        args.output.write_text(json.dumps(header | measured | {"milliseconds": milliseconds}, indent=2) + "\n")


if __name__ == "__main__":
    with quiet_broken_pipe():
        main()
