"""Compare two models on the same text.

    python scorecard.py gpt2 ./exported-gpt2             # is the conversion exact?
    python scorecard.py nanogpt/out/ckpt.pt ./converted --text my.txt

A and B are runs, checkpoints, model folders, Hub ids of causal language models, or files of nanoGPT, build-nanogpt and
llm.c, with the same tokenizer. The table shows how far the hidden states of each layer and the logits differ, both
losses, how often both models predict the same token, and the KL divergence. Everything is computed in float32.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from accelerate import Accelerator

from gpt2repro.errors import Parser, UserError, problems_of, refuse, run_script
from gpt2repro.evaluation.compare import as_table, compare_models
from gpt2repro.files import write_problem
from gpt2repro.models.folder import find_model, open_model
from gpt2repro.prepare.built_in import python_docs
from gpt2repro.processes import cpu_asked


CHARACTERS_PER_TOKEN = 8  # more than tokens of the default text have


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    device = Accelerator(cpu=cpu_asked()).device
    name_a, name_b = args.models
    model_a, tokenizer_a = open_model(name_a, torch.float32, args.trust_remote_code)
    model_b, tokenizer_b = open_model(name_b, torch.float32, args.trust_remote_code)
    text = read_text(args.text, args.tokens)
    ids = tokenizer_a(text, verbose=False).input_ids
    if ids != tokenizer_b(text, verbose=False).input_ids:
        raise UserError(f"{name_a} and {name_b} have different tokenizers; only models with the same can be compared")
    positions = [model.config.max_position_embeddings for model in (model_a, model_b)]
    windows = cut_windows(ids, min(*positions, args.tokens), args.tokens)
    comparison = compare_models(model_a.to(device), model_b.to(device), windows, len(tokenizer_a))
    print(f"A: {name_a}\nB: {name_b}\n\n{as_table(comparison)}")
    if args.output:
        args.output.write_text(json.dumps(dataclasses.asdict(comparison), indent=2) + "\n")


def cut_windows(ids: list[int], length: int, max_tokens: int) -> torch.Tensor:
    """(N, length + 1) int64: windows that overlap by one token and predict at most `max_tokens`.

    Raises:
        UserError: the text is shorter than one window.
    """
    predicted = max_tokens // length * length
    tokens = torch.tensor(ids[: predicted + 1])
    if len(tokens) <= length:
        raise UserError(f"the text has {len(ids)} tokens, fewer than one window of {length + 1}; give a longer --text")
    return tokens.unfold(0, length + 1, length)


def read_text(path: Path | None, tokens: int) -> str:
    """The given text, or enough of the documentation that ships with Python for so many tokens."""
    if path is None:
        return default_text(tokens * CHARACTERS_PER_TOKEN)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path} cannot be read ({error}); give a text file in UTF-8") from error


def default_text(min_characters: int) -> str:
    texts = []
    length = 0
    for text in python_docs():
        texts.append(text)
        length += len(text)
        if length > min_characters:
            break
    return "\n".join(texts)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="the two models, A and B")
    parser.add_argument("--weights-only", nargs=2, metavar=("A", "B"), help="the same, as a flag")
    parser.add_argument("--text", type=Path, help="text file (default: documentation that ships with Python)")
    parser.add_argument("--tokens", type=int, default=8192, help="length of text to compare on (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the comparison as JSON")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the model code that comes with A or B")
    args = parser.parse_args(argv)
    args.models = args.weights_only or args.models
    problems = []
    if len(args.models) != 2:
        problems.append(f"{len(args.models)} models given, 2 are compared: `python scorecard.py A B`")
    for model in args.models:
        problems += problems_of(find_model, model)
    args.text = args.text and args.text.expanduser()
    args.output = args.output and args.output.expanduser()
    if args.text:
        problems += problems_of(read_text, args.text, args.tokens)
    if args.tokens < 1:
        problems.append(f"--tokens {args.tokens} must be at least 1")
    if args.output and (args.output.exists() or not args.output.parent.is_dir()):
        problems.append(f"--output {args.output} must be a new file in an existing folder; choose another name")
    elif args.output and (unwritable := write_problem(args.output.parent)):
        problems.append(f"--output {args.output}: {unwritable}; choose another folder")
    refuse(problems)
    return args


if __name__ == "__main__":
    run_script(main)
