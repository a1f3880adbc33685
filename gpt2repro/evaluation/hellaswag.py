"""HellaSwag in build-nanogpt's completion style: to which of four endings does the model give the lowest loss?

    items    = load_items("hellaswag_val.jsonl.gz")       # or None: Rowan/hellaswag from the Hub
    encoded  = [encode_item(item, tokenizer, max_length=1024) for item in items]
    metrics, records = evaluate_hellaswag(model, encoded, accelerator, batch_size=16)

A row is the context's tokens followed by those of " " + ending, encoded separately; an ending's score is its negative
log-likelihood given the context. `acc` predicts the ending with the lowest sum, `acc_norm` the one with the lowest mean
per token. Source: build-nanogpt hellaswag.py, render_example and evaluate.

lm-evaluation-harness uses another protocol: it puts the activity before the context, strips WikiHow's [header], [title]
and [step] marks, which the published set contains, and divides by the ending's characters. The scores of the two
protocols are not comparable.

An item is a dict as published, with ctx (str), endings (4 str) and label (int); other fields are kept.
"""

import gzip
import inspect
import json
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub import HfApi, constants
from tqdm import tqdm

from gpt2repro.data.hub import HUB_TIMEOUT
from gpt2repro.errors import UserError, first_line


HUB_ID = "Rowan/hellaswag"
OPENAI_GPT2 = {"hellaswag_acc": 0.2859, "hellaswag_acc_norm": 0.2955}  # 124M, full set; build-nanogpt hellaswag.py
FULL_SET = 10_042  # items of the validation set
ENDINGS = 4


def load_items(data: str | None = None, limit: int | None = None, flag: str = "--data") -> list[dict]:
    """The validation set, or its first `limit` items.

    Args:
        data: a local .jsonl or .jsonl.gz file; None means Rowan/hellaswag from the Hub.
        flag: by which the user gives `data`, for error messages.
    Raises:
        UserError: no such file, an invalid line, or the Hub is unreachable.
    """
    if data is not None:
        return read_items(data, limit, flag)
    try:
        _ask_hub_once()
        rows = datasets.load_dataset(HUB_ID, split="validation")
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(_cannot_download(error, flag)) from error
    wanted = len(rows) if limit is None else min(limit, len(rows))
    return [check_item(row, f"{HUB_ID}, row {number}") for number, row in enumerate(rows.select(range(wanted)))]


def download_problems(flag: str) -> list[str]:
    """One line if `load_items` cannot get the set from the Hub.

    Args:
        flag: as for `load_items`.
    """
    try:
        _ask_hub_once()
    except OSError as error:
        return [_cannot_download(error, flag)]
    return []


def _cannot_download(error: Exception, flag: str) -> str:
    return (
        f"HellaSwag ({HUB_ID}) cannot be downloaded from the Hub ({first_line(error)}); check the network, or give "
        f"a local copy of hellaswag_val.jsonl with {flag} FILE"
    )


def _ask_hub_once() -> None:
    """Raise a ConnectionError if the set is not in the cache and the Hub cannot be reached: `load_dataset` would try
    again for half a minute."""
    cached = Path(datasets.config.HF_DATASETS_CACHE) / HUB_ID.replace("/", "___")
    if cached.is_dir() or Path(HUB_ID).is_dir() or constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().dataset_info(HUB_ID, timeout=HUB_TIMEOUT)
    except Exception as error:  # network and permission errors share no base class
        raise ConnectionError(first_line(error)) from error


