"""HellaSwag in build-nanogpt's completion style: which of four endings does the model find likeliest?

    items    = load_items("hellaswag_val.jsonl.gz")       # or None: Rowan/hellaswag from the Hub
    encoded  = [encode_item(item, tokenizer, max_length=1024) for item in items]
    metrics, records = evaluate_hellaswag(model, encoded, accelerator, batch_size=16)

A row is the tokens of the context followed by the tokens of " " + ending, each encoded by itself; an ending's score is
its negative log-likelihood after the context. The lowest sum is the prediction of `acc`, the lowest mean per token
that of `acc_norm`. Source: build-nanogpt hellaswag.py, render_example and evaluate.

lm-evaluation-harness does otherwise: it writes the activity before the context, removes WikiHow's [header], [title]
and [step] marks, which the published set has, and divides by the ending's characters. Scores of the two do not compare.
"""

import gzip
import inspect
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from gpt2repro.errors import UserError, first_line


HUB_ID = "Rowan/hellaswag"
OPENAI_GPT2 = {"hellaswag_acc": 0.2859, "hellaswag_acc_norm": 0.2955}  # 124M, full set; build-nanogpt hellaswag.py
FULL_SET = 10_042  # items of the validation set
ENDINGS = 4
METRIC_FOLDER = Path(__file__).parent / "metrics" / "hellaswag"


# Items: dicts with ctx (str), endings (4 str) and label (int), as published; other fields stay as they are.


def load_items(data: str | None = None, limit: int | None = None) -> list[dict]:
    """The validation set, or the first `limit` items of it.

    Args:
        data: a local .jsonl or .jsonl.gz file; None means Rowan/hellaswag on the Hub.
    Raises:
        UserError: no such file, a broken line, or the Hub cannot be reached.
    """
    if data is not None:
        return read_items(data, limit)
    try:
        rows = datasets.load_dataset(HUB_ID, split="validation")
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"HellaSwag ({HUB_ID}) cannot be had from the Hub ({first_line(error)}); check the network, or give "
            "a local copy of hellaswag_val.jsonl with --data FILE"
        ) from error
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    return [checked(row, f"{HUB_ID}, row {number}") for number, row in enumerate(rows)]


