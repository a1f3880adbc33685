"""Hold two models side by side on the same text.

    python scorecard.py --weights-only gpt2 ./exported-gpt2             # is the conversion exact?
    python scorecard.py --weights-only nanogpt/out/ckpt.pt ./converted --text my.txt

A and B are runs, checkpoints, model folders, Hub ids of causal language models, or files of nanoGPT, build-nanogpt and
llm.c. Both must have the same tokenizer. Printed are the differences of the hidden states after each layer and of the
logits, both losses, how often both find the same token the likeliest, and the KL divergence; all in float32.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from accelerate import Accelerator

from gpt2repro.errors import Parser, UserError, run_script
from gpt2repro.evaluation.compare import as_table, compare_models
from gpt2repro.models.folder import open_model
from gpt2repro.prepare.built_in import python_docs
from gpt2repro.processes import cpu_asked
from modeling_gpt2repro import register_auto_classes


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    register_auto_classes()
    device = Accelerator(cpu=cpu_asked()).device
    (a, tokenizer), (b, tokenizer_b) = (
        open_model(name, dtype=torch.float32, trust_remote_code=args.trust_remote_code) for name in args.weights_only
    )
    text = read_text(args.text, args.tokens)
    ids = tokenizer(text, verbose=False).input_ids
    if ids != tokenizer_b(text, verbose=False).input_ids:
        raise UserError(f"{' and '.join(args.weights_only)} have different tokenizers; only equal ones can be compared")
    length = min(a.config.max_position_embeddings, b.config.max_position_embeddings, args.tokens)
    windows = torch.tensor(ids[: args.tokens // length * length + 1])
    if len(windows) <= length:
        raise UserError(f"the text has {len(ids)} tokens, fewer than one window of {length + 1}; give a longer --text")
    windows = windows.unfold(0, length + 1, length)
    comparison = compare_models(a.to(device), b.to(device), windows, len(tokenizer))
    print(f"A: {args.weights_only[0]}\nB: {args.weights_only[1]}\n\n{as_table(comparison)}")
    if args.output:
        args.output.write_text(json.dumps(dataclasses.asdict(comparison), indent=2) + "\n")


def read_text(path: Path | None, tokens: int) -> str:
    """The given text, or as much as is needed of the documentation that Python carries."""
    if path is None:
        texts, length = [], 0
        for text in python_docs():
            texts.append(text)
            length += len(text)
            if length > tokens * 8:  # characters; tokens of this text are shorter
                break
        return "\n".join(texts)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path} cannot be read ({error}); give a text file in UTF-8") from error


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--weights-only", nargs=2, metavar=("A", "B"), required=True, help="the two models")
    parser.add_argument("--text", type=Path, help="text file (default: documentation that Python carries)")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text that are read (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the comparison as JSON, too")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the model code that A or B brings")
    args = parser.parse_args(argv)
    if args.tokens < 1:
        raise UserError(f"--tokens {args.tokens} must be at least 1")
    if args.output and (args.output.exists() or not args.output.parent.is_dir()):
        raise UserError(f"--output {args.output} must be a new file in a folder that exists; choose another name")
    return args


if __name__ == "__main__":
    run_script(main)