def read_items(path: str, limit: int | None = None, flag: str = "--data") -> list[dict]:
    """The items of a .jsonl or .jsonl.gz file, one JSON object per line; reading stops after `limit` items.

    Raises:
        UserError: the file cannot be read or is empty, or a line is invalid; the message names the line.
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
    except (OSError, EOFError, zlib.error) as error:  # the last two: a truncated or damaged gzip file
        raise UserError(
            f"{path} cannot be read ({first_line(error)}); {flag} takes a .jsonl or .jsonl.gz file"
        ) from error
    if not items:
        raise UserError(f"{path} holds no items; {flag} takes one JSON object per line")
    return items


def parse_line(line: bytes, where: str) -> dict:
    """One line of the file as an item; see `check_item`."""
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({first_line(error)}); correct or remove the line") from error
    return check_item(item, where)


def check_item(item: dict, where: str) -> dict:
    """The item with its label as an int; the Hub's copy stores it as text.

    Args:
        where: file and line of the item, for the message.
    Raises:
        UserError: the item cannot be scored.
    """
    problem = item_problem(item)
    if problem:
        raise UserError(f"{where}: {problem}; correct or remove the line")
    return {**item, "label": int(item["label"])}


def item_problem(item) -> str | None:
    """Why an item cannot be scored; None if it can."""
    if not isinstance(item, dict):
        return "not a JSON object"
    context, endings, label = item.get("ctx"), item.get("endings"), item.get("label")
    if not is_text(context):
        return f"ctx is {context!r} and must be a non-empty text of whole characters"
    if not isinstance(endings, list) or len(endings) != ENDINGS or not all(map(is_text, endings)):
        return f"endings is {endings!r} and must be a list of {ENDINGS} non-empty texts of whole characters"
    if str(label) not in map(str, range(ENDINGS)):
        return f"label is {label!r} and must be 0 to {ENDINGS - 1} (the test set has no labels)"
    return None


def is_text(value) -> bool:
    """Half a surrogate pair, which JSON can hold, is no character that a tokenizer knows."""
    return isinstance(value, str) and bool(value.strip()) and not re.search(r"[\ud800-\udfff]", value)


@dataclass(frozen=True)
class EncodedItem:
    """One item as tokens.

    rows: four lists of token ids, context and ending.
    ending_tokens: for each row, how many of its last tokens belong to the ending.
    label: index of the true ending.
    cut: at least one row was too long for the model and was truncated, see `encode_item`.
    """

    rows: list[list[int]]
    ending_tokens: list[int]
    label: int
    cut: bool

    @property
    def length(self) -> int:
        """Tokens of the longest row, which determines the cost of a batch with this item."""
        return max(map(len, self.rows))


def encode_item(item: dict, tokenizer, max_length: int | None = None) -> EncodedItem:
    """The four rows of an item, without special tokens.

    A row longer than max_length is truncated at the start of its context, which is farthest from the scored tokens. One
    token of context is always kept, since the ending's first token needs one to be predicted from; an ending that still
    does not fit is truncated at its end. GPT-2's 1,024 positions fit every item (the longest has 149 tokens).

    Args:
        item: as `load_items` returns it.
        tokenizer: a transformers tokenizer.
        max_length: positions of the model, at least 2; None means no limit.
    Raises:
        UserError: the tokenizer returns no token for the context or for an ending.
    """
    texts = [item["ctx"], *(" " + ending for ending in item["endings"])]
    context, *endings = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    for text, tokens in zip(texts, [context, *endings]):
        if not tokens:
            raise UserError(
                f"the tokenizer has no token for {text!r}; it does not suit HellaSwag, or the item is invalid"
            )

    longest_row = max(len(context) + len(ending) for ending in endings)
    limit = max_length or longest_row
    fitted = [ending[: limit - 1] for ending in endings]
    return EncodedItem(
        rows=[context[-(limit - len(ending)) :] + ending for ending in fitted],
        ending_tokens=[len(ending) for ending in fitted],
        label=item["label"],
        cut=longest_row > limit,
    )


def collate(items: list[EncodedItem]) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of several items as one batch, right-padded with token 0.

    Padding needs no attention mask: attention is causal, so no token sees what is to its right, and the logits at
    padding positions are never read.

    Returns:
        tokens: (R, T) int64; R = 4 rows per item, T = length of the longest.
        ending_mask: (R, T) bool, True on ending tokens.
    """
    rows = [row for item in items for row in item.rows]
    ending_lengths = [length for item in items for length in item.ending_tokens]
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    ending_mask = torch.zeros_like(tokens, dtype=torch.bool)
    for r, (row, ending_length) in enumerate(zip(rows, ending_lengths)):
        tokens[r, : len(row)] = torch.tensor(row)
        ending_mask[r, len(row) - ending_length : len(row)] = True
    return tokens, ending_mask


