"""LAMBADA, OpenAI's variant: which word ends a passage?

    items = read_lambada("lambada_test.jsonl")          # or hub_texts(HUB, ...)
    score = measure_lambada(model, tokenizer, items, accelerator)

The last word, with the blank before it, is predicted from all words before. `acc` counts the items of which every token
of the word is the model's likeliest; `perplexity` is e to the mean loss of a word (the sum over its tokens). This is
lm-evaluation-harness' task lambada_openai: OpenAI's copy of the test set keeps the passages' case and punctuation, and
a passage is split at its last blank. The GPT-2 paper's accuracies are not of this kind: for gpt2 it has 45.99%, which
others come close to only by counting the last token instead of the whole word (openai/gpt-2 issue 131).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from gpt2repro.errors import UserError
from gpt2repro.evaluation.bootstrap import Ratio
from gpt2repro.evaluation.perplexity import (
    DEFAULT_WINDOWS,
    Row,
    WindowSettings,
    check_characters,
    model_positions,
    score_rows,
    start_token,
)
from gpt2repro.evaluation.rows import UnsuitableTokenizer
from gpt2repro.evaluation.task_data import HubSource, read_json_lines


HUB = HubSource("EleutherAI/lambada_openai", "default", "test", "text")
FULL_SET = 5_153  # items


@dataclass(frozen=True)
class LambadaScore:
    """Both (N,), one value an item.

    nll: float64, nats of the last word.
    correct: float64, 1 if every token of it is the likeliest.
    """

    nll: np.ndarray
    correct: np.ndarray

    def accuracy(self) -> Ratio:
        return Ratio(self.correct, np.ones_like(self.correct))

    def perplexity(self) -> Ratio:
        return Ratio(self.nll, np.ones_like(self.nll), "perplexity")


def read_lambada(path: str | Path, what: str) -> list[str]:
    """The passages of a .jsonl or .jsonl.gz file with one {"text": ...} a line, as OpenAI published the set.

    Raises:
        UserError: the file cannot be read or is empty, or a line is invalid; the message names the line.
    """
    items = [check_passage(value, where) for where, value in read_json_lines(path, what)]
    if not items:
        raise UserError(f'{what}: holds no items; give a file with one {{"text": ...}} a line')
    return items


def check_passage(value: Any, where: str) -> str:
    """The text of an item; UserError if it cannot be scored."""
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str) or re.search(r"[\ud800-\udfff]", text):
        raise UserError(f'{where}: not {{"text": "..."}} with whole characters; correct or remove the line')
    if not all(part.strip() for part in split_passage(text)):
        raise UserError(f"{where}: {text[:40]!r} does not end with a blank and a word; correct or remove the line")
    return text


def split_passage(text: str) -> tuple[str, str]:
    """The passage without its last word, and the blank and the word."""
    context, _, word = text.rpartition(" ")
    return context, f" {word}"


def encode_passage(tokenizer: Any, text: str, positions: int) -> Row:
    """The tokens of a passage, of which those of its last word are scored.

    The passage is encoded as a whole, with what the tokenizer puts before every text, and cut after as many tokens as
    its beginning has when encoded alone, without blanks at its end. One that is too long for the model loses its first
    tokens. Source: lm_eval/api/model.py, TemplateLM._encode_pair.
    """
    context, _ = split_passage(text)
    whole, beginning = tokenizer([text, context.rstrip()], verbose=False)["input_ids"]
    scored = len(whole) - len(beginning)
    if not beginning:
        prefix = start_token(tokenizer)
        whole = whole if prefix is None else [prefix, *whole]
    ids = np.array(whole[-(positions + 1) :], np.int64)
    scored = min(scored, len(ids) - 1)
    if scored < 1:
        raise UnsuitableTokenizer(f"the tokenizer has no tokens for the last word of {text[:40]!r}")
    return Row(ids, scored)


def measure_lambada(
    model: Any, tokenizer: Any, items: list[str], accelerator: Accelerator, settings: WindowSettings = DEFAULT_WINDOWS
) -> LambadaScore:
    """Score the last words. All ranks call it and get the same result.

    Raises:
        UnsuitableTokenizer: the tokenizer has no token for a character: a last word may be easier without it.
    """
    check_characters(tokenizer, items)
    positions = model_positions(model)
    rows = [encode_passage(tokenizer, text, positions) for text in items]
    scores = score_rows(model, rows, accelerator, settings, "LAMBADA", with_likeliest=True)
    return LambadaScore(
        nll=np.array([score.nll.sum(dtype=np.float64) for score in scores]),
        correct=np.array([score.likeliest.all() for score in scores], np.float64),
    )
