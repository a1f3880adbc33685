"""HellaSwag accuracy of a causal language model, beside OpenAI's GPT-2.

    python eval_hellaswag.py runs/mine
    python eval_hellaswag.py openai-community/gpt2 --output gpt2.json
    python eval_hellaswag.py runs/mine --style both
    python eval_hellaswag.py runs/mine --data hellaswag_val.jsonl.gz --limit 200
    accelerate launch --config_file accelerate_configs/ddp_8gpu.yaml eval_hellaswag.py runs/mine --batch_size 32

docs/evaluation.md describes the two styles. MODEL is a run, a folder with weights, configuration and tokenizer as
written by save_pretrained, a Hub id, or a file of nanoGPT, build-nanogpt or llm.c.
"""

import argparse
import os
from pathlib import Path

from gpt2repro.errors import Parser, UserError, check_before_imports, problems_of, refuse, run_script
from gpt2repro.evaluation.hellaswag_items import STYLES, read_items, style_problem
from gpt2repro.files import write_problem
from gpt2repro.models.find import DTYPES, find_model


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("model", help="run, checkpoint, model or adapter folder, Hub id, or another trainer's file")
    parser.add_argument("--data", help="local hellaswag_val.jsonl or .jsonl.gz (default: from the Hub)")
    parser.add_argument("--style", default="completion", help="completion (the default), harness or both")
    parser.add_argument("--limit", type=int, help="score only the first LIMIT items")
    parser.add_argument("--batch_size", type=int, help="items per forward pass (default: 32, on a CPU 8)")
    parser.add_argument("--output", help="write the results and every item's scores to this JSON file")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype of the weights; auto: as saved")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the model code that comes with MODEL")
    args = parser.parse_args(argv)
    for name in ("data", "output"):  # the shell expands ~ neither in --data=~/x nor in quotes
        value = getattr(args, name)
        setattr(args, name, value and os.path.expanduser(value))
    return args


def styles_asked(args: argparse.Namespace) -> tuple[str, ...]:
    return STYLES if args.style == "both" else (args.style,)


def check_command_line(argv: list[str]) -> None:
    """Raise one UserError with every mistake that can be told without loading anything."""
    refuse(argument_problems(parse_arguments(argv)))