def score_endings(logits, tokens, ending_mask):
    """Negative log-likelihood of each row's ending, given the tokens before it.

    The logits at one position predict the token at the next:

        position       0      1      2      3      4      5
        tokens       [ A     man    is  |  on     a     pad ]
        ending_mask    .      .      .     x      x      .
        logits         0      1      2     3      4      5
                                     |     |
                                     |     +--- scores "a"
                                     +--------- scores "on"

    Only the scored logits are converted to float32: all of them would be the evaluation's largest tensor.

    Args:
        logits: (R, T, V) float of any precision, unshifted; this function shifts them.
        tokens: (R, T) int64, right-padded.
        ending_mask: (R, T) bool, True on ending tokens.
    Returns:
        summed_nll: (R,) float32, nats, summed over the ending's tokens; acc predicts the lowest.
        ending_tokens: (R,) int64; summed_nll / ending_tokens is what acc_norm compares.
    Raises:
        ValueError: a row has no ending, or an ending token at position 0, which no logits predict.
    """
    if ending_mask[:, 0].any() or not ending_mask.any(dim=1).all():
        raise ValueError("each row needs an ending of at least one token after a context of at least one token")
    is_scored = ending_mask[:, 1:]  # (R, T-1); the logits at t score the token at t+1
    targets = tokens[:, 1:][is_scored]  # (M,), all ending tokens of the batch
    nll = torch.zeros(is_scored.shape, dtype=torch.float32, device=logits.device)
    nll[is_scored] = F.cross_entropy(logits[:, :-1][is_scored].float(), targets, reduction="none")
    return nll.sum(dim=1), is_scored.sum(dim=1)


def score_items(model, encoded_items, batch_size: int, device, progress: bool = False) -> list[dict]:
    """The scores of each item, in the given order.

    Args:
        model: a transformers causal LM on `device`. It runs in eval mode and returns to its previous mode; a compiled
            model runs eagerly, because nearly every batch has a new shape. Autocast is left to the caller.
        encoded_items: list of EncodedItem.
        batch_size: items per forward pass, four rows each.
        device: where the batches are moved.
        progress: show a progress bar.
    Returns:
        For each item {"summed_nll": [4 floats], "ending_tokens": [4 ints]}, see `score_endings`.
    """
    order = longest_first(encoded_items)
    scores: list = [None] * len(order)
    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),  # not inference_mode: FSDP keeps tensors that it creates in here
            torch.compiler.set_stance("force_eager"),
            tqdm(total=len(order), desc="HellaSwag", unit=" items", disable=not progress) as bar,
        ):
            for start in range(0, len(order), batch_size):
                indices = order[start : start + batch_size]
                summed_nll, ending_tokens = score_batch(model, [encoded_items[i] for i in indices], device)
                for i, item_nll, item_tokens in zip(indices, summed_nll, ending_tokens):
                    scores[i] = {"summed_nll": item_nll, "ending_tokens": item_tokens}
                bar.update(len(indices))
    finally:
        model.train(was_training)
    return scores


def longest_first(encoded_items: list[EncodedItem]) -> list[int]:
    """Indices of the items, longest first.

    Neighbours then have similar lengths, which minimizes padding; a batch that does not fit into memory fails at the
    start rather than at the end; and the progress bar overestimates the remaining time.
    """
    return sorted(range(len(encoded_items)), key=lambda i: -encoded_items[i].length)


def score_batch(model, items: list[EncodedItem], device) -> tuple[list, list]:
    """`score_endings` of several items in one forward pass, as nested lists: items x endings."""
    tokens, ending_mask = collate(items)
    T = tokens.shape[1]
    # No ending starts before `first + 1`, so logits before `first` need not be computed.
    first = int(ending_mask.any(dim=0).nonzero()[0]) - 1
    has_logits_to_keep = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    kept = {"logits_to_keep": T - first} if has_logits_to_keep else {}

    tokens, ending_mask = tokens.to(device), ending_mask.to(device)
    logits = model(input_ids=tokens, use_cache=False, **kept).logits
    summed_nll, ending_tokens = score_endings(logits[:, first - T :], tokens[:, first:], ending_mask[:, first:])
    return summed_nll.view(-1, ENDINGS).tolist(), ending_tokens.view(-1, ENDINGS).tolist()


