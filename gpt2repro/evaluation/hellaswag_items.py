"""HellaSwag's items: reading and checking them. Nothing here scores one, so torch is not imported.

An item is a dict as published, with ctx (str), endings (4 str) and label (int). The harness style also reads
activity_label, and ctx_a and ctx_b, the context's last, unfinished sentence; `split_context` finds the two in a copy
of the set that lacks them. source_id tells ActivityNet's items from WikiHow's. Other fields are kept.
"""

import difflib
import itertools
import re
from collections.abc import Sequence

from gpt2repro.errors import UserError
from gpt2repro.evaluation import task_data


HUB_ID = "Rowan/hellaswag"
HUB = task_data.HubSource(HUB_ID, None, "validation")
FULL_SET = 10_042  # items of the validation set
ENDINGS = 4
STYLES = ("completion", "harness")
WIKIHOW_MARK = "[header]"


def load_items(
    data: str | None = None, limit: int | None = None, flag: str = "--data", styles: Sequence[str] = ()
) -> list[dict]:
    """The validation set, or its first `limit` items.

    Args:
        data: a local .jsonl or .jsonl.gz file; None means Rowan/hellaswag from the Hub.
        flag: by which the user gives `data`, for error messages.
        styles: in which the items will be scored; those for the harness need an activity_label.
    Raises:
        UserError: no such file, an invalid line, or the Hub is unreachable.
    """
    if data is not None:
        return read_items(data, limit, flag, styles)
    rows = task_data.hub_rows(HUB, "HellaSwag", _remedy(flag))
    wanted = len(rows) if limit is None else min(limit, len(rows))
    return [check_item(row, f"{HUB_ID}, row {number}", styles) for number, row in enumerate(rows.select(range(wanted)))]


def download_problems(flag: str) -> list[str]:
    """One line if `load_items` cannot get the set from the Hub.

    Args:
        flag: as for `load_items`.
    """
    return task_data.download_problems(HUB, "HellaSwag", _remedy(flag))


def _remedy(flag: str) -> str:
    return f"give a local copy of hellaswag_val.jsonl with {flag} FILE"


def read_items(path: str, limit: int | None = None, flag: str = "--data", styles: Sequence[str] = ()) -> list[dict]:
    """The items of a .jsonl or .jsonl.gz file, one JSON object per line; reading stops after `limit` items.

    Raises:
        UserError: the file cannot be read or is empty, or a line is invalid; the message names the line.
    """
    lines = task_data.read_json_lines(path, f"{flag} {path}")
    items = [check_item(item, where, styles) for where, item in itertools.islice(lines, limit)]
    if not items:
        raise UserError(f"{flag} {path}: holds no items; give a file with one JSON object per line")
    return items


def check_item(item: dict, where: str, styles: Sequence[str] = ()) -> dict:
    """The item with its label as an int; the Hub's copy stores it as text.

    Args:
        where: file and line of the item, for the message.
    Raises:
        UserError: the item cannot be scored.
    """
    problem = item_problem(item, styles)
    if problem:
        raise UserError(f"{where}: {problem}; correct or remove the line")
    return {**item, "label": int(item["label"])}


def item_problem(item, styles: Sequence[str] = ()) -> str | None:
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
    if "harness" in styles:
        return harness_problem(item)
    return None


def harness_problem(item: dict) -> str | None:
    """Why an item that can be scored in completion style cannot be in harness style; None if it can."""
    activity, ctx_a, ctx_b = (item.get(name) for name in ("activity_label", "ctx_a", "ctx_b"))
    if not is_text(activity):
        return f"activity_label is {activity!r} and must be a text in harness style (completion style needs none)"
    if (ctx_a is not None and not is_text(ctx_a)) or (ctx_b and not is_text(ctx_b)):
        return f"ctx_a is {ctx_a!r} and ctx_b {ctx_b!r}; both must be texts of whole characters"
    for ending in item["endings"]:
        if not clean(ending).strip():
            return f"the ending {ending!r} has nothing but marks, which are removed in harness style"
    return None


def is_text(value) -> bool:
    """Half a surrogate pair, which JSON can hold, is no character that a tokenizer knows."""
    return isinstance(value, str) and bool(value.strip()) and not re.search(r"[\ud800-\udfff]", value)


def has_wikihow_marks(items: list[dict]) -> bool:
    """Whether a copy of the set has the marks that it was published with; some lack them."""
    return any(WIKIHOW_MARK in item["ctx"] for item in items)


def split_context(item: dict) -> tuple[str, str]:
    """ctx_a and ctx_b, which make up ctx: whole sentences, and one that is unfinished or empty.

    Where an item lacks them, the unfinished sentence is what follows the last ". ", "! " or "? " of a ctx that has none
    of these marks later. In the validation set these are ActivityNet's items, and all of them.
    """
    if item.get("ctx_a") is not None and item.get("ctx_b") is not None:
        return item["ctx_a"], item["ctx_b"]
    unfinished = re.search(r"(?<=[.!?]) [^.!?]*[^.!?\s]\s*$", item["ctx"])
    if unfinished is None:
        return item["ctx"], ""
    return item["ctx"][: unfinished.start()], unfinished[0].strip()


def clean(text: str) -> str:
    """The text without WikiHow's [header], [title] and [step]; a title ends with a full stop."""
    text = text.strip().replace(" [title]", ". ")
    text = re.sub(r"\[.*?\]", "", text)
    return text.replace("  ", " ")


def style_problem(style: str, known: Sequence[str] = STYLES) -> str | None:
    """What is wrong with the name of a style; None if it is known."""
    if style in known:
        return None
    nearest = difflib.get_close_matches(style, known, n=1)
    return f"no such style; did you mean {nearest[0]}?" if nearest else f"no such style; choose {', '.join(known)}"
