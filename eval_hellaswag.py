"""HellaSwag accuracy of a causal language model, beside OpenAI's GPT-2.

    python eval_hellaswag.py runs/mine
    python eval_hellaswag.py openai-community/gpt2 --output gpt2.json
    python eval_hellaswag.py runs/mine --data hellaswag_val.jsonl.gz --limit 200
    accelerate launch --config_file accelerate_configs/ddp_8gpu.yaml eval_hellaswag.py runs/mine --batch_size 32

The protocol is described in gpt2repro/evaluation/hellaswag.py. MODEL is a run, a folder with weights, configuration and
tokenizer as save_pretrained writes them, or a Hub id.
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch
from accelerate import Accelerator

from gpt2repro.errors import Parser, UserError, run_script
from gpt2repro.evaluation.hellaswag import (
    FULL_SET,
    HUB_ID,
    OPENAI_GPT2,
    encode_item,
    evaluate_hellaswag,
    load_items,
    predict,
    with_error,
)
from gpt2repro.models.folder import find_model, open_model
from gpt2repro.processes import cpu_asked
from modeling_gpt2repro import register_auto_classes


PROTOCOL = "completion style, build-nanogpt"
# name, acc, acc_norm; build-nanogpt hellaswag.py:12-19, on the full set with its WikiHow marks
REFERENCES: list[tuple[str, float, float]] = [
    ("OpenAI gpt2", OPENAI_GPT2["hellaswag_acc"], OPENAI_GPT2["hellaswag_acc_norm"]),
    ("OpenAI gpt2-xl", 0.3842, 0.4893),
]
WIKIHOW_MARK = "[header]"
DEFAULT_BATCH_SIZE = {"cpu": 1}  # with GPT-2's vocabulary one CPU thread was 3.6 times slower with 16
DTYPES: dict[str, str | torch.dtype] = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    check_arguments(args)
    register_auto_classes()
    accelerator = Accelerator(cpu=cpu_asked())
    with accelerator.main_process_first():  # the others find what was downloaded, or copied as code, in the caches
        items = load_items(args.data, args.limit)
        model, tokenizer = open_model(args.model, DTYPES[args.dtype], args.trust_remote_code)

    config = model.config.get_text_config()
    max_length = getattr(config, "max_position_embeddings", None)  # n_positions goes by this name, too
    encoded = [encode_item(item, tokenizer, max_length) for item in items]
    check_vocabulary(args.model, encoded, config.vocab_size)
    model = model.to(accelerator.device)
    batch_size = args.batch_size or DEFAULT_BATCH_SIZE.get(accelerator.device.type, 16)
    metrics, records = evaluate_hellaswag(model, encoded, accelerator, batch_size, progress=True)

    if accelerator.is_main_process:
        print(table(args.model, metrics))
        for note in notes(items, encoded, max_length):
            print(f"note: {note}")
        if args.output:
            write_output(args, model, accelerator, items, metrics, records)
    accelerator.end_training()


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("model", help="run, checkpoint, folder, Hub id, or another trainer's file")
    parser.add_argument("--data", help="local hellaswag_val.jsonl or .jsonl.gz; the default is the Hub's copy")
    parser.add_argument("--limit", type=int, help="score only the first so many items")
    parser.add_argument("--batch_size", type=int, help="items a forward pass, each of 4 rows; 16, or 1 on a CPU")
    parser.add_argument("--output", help="write results and the scores of every item to this JSON file")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="precision of the weights; auto: as saved")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the model code that MODEL brings")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise one UserError with all mistakes that show before anything is loaded."""
    problems = []
    for name in ("limit", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            problems.append(f"--{name} {value}: must be 1 or more")
    if args.data and not Path(args.data).is_file():
        problems.append(f"--data {args.data}: no such file; without --data, HellaSwag comes from the Hub")
    if args.output and Path(args.output).exists():
        problems.append(f"--output {args.output}: exists and is not overwritten; remove it or choose another name")
    if args.output and not Path(args.output).parent.is_dir():
        problems.append(f"--output {args.output}: no folder {Path(args.output).parent}; create it first")
    try:
        find_model(args.model)
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def check_vocabulary(name: str, encoded: list, vocab_size: int) -> None:
    """Raise a UserError where the tokenizer is another model's: an unknown id would end in an error of the device."""
    highest = max(max(row) for item in encoded for row in item.rows)
    if highest >= vocab_size:
        raise UserError(
            f"{name}: the tokenizer makes token {highest}, but the model knows only {vocab_size}; "
            "the tokenizer belongs to another model"
        )


def table(model: str, metrics: dict) -> str:
    acc = with_error(metrics["hellaswag_acc"], metrics["hellaswag_acc_stderr"])
    acc_norm = with_error(metrics["hellaswag_acc_norm"], metrics["hellaswag_acc_norm_stderr"])
    rows = [("model", "acc", "acc_norm", "items"), (model, acc, acc_norm, f"{metrics['hellaswag_items']:,}")]
    rows += [(name, f"{acc:.4f}", f"{acc_norm:.4f}", f"{FULL_SET:,}") for name, acc, acc_norm in REFERENCES]
    width = max(len(name) for name, *_ in rows)
    lines = [f"{name:{width}}  {acc:15}  {acc_norm:15}  {items:>7}" for name, acc, acc_norm, items in rows]
    return "\n".join([f"HellaSwag ({PROTOCOL})", *lines])


def notes(items: list[dict], encoded: list, max_length: int | None) -> list[str]:
    """What keeps this score from being compared with the references."""
    found = []
    if len(items) < FULL_SET:
        found.append(
            f"only the first {len(items):,} of {FULL_SET:,} items, and no random sample (ActivityNet's come first): "
            "do not compare with the full set"
        )
    elif not any(WIKIHOW_MARK in item["ctx"] for item in items):
        found.append("this copy of the set lacks WikiHow's [header], [title], [step] marks; the references had them")
    if cut := sum(item.cut for item in encoded):
        found.append(f"{cut:,} items were cut to the model's {max_length} positions")
    return found


def write_output(args: argparse.Namespace, model, accelerator, items: list[dict], metrics: dict, records: list) -> None:
    """Everything that is needed to check the score or to compare two models item by item, as JSON."""
    rows = []
    for item, record in zip(items, records):
        prediction, prediction_norm = predict(record)
        number = {"ind": item["ind"]} if "ind" in item else {}
        rows.append({**number, **record, "prediction": prediction, "prediction_norm": prediction_norm})
    output = {
        "model": args.model,
        "protocol": PROTOCOL,
        "data": describe_data(args.data),
        "n": len(items),
        "dtype": str(model.dtype).removeprefix("torch."),
        "mixed_precision": accelerator.mixed_precision,
        "results": metrics,
        "items": rows,
    }
    with open(args.output, "x") as file:  # "x": nor is a file overwritten that appeared since the beginning
        json.dump(output, file)
    print(f"wrote {args.output}")


def describe_data(data: str | None) -> dict:
    if data is None:
        return {"hub_id": HUB_ID, "split": "validation"}
    with open(data, "rb") as file:
        return {"file": Path(data).name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


if __name__ == "__main__":
    run_script(main)