def predict(record: dict) -> tuple[int, int]:
    """The index of the ending with the lowest sum, and with the lowest mean per token; the first in a tie."""
    summed_nll = record["summed_nll"]
    mean_nll = [nll / tokens for nll, tokens in zip(summed_nll, record["ending_tokens"])]
    return summed_nll.index(min(summed_nll)), mean_nll.index(min(mean_nll))


def evaluate_hellaswag(model, encoded_items, accelerator, batch_size: int, progress: bool = False):
    """HellaSwag over all ranks of the accelerator. Every rank calls it, and every rank gets the result.

    Args:
        model: as for `score_items`, on accelerator.device: the plain module or the prepared one. For DDP the plain one
            is faster: the wrapper hides that logits can be left out.
        encoded_items: the same list of EncodedItem on every rank; encode once, evaluate often.
        batch_size: items per forward pass and rank.
        progress: show a progress bar on the main process.
    Returns:
        metrics: hellaswag_acc, hellaswag_acc_norm, hellaswag_acc_stderr, hellaswag_acc_norm_stderr, hellaswag_items.
        records: for each item, in the given order, its label, summed_nll and ending_tokens.
    Raises:
        UserError: a score is not finite; the model's weights are broken, or its precision is too low.
    """
    indices = indices_of_rank(encoded_items, accelerator.process_index, accelerator.num_processes)
    rank_items = [encoded_items[i] for i in indices]
    show_progress = progress and accelerator.is_main_process
    with accelerator.autocast():
        rank_scores = score_items(model, rank_items, batch_size, accelerator.device, show_progress)
    scores = dict(gather_object(list(zip(indices, rank_scores))))
    records = [{"label": item.label, **scores[i]} for i, item in enumerate(encoded_items)]

    broken = sum(not all(map(math.isfinite, record["summed_nll"])) for record in records)
    if broken:
        raise UserError(
            f"HellaSwag: the scores of {broken} of {len(records)} items are not finite; the model's weights are "
            "broken, or its precision is too low (float32 shows which)"
        )
    metrics = [compute_metric(records) if accelerator.is_main_process else None]
    return broadcast_object_list(metrics)[0], records


def indices_of_rank(encoded_items: list[EncodedItem], rank: int, world_size: int) -> list[int]:
    """The items that a rank scores: every world_size-th of the sorted list, so that all ranks have the same work.

    All ranks get equally many, for which a few items are scored twice: a sharded model hangs if one rank runs more
    forward passes than the others.
    """
    order = longest_first(encoded_items)
    per_rank = math.ceil(len(order) / world_size)
    return [order[(rank + world_size * k) % len(order)] for k in range(per_rank)]


def compute_metric(records: list[dict]) -> dict:
    """The metrics of `evaluate_hellaswag` from its records, by the formula of the `evaluate` metric in
    metrics/hellaswag. `evaluate` itself is left out: it needs a cache that it can write to, and in the middle of a run
    it is too late to find out that there is none."""
    # Importing it imports `evaluate`, which takes a second that most training runs need not spend.
    from gpt2repro.evaluation.metrics.hellaswag.hellaswag import accuracies

    result = accuracies(
        summed_nll=[record["summed_nll"] for record in records],
        ending_tokens=[record["ending_tokens"] for record in records],
        references=[record["label"] for record in records],
    )
    items = result.pop("n")
    metrics = {f"hellaswag_{name}": value for name, value in result.items()}
    metrics["hellaswag_items"] = items
    return metrics


def with_error(accuracy: float, standard_error: float | None) -> str:
    """As in "0.2955 ± 0.0046"; a single item has no standard error."""
    error = "n/a" if standard_error is None else f"{standard_error:.4f}"
    return f"{accuracy:.4f} ± {error}"