def argument_problems(args: argparse.Namespace) -> list[str]:
    """One line for each mistake."""
    style = style_problem(args.style, (*STYLES, "both"))
    problems = [f"--style {args.style}: {style}"] if style else []
    for name in ("limit", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            problems.append(f"--{name} {value}: must be 1 or more")
    if args.data and not Path(args.data).is_file():
        problems.append(f"--data {args.data}: no such file; without --data, HellaSwag comes from the Hub")
    elif args.data:
        limit = None if problems else args.limit
        problems += problems_of(read_items, args.data, limit, "--data", styles_asked(args))
    if args.output and Path(args.output).exists():
        problems.append(f"--output {args.output}: exists and is not overwritten; remove it or choose another name")
    if args.output and not Path(args.output).parent.is_dir():
        problems.append(f"--output {args.output}: no folder {Path(args.output).parent}; create it first")
    elif args.output:
        unwritable = write_problem(Path(args.output).parent)
        problems += [f"--output {args.output}: {unwritable}; choose another folder"] if unwritable else []
    return problems + problems_of(find_model, args.model)


if __name__ == "__main__":
    check_before_imports(check_command_line)  # mistakes end here, before the seconds that the imports below take

import hashlib
import json

from accelerate import Accelerator

from gpt2repro.evaluation.bootstrap import with_error
from gpt2repro.evaluation.hellaswag import Scores, default_batch_size, score_hellaswag
from gpt2repro.evaluation.hellaswag_items import FULL_SET, HUB_ID, download_problems, has_wikihow_marks, load_items
from gpt2repro.evaluation.published import openai_models, published_score
from gpt2repro.evaluation.rows import positions
from gpt2repro.models.folder import open_model
from gpt2repro.models.packed_weights import pack_weights
from gpt2repro.processes import cpu_asked, note_missing_processes


PROTOCOLS = {
    "completion": "completion style, build-nanogpt",
    "harness": "harness style, lm-evaluation-harness",
}


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    about_hub = download_problems("--data") if args.data is None else []
    refuse(about_hub + argument_problems(args))
    note_missing_processes()
    accelerator = Accelerator(cpu=cpu_asked())
    styles = styles_asked(args)
    with accelerator.main_process_first():  # the other ranks find downloads and remote code in the caches
        items = load_items(args.data, args.limit, styles=styles)
        model, tokenizer = open_model(args.model, args.dtype, args.trust_remote_code)

    model = model.to(accelerator.device)
    if accelerator.mixed_precision == "no":  # packed weights do not take part in autocast
        pack_weights(model)
    batch_size = args.batch_size or default_batch_size(accelerator.device)
    scores = score_hellaswag(model, tokenizer, items, accelerator, batch_size, styles, progress=True)

    if accelerator.is_main_process:
        for style in styles:
            print(score_table(args.model, scores[style]))
            for caveat in caveats(items, scores[style], args.limit, positions(model)):
                print(f"note: {caveat}")
        if args.output:
            results = {style: results_of(items, scores[style]) for style in styles}
            report = {
                "model": args.model,
                "data": describe_data(args.data),
                "n": len(items),
                "dtype": str(model.dtype).removeprefix("torch."),
                "mixed_precision": accelerator.mixed_precision,
                **results.pop(styles[0]),
                **results,  # with --style both, "harness"
            }
            write_report(report, args.output)
    accelerator.end_training()


def score_table(model: str, scores: Scores) -> str:
    """The model's accuracies with standard errors, also by source, above those of OpenAI's models."""
    rows = [(model, scores.metrics())]
    rows += [(f"  {source}", metrics) for source, metrics in scores.by_source().items()]
    names = list(scores.predictions)
    cells = [("model", *names, "items")]
    for name, metrics in rows:
        shown = [with_error(metrics[f"hellaswag_{key}"], metrics[f"hellaswag_{key}_stderr"]) for key in names]
        cells.append((name, *shown, f"{metrics['hellaswag_items']:,}"))
    for openai in openai_models().values():
        published = [published_score(openai.name, f"hellaswag_{scores.style}_{key}") for key in names]
        shown = [f"{score.value:.4f}" if score else "" for score in published]
        if any(shown):
            cells.append((f"OpenAI {openai.title}", *shown, f"{FULL_SET:,}"))
    width = max(len(name) for name, *_ in cells)
    lines = [f"{name:{width}}  {'  '.join(f'{cell:15}' for cell in row)}  {n:>7}" for name, *row, n in cells]
    return "\n".join([f"HellaSwag ({PROTOCOLS[scores.style]})", *lines])


def caveats(items: list[dict], scores: Scores, limit: int | None, max_length: int | None) -> list[str]:
    """Why this score is not comparable with the references."""
    found = []
    if len(items) == FULL_SET:
        if scores.style == "completion" and not has_wikihow_marks(items):
            found.append("this copy lacks WikiHow's [header], [title], [step] marks; the references have them")
    elif len(items) == limit:
        found.append(f"only the first {limit:,} items, not a random sample: do not compare with the full set")
    else:
        found.append(f"{len(items):,} items; the full set has {FULL_SET:,}: do not compare with it")
    apart = sum("ctx_b" not in item for item in items)
    if scores.style == "harness" and apart:
        found.append(f"{apart:,} items have no ctx_a and ctx_b; the unfinished sentence at the end of ctx is ctx_b")
    cut = sum(item.cut for item in scores.items)
    if cut:
        found.append(f"{cut:,} items were cut to the model's {max_length} positions")
    return found


def results_of(items: list[dict], scores: Scores) -> dict:
    """The part of the report that is about one style."""
    numbers = [{"ind": item["ind"]} if "ind" in item else {} for item in items]
    return {
        "protocol": PROTOCOLS[scores.style],
        "style": scores.style,
        "results": scores.metrics(),
        "by_source": scores.by_source(),
        "items": [number | record for number, record in zip(numbers, scores.records())],
    }


def write_report(report: dict, path: str) -> None:
    try:
        with open(path, "x") as file:  # "x": does not overwrite a file created in the meantime either
            json.dump(report, file)
    except OSError as error:
        raise UserError(
            f"--output {path} cannot be written ({error.strerror}); the scores above are complete"
        ) from error
    print(f"wrote {path}")


def describe_data(data: str | None) -> dict:
    """Where the items come from, with the hash of a local file."""
    if data is None:
        return {"hub_id": HUB_ID, "split": "validation"}
    with open(data, "rb") as file:
        return {"file": Path(data).name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


if __name__ == "__main__":
    run_script(main)
