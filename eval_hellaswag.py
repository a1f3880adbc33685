"""HellaSwag accuracy of a causal language model, beside OpenAI's GPT-2.

    python eval_hellaswag.py runs/mine
    python eval_hellaswag.py openai-community/gpt2 --output gpt2.json
    python eval_hellaswag.py runs/mine --data hellaswag_val.jsonl.gz --limit 200
    accelerate launch --config_file accelerate_configs/ddp_8gpu.yaml eval_hellaswag.py runs/mine --batch_size 32

The protocol is described in gpt2repro/evaluation/hellaswag.py. MODEL is a run, a folder with weights, configuration and
tokenizer as written by save_pretrained, a Hub id, or a file of nanoGPT, build-nanogpt or llm.c.
"""

import argparse
import hashlib
import json
import os
from pathlib import Path

import torch
from accelerate import Accelerator

from gpt2repro.errors import Parser, UserError, problems_of, refuse, run_script
from gpt2repro.evaluation.hellaswag import (
    FULL_SET,
    HUB_ID,
    OPENAI_GPT2,
    download_problems,
    encode_item,
    evaluate_hellaswag,
    load_items,
    predict,
    read_items,
    with_error,
)
from gpt2repro.files import write_problem
from gpt2repro.models.folder import find_model, open_model
from gpt2repro.processes import cpu_asked, note_missing_processes


PROTOCOL = "completion style, build-nanogpt"
# On the full set with its WikiHow marks. Source: build-nanogpt hellaswag.py:12-19
REFERENCES = {
    "OpenAI gpt2": OPENAI_GPT2,
    "OpenAI gpt2-xl": {"hellaswag_acc": 0.3842, "hellaswag_acc_norm": 0.4893},
}
WIKIHOW_MARK = "[header]"
BATCH_SIZE = 16
CPU_BATCH_SIZE = 1  # with GPT-2's vocabulary one CPU thread was 3.6 times slower with 16
DTYPES: dict[str, str | torch.dtype] = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    check_arguments(args)
    note_missing_processes()
    accelerator = Accelerator(cpu=cpu_asked())
    with accelerator.main_process_first():  # the other ranks find downloads and remote code in the caches
        items = load_items(args.data, args.limit)
        model, tokenizer = open_model(args.model, DTYPES[args.dtype], args.trust_remote_code)

    config = model.config.get_text_config()
    max_length = getattr(config, "max_position_embeddings", None)  # an alias of n_positions
    encoded = [encode_item(item, tokenizer, max_length) for item in items]
    model = model.to(accelerator.device)
    default_batch_size = CPU_BATCH_SIZE if accelerator.device.type == "cpu" else BATCH_SIZE
    batch_size = args.batch_size or default_batch_size
    metrics, records = evaluate_hellaswag(model, encoded, accelerator, batch_size, progress=True)

    if accelerator.is_main_process:
        print(score_table(args.model, metrics))
        for caveat in caveats(items, encoded, max_length):
            print(f"note: {caveat}")
        if args.output:
            report = {
                "model": args.model,
                "protocol": PROTOCOL,
                "data": describe_data(args.data),
                "n": len(items),
                "dtype": str(model.dtype).removeprefix("torch."),
                "mixed_precision": accelerator.mixed_precision,
                "results": metrics,
                "items": [item_scores(item, record) for item, record in zip(items, records)],
            }
            write_report(report, args.output)
    accelerator.end_training()


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("model", help="run, checkpoint, model folder, Hub id, or another trainer's file")
    parser.add_argument("--data", help="local hellaswag_val.jsonl or .jsonl.gz (default: from the Hub)")
    parser.add_argument("--limit", type=int, help="score only the first LIMIT items")
    parser.add_argument("--batch_size", type=int, help="items per forward pass, 4 rows each (default: 16, on a CPU 1)")
    parser.add_argument("--output", help="write the results and every item's scores to this JSON file")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype of the weights; auto: as saved")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the model code that comes with MODEL")
    args = parser.parse_args(argv)
    for name in ("data", "output"):  # the shell expands ~ neither in --data=~/x nor in quotes
        value = getattr(args, name)
        setattr(args, name, value and os.path.expanduser(value))
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raise one UserError with every mistake that can be found before anything is loaded."""
    problems = []
    for name in ("limit", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            problems.append(f"--{name} {value}: must be 1 or more")
    if args.data and not Path(args.data).is_file():
        problems.append(f"--data {args.data}: no such file; without --data, HellaSwag comes from the Hub")
    elif args.data:
        problems += problems_of(read_items, args.data, args.limit)
    if args.output and Path(args.output).exists():
        problems.append(f"--output {args.output}: exists and is not overwritten; remove it or choose another name")
    if args.output and not Path(args.output).parent.is_dir():
        problems.append(f"--output {args.output}: no folder {Path(args.output).parent}; create it first")
    elif args.output:
        unwritable = write_problem(Path(args.output).parent)
        problems += [f"--output {args.output}: {unwritable}; choose another folder"] if unwritable else []
    if args.data is None:
        problems += download_problems("--data")
    refuse(problems + problems_of(find_model, args.model))


def score_table(model: str, metrics: dict) -> str:
    """The model's accuracies with standard errors, above those of OpenAI's models."""
    acc = with_error(metrics["hellaswag_acc"], metrics["hellaswag_acc_stderr"])
    acc_norm = with_error(metrics["hellaswag_acc_norm"], metrics["hellaswag_acc_norm_stderr"])
    rows = [("model", "acc", "acc_norm", "items"), (model, acc, acc_norm, f"{metrics['hellaswag_items']:,}")]
    for name, reference in REFERENCES.items():
        acc, acc_norm = f"{reference['hellaswag_acc']:.4f}", f"{reference['hellaswag_acc_norm']:.4f}"
        rows.append((name, acc, acc_norm, f"{FULL_SET:,}"))
    width = max(len(name) for name, *_ in rows)
    lines = [f"{name:{width}}  {acc:15}  {acc_norm:15}  {items:>7}" for name, acc, acc_norm, items in rows]
    return "\n".join([f"HellaSwag ({PROTOCOL})", *lines])


def caveats(items: list[dict], encoded: list, max_length: int | None) -> list[str]:
    """Why this score is not comparable with the references."""
    found = []
    if len(items) < FULL_SET:
        found.append(
            f"only the first {len(items):,} of {FULL_SET:,} items, not a random sample (ActivityNet's come first): "
            "do not compare with the full set"
        )
    elif not any(WIKIHOW_MARK in item["ctx"] for item in items):
        found.append("this copy of the set lacks WikiHow's [header], [title], [step] marks; the references had them")
    cut = sum(item.cut for item in encoded)
    if cut:
        found.append(f"{cut:,} items were cut to the model's {max_length} positions")
    return found


def item_scores(item: dict, record: dict) -> dict:
    """What is needed to check the score, or to compare two models item by item."""
    prediction, prediction_norm = predict(record)
    number = {"ind": item["ind"]} if "ind" in item else {}
    return {**number, **record, "prediction": prediction, "prediction_norm": prediction_norm}


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
