"""Continue a prompt with a trained model.

    python sample.py runs/demo --prompt "Module json" --num_samples 3

MODEL is a run, checkpoint, model folder or Hub id of any causal language model that transformers can load, or a file of
nanoGPT, build-nanogpt or llm.c. The samples are drawn as one batch, many of them as several; the first is printed while
it is generated.
"""

import argparse
import math
import sys
import time

from gpt2repro.errors import Parser, check_before_imports, problems_of, refuse, run_script
from gpt2repro.models.find import DTYPES, find_model


MINIMUM = {"num_samples": 1, "max_new_tokens": 1, "top_k": 0, "seed": 0}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("model", help="run, checkpoint, model or adapter folder, Hub id, or another trainer's file")
    parser.add_argument("--prompt", default="", help="text to continue (default: the start of a document)")
    parser.add_argument("--num_samples", type=int, default=3, help="number of continuations (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="length of each (default: %(default)s)")
    parser.add_argument(
        "--top_k", type=int, default=50, help="sample from the k likeliest tokens; 0: from all (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1337, help="of all samples together (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=(*DTYPES, "int8"),
        default="auto",
        help="of the weights; auto: as saved; int8: rounded, on the CPU only (default: %(default)s)",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run the model code that comes with MODEL")
    args = parser.parse_args(argv)
    problems = []
    for name, minimum in MINIMUM.items():
        value = getattr(args, name)
        if value < minimum:
            problems.append(f"--{name} {value} must be at least {minimum}")
    if not 0 < args.temperature < math.inf:
        problems.append(f"--temperature {args.temperature} must be above 0 and finite")
    if args.seed >= 2**64:
        problems.append(f"--seed {args.seed} must be below 2**64")
    refuse(problems + problems_of(find_model, args.model))
    return args


if __name__ == "__main__":
    check_before_imports(parse_arguments)  # mistakes end here, before the seconds that the imports below take

from accelerate import Accelerator

from gpt2repro.data.order import stateless_seed
from gpt2repro.models.folder import open_model
from gpt2repro.models.packed_weights import pack_weights
from gpt2repro.models.sampling import FirstRowStreamer, count_new_tokens, draw, encode_prompt, samples_at_once
from gpt2repro.processes import cpu_asked


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    dtype = "bfloat16" if args.dtype == "int8" else args.dtype  # what a model with int8 weights computes in
    model, tokenizer = open_model(args.model, dtype, trust_remote_code=args.trust_remote_code)
    model.to(Accelerator(cpu=cpu_asked()).device)
    pack_weights(model, int8=args.dtype == "int8")

    prompt_tokens = encode_prompt(args.prompt, model, tokenizer).shape[1]
    at_once = samples_at_once(model, prompt_tokens + args.max_new_tokens)
    count, seconds = 0, 0.0
    print("--- sample 1 ---", flush=True)
    for first in range(0, args.num_samples, at_once):
        began = time.perf_counter()
        samples = draw(
            model,
            tokenizer,
            args.prompt,
            args.max_new_tokens,
            seed=stateless_seed(args.seed, first) if first else args.seed,
            num_samples=min(at_once, args.num_samples - first),
            streamer=FirstRowStreamer(tokenizer, skip_special_tokens=True) if first == 0 else None,
            top_k=args.top_k,
            temperature=args.temperature,
        )
        seconds += time.perf_counter() - began
        count += count_new_tokens(samples, prompt_tokens, model)
        for number, ids in enumerate(samples, start=first + 1):
            if number > 1:
                print(f"--- sample {number} ---\n{tokenizer.decode(ids, skip_special_tokens=True)}", flush=True)
    print(f"{count:,} tokens in {seconds:.1f} s: {count / seconds:,.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    run_script(main, save_memory="lower --num_samples, or hide the GPU with CUDA_VISIBLE_DEVICES=-1")
