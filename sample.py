"""Continue a prompt with a trained model.

    python sample.py runs/demo --prompt "Module json" --num_samples 3

MODEL is a run, checkpoint, model folder or Hub id of any causal language model that transformers can load, or a file of
nanoGPT, build-nanogpt or llm.c.
"""

import argparse

from gpt2repro.errors import Parser, check_before_imports, problems_of, refuse, run_script
from gpt2repro.models.find import find_model


MINIMUM = {"num_samples": 1, "max_new_tokens": 1, "top_k": 0, "seed": 0}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("model", help="run, checkpoint, model folder, Hub id, or another trainer's file")
    parser.add_argument("--prompt", default="", help="text to continue (default: the start of a document)")
    parser.add_argument("--num_samples", type=int, default=3, help="number of continuations (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="length of each (default: %(default)s)")
    parser.add_argument(
        "--top_k", type=int, default=50, help="sample from the k likeliest tokens; 0: from all (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1337, help="of the first sample (default: %(default)s)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the model code that comes with MODEL")
    args = parser.parse_args(argv)
    problems = []
    for name, minimum in MINIMUM.items():
        value = getattr(args, name)
        if value < minimum:
            problems.append(f"--{name} {value} must be at least {minimum}")
    if args.temperature <= 0:
        problems.append(f"--temperature {args.temperature} must be above 0")
    refuse(problems + problems_of(find_model, args.model))
    return args


if __name__ == "__main__":
    check_before_imports(parse_arguments)  # mistakes end here, before the seconds that the imports below take

from accelerate import Accelerator
from transformers import TextStreamer

from gpt2repro.models.folder import open_model
from gpt2repro.models.sampling import generate
from gpt2repro.processes import cpu_asked


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    model, tokenizer = open_model(args.model, trust_remote_code=args.trust_remote_code)
    model.to(Accelerator(cpu=cpu_asked()).device)
    for number in range(args.num_samples):
        print(f"--- sample {number + 1} ---", flush=True)
        generate(
            model,
            tokenizer,
            args.prompt,
            args.max_new_tokens,
            seed=args.seed + number,
            top_k=args.top_k,
            temperature=args.temperature,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        )


if __name__ == "__main__":
    run_script(main)