def read_items(path: str, limit: int | None = None) -> list[dict]:
    """The items of a .jsonl or .jsonl.gz file, one JSON object a line; reading stops after `limit` of them.

    Raises:
        UserError: the file cannot be read or holds no items, or a line is broken; the message names the line.
    """
    items = []
    open_file = gzip.open if str(path).endswith(".gz") else open
    try:
        with open_file(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    items.append(parse_line(line, f"{path}, line {number}"))
                if len(items) == limit:
                    break
    except (OSError, EOFError, zlib.error) as error:  # the last two: a gzip file that was cut short or damaged
        raise UserError(
            f"{path} cannot be read ({first_line(error)}); --data wants a .jsonl or .jsonl.gz file"
        ) from error
    if not items:
        raise UserError(f"{path} holds no items; --data wants one JSON object a line")
    return items


def parse_line(line: bytes, where: str) -> dict:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({first_line(error)}); mend or remove the line") from error
    return checked(item, where)


def checked(item: dict, where: str) -> dict:
    """The item with its label as an int: the Hub's copy has it as text.

    Raises:
        UserError: the item cannot be scored; the message names `where` it is.
    """
    if problem := find_problem(item):
        raise UserError(f"{where}: {problem}; mend or remove the line")
    return {**item, "label": int(item["label"])}


def find_problem(item) -> str | None:
    """What keeps an item from being scored, or None."""

    def is_text(value):
        return isinstance(value, str) and bool(value.strip())

    if not isinstance(item, dict):
        return "not a JSON object"
    if not is_text(item.get("ctx")):
        return f"ctx is {item.get('ctx')!r} and must be a text that is not empty"
    endings = item.get("endings")
    if not isinstance(endings, list) or len(endings) != ENDINGS or not all(map(is_text, endings)):
        return f"endings is {endings!r} and must be a list of {ENDINGS} texts that are not empty"
    if str(item.get("label")) not in map(str, range(ENDINGS)):
        return f"label is {item.get('label')!r} and must be 0 to {ENDINGS - 1} (the test set has no labels)"
    return None


@dataclass(frozen=True)
class EncodedItem:
    """One item as tokens.

    rows: four lists of token ids, context and ending.
    ending_tokens: for each row, how many of its last tokens are the ending.
    label: index of the true ending.
    cut: some row was too long for the model, see `encode_item`.
    """

    rows: list[list[int]]
    ending_tokens: list[int]
    label: int
    cut: bool

    @property
    def length(self) -> int:
        """Tokens of the longest row, which decides what a batch with this item costs."""
        return max(map(len, self.rows))


def encode_item(item: dict, tokenizer, max_length: int | None = None) -> EncodedItem:
    """The four rows of an item, without special tokens.

    A row longer than max_length loses the beginning of its context, as that is farthest from what is scored. One token
    of context stays in any case, for nothing would predict the ending's first token without it; an ending that then
    does not fit loses its own end. GPT-2's 1,024 positions are enough for every item (the longest has 149 tokens).

    Args:
        item: as `load_items` returns it.
        tokenizer: a transformers tokenizer.
        max_length: positions of the model, at least 2; None means that there is no limit.
    Raises:
        UserError: the tokenizer makes no token at all of the context or of an ending.
    """
    texts = [item["ctx"], *(" " + ending for ending in item["endings"])]
    context, *endings = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    for text, tokens in zip(texts, [context, *endings]):
        if not tokens:
            raise UserError(
                f"the tokenizer makes no token of {text!r}; it does not suit HellaSwag, or the item is broken"
            )

    limit = max_length or max(len(context) + len(ending) for ending in endings)
    fitted = [ending[: limit - 1] for ending in endings]
    return EncodedItem(
        rows=[context[-(limit - len(ending)) :] + ending for ending in fitted],
        ending_tokens=[len(ending) for ending in fitted],
        label=item["label"],
        cut=any(len(context) + len(ending) > limit for ending in endings),
    )


def collate(items: list[EncodedItem]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of several items as one batch, padded on the right with token 0.

    The pads need no attention mask: attention is causal, so no token sees what stands to the right of it, and the
    logits of the pads themselves are never read.

    Returns:
        tokens: (R, T) int64, R = 4 rows an item, T the longest of them.
        ending_mask: (R, T) bool, True on ending tokens.
    """
    rows = [row for item in items for row in item.rows]
    counts = [count for item in items for count in item.ending_tokens]
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    ending_mask = torch.zeros_like(tokens, dtype=torch.bool)
    for r, (row, count) in enumerate(zip(rows, counts)):
        tokens[r, : len(row)] = torch.tensor(row)
        ending_mask[r, len(row) - count : len(row)] = True
    return tokens, ending_mask


def score_endings(logits, tokens, ending_mask):
    """Negative log-likelihood of each row's ending, given what stands before it.

    The logits at one position are about the token at the next:

        position       0      1      2      3      4      5
        tokens       [ A     man    is  |  on     a     pad ]
        ending_mask    .      .      .     x      x      .
        logits         0      1      2     3      4      5
                                     |     |
                                     |     +--- scores "a"
                                     +--------- scores "on"

    Only those rows of the logits are converted to float32: all of them would be the largest tensor of the evaluation.

    Args:
        logits: (R, T, V) float of any precision, unshifted; this function does the shift.
        tokens: (R, T) int64, right-padded.
        ending_mask: (R, T) bool, True on ending tokens.
    Returns:
        summed_nll: (R,) float32, nats, summed over the ending's tokens; the lowest is the prediction (acc).
        ending_tokens: (R,) int64; summed_nll / ending_tokens is what acc_norm compares.
    Raises:
        ValueError: a row has no ending, or one at position 0, which nothing predicts.
    """
    if ending_mask[:, 0].any() or not ending_mask.any(dim=1).all():
        raise ValueError("each row needs an ending of one token or more, after a context of one token or more")
    is_scored = ending_mask[:, 1:]  # (R, T-1) the logits at t score the token at t+1
    targets = tokens[:, 1:][is_scored]  # (M,) of all M ending tokens
    nll = torch.zeros(is_scored.shape, dtype=torch.float32, device=logits.device)
    nll[is_scored] = F.cross_entropy(logits[:, :-1][is_scored].float(), targets, reduction="none")
    return nll.sum(dim=1), is_scored.sum(dim=1)


def score_items(model, encoded_items, batch_size: int, device, progress: bool = False) -> list[dict]:
    """Scores of each item, in the order given.

    Args:
        model: a transformers causal LM on `device`. It runs in eval mode, and gets back the mode it came in; a
            compiled one runs eagerly, because nearly every batch has a shape of its own. Autocast is the caller's.
        encoded_items: list of EncodedItem.
        batch_size: items a forward pass, each of four rows.
        device: where the batches go.
        progress: show a progress bar.
    Returns:
        for each item {"summed_nll": [4 floats], "ending_tokens": [4 ints]}, see `score_endings`.
    """
    order = longest_first(encoded_items)
    scores: list = [None] * len(order)
    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),  # not inference_mode: FSDP keeps tensors that it makes in here
            torch.compiler.set_stance("force_eager"),
            tqdm(total=len(order), desc="HellaSwag", unit=" items", disable=not progress) as bar,
        ):
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                summed_nll, ending_tokens = score_batch(model, [encoded_items[i] for i in batch], device)
                for i, nll, counts in zip(batch, summed_nll, ending_tokens):
                    scores[i] = {"summed_nll": nll, "ending_tokens": counts}
                bar.update(len(batch))
    finally:
        model.train(was_training)
    return scores


def longest_first(encoded_items: list[EncodedItem]) -> list[int]:
    """Indices of the items, longest first.

    Neighbours are then of one length, which leaves little padding; a batch that is too large for the memory fails in
    the first second, not in the last; and the progress bar errs on the safe side.
    """
    return sorted(range(len(encoded_items)), key=lambda i: -encoded_items[i].length)


def score_batch(model, items: list[EncodedItem], device) -> tuple[list, list]:
    """`score_endings` of several items in one forward pass, as nested lists: items x endings."""
    tokens, ending_mask = collate(items)
    T = tokens.shape[1]
    # No row's ending starts before `first + 1`: the model may leave out the logits of what comes before `first`.
    first = int(ending_mask.any(dim=0).nonzero()[0]) - 1
    can_leave_out = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    kept = {"logits_to_keep": T - first} if can_leave_out else {}

    tokens, ending_mask = tokens.to(device), ending_mask.to(device)
    logits = model(input_ids=tokens, use_cache=False, **kept).logits
    summed_nll, ending_tokens = score_endings(logits[:, first - T :], tokens[:, first:], ending_mask[:, first:])
    return summed_nll.view(-1, ENDINGS).tolist(), ending_tokens.view(-1, ENDINGS).tolist()


def predict(record: dict) -> tuple[int, int]:
    """The ending with the lowest sum and the one with the lowest mean per token; among equals the first."""
    nll, counts = record["summed_nll"], record["ending_tokens"]
    return min(range(ENDINGS), key=lambda e: nll[e]), min(range(ENDINGS), key=lambda e: nll[e] / counts[e])


def evaluate_hellaswag(model, encoded_items, accelerator, batch_size: int, progress: bool = False):
    """HellaSwag over all processes of the accelerator. Every process calls it, and every process gets the result.

    Args:
        model: as for `score_items`: the plain module or the prepared one, on accelerator.device. The plain one of DDP
            is faster, as DDP hides that it could leave out logits.
        encoded_items: the same list of EncodedItem on every process; encode once, evaluate often.
        batch_size: items a forward pass and process.
        progress: show a progress bar, on the main process.
    Returns:
        metrics: hellaswag_acc, hellaswag_acc_norm, hellaswag_acc_stderr, hellaswag_acc_norm_stderr, hellaswag_items.
        records: for each item, in the order given, its label, summed_nll and ending_tokens.
    Raises:
        UserError: a score is not finite; the model's weights are broken, or its precision is too low.
    """
    order, world, rank = longest_first(encoded_items), accelerator.num_processes, accelerator.process_index
    # Every world-th item of the sorted list is as much work for each process. The shares are equally long, a few items
    # being scored twice: a sharded model hangs if one process runs a forward pass more than the others.
    share = [order[(rank + world * k) % len(order)] for k in range(math.ceil(len(order) / world))]
    with accelerator.autocast():
        scores = score_items(
            model,
            [encoded_items[i] for i in share],
            batch_size,
            accelerator.device,
            progress and accelerator.is_main_process,
        )
    score_of = dict(gather_object(list(zip(share, scores))))
    records = [{"label": item.label, **score_of[i]} for i, item in enumerate(encoded_items)]

    broken = sum(not all(map(math.isfinite, record["summed_nll"])) for record in records)
    if broken:
        raise UserError(
            f"HellaSwag: the scores of {broken} of {len(records)} items are not finite; the model's weights are "
            "broken, or its precision is too low (float32 shows which)"
        )
    metrics = [compute_metric(records) if accelerator.is_main_process else None]
    return broadcast_object_list(metrics)[0], records


def compute_metric(records: list[dict]) -> dict:
    """The metrics of `evaluate_hellaswag` from its records, by the `evaluate` metric beside this file."""
    import evaluate  # takes a second, which most runs of the training loop need not spend

    metric = evaluate.load(str(METRIC_FOLDER), keep_in_memory=True)
    result = metric.compute(
        summed_nll=[record["summed_nll"] for record in records],
        ending_tokens=[record["ending_tokens"] for record in records],
        references=[record["label"] for record in records],
    )
    n = result.pop("n")
    return {f"hellaswag_{name}": value for name, value in result.items()} | {"hellaswag_items": n}


def with_error(share: float, standard_error: float | None) -> str:
    return f"{share:.4f} ± " + ("n/a" if standard_error is None else f"{standard_error:.4f}")
