"""HellaSwag in two conventions: which of four endings of a context does the model find likeliest?

    items  = load_items("hellaswag_val.jsonl.gz")       # or None: Rowan/hellaswag from the Hub
    scores = score_hellaswag(model, tokenizer, items, accelerator, batch_size=16)
    scores["completion"].metrics(), scores["harness"].metrics()

The two styles differ in the text, in its tokens and in what acc_norm divides by, so their scores are not comparable:

                 completion (build-nanogpt)         harness (lm-evaluation-harness, task hellaswag)
    context      ctx                                activity_label: ctx_a Ctx_b; WikiHow's marks removed
    ending       as it is                           WikiHow's marks removed
    tokens       of the context, and of " " +       of the whole text, split after as many tokens as the context
                 ending, encoded apart              alone has
    acc          predicts the ending with the lowest negative log-likelihood, summed over its tokens
    acc_norm     lowest mean per token              lowest sum divided by the ending's characters
    acc_bytes                                       lowest sum divided by the ending's bytes in UTF-8
    too long     the row keeps its last             one token more, as nothing is predicted from a row's last
                 max_length tokens

Sources: build-nanogpt hellaswag.py, render_example and evaluate; lm-evaluation-harness 0.4.13
lm_eval/tasks/hellaswag/utils.py, lm_eval/api/model.py (_encode_pair) and lm_eval/api/task.py (process_results).
hellaswag_items.py says what an item is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from gpt2repro.errors import UserError, refuse
from gpt2repro.evaluation.hellaswag_items import ENDINGS, STYLES, clean, harness_problem, split_context, style_problem
from gpt2repro.evaluation.multiple_choice import Question, score_questions
from gpt2repro.evaluation.rows import UnsuitableTokenizer, positions


# Rows of a forward pass. With GPT-2's vocabulary the logits of a row take 25 MB in float32; a CPU slows down where they
# leave its caches, and with a single row its matrix products are too small.
BATCH_SIZE = 32
CPU_BATCH_SIZE = 8
SOURCES = {"activitynet": "ActivityNet", "wikihow": "WikiHow"}  # source_id begins with the key and "~"


def harness_texts(item: dict) -> tuple[str, list[str]]:
    """The context and the endings as lm-evaluation-harness has them."""
    ctx_a, ctx_b = split_context(item)
    context = clean(f"{item['activity_label']}: {ctx_a} {ctx_b.capitalize()}")
    return context, [clean(ending) for ending in item["endings"]]


@dataclass(frozen=True)
class EncodedItem:
    """One item as tokens, in one of the styles.

    questions: the context and its four endings; four contexts with one ending each if rows had to be `cut`, see `fit`.
    label: index of the true ending.
    ending_tokens, ending_characters, ending_bytes: of each ending; tokens after the cut.
    source: "ActivityNet" or "WikiHow"; None if the item does not say.
    """

    questions: list[Question]
    label: int
    ending_tokens: list[int]
    ending_characters: list[int]
    ending_bytes: list[int]
    source: str | None
    cut: bool


def encode_item(item: dict, tokenizer, max_length: int | None = None, style: str = "completion") -> EncodedItem:
    """An item as tokens.

    Args:
        item: as `load_items` returns it.
        tokenizer: a transformers tokenizer. The harness style puts before the context what the tokenizer puts before
            every text, which is nothing for GPT-2's; the completion style puts nothing there.
        max_length: positions of the model, at least 2; None means no limit.
        style: one of STYLES.
    Raises:
        UserError: the tokenizer returns no token for the context or for an ending; or, in harness style, the item has
            no activity_label, or an ending of nothing but marks.
    """
    if style == "completion":
        texts = item["endings"]
        context, endings = tokenize_apart(item["ctx"], texts, tokenizer)
        limit = max_length
    else:
        if problem := harness_problem(item):
            raise UserError(f"{problem}; such an item has a score in completion style only")
        context_text, texts = harness_texts(item)
        context, endings = tokenize_together(context_text, texts, tokenizer)
        limit = None if max_length is None else max_length + 1
    questions, cut = fit(context, endings, limit)
    return EncodedItem(
        questions=questions,
        label=item["label"],
        ending_tokens=[len(ending) for question in questions for ending in question.endings],
        ending_characters=[len(text) for text in texts],
        ending_bytes=[len(text.encode()) for text in texts],
        source=SOURCES.get(str(item.get("source_id")).partition("~")[0]),
        cut=cut,
    )


def tokenize_apart(context: str, endings: list[str], tokenizer) -> tuple[list[int], list[list[int]]]:
    """The tokens of the context, and of " " and each ending, without special tokens."""
    texts = [context, *(" " + ending for ending in endings)]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    check_tokens(texts, encoded)
    return encoded[0], encoded[1:]


def tokenize_together(context: str, endings: list[str], tokenizer) -> tuple[list[int], list[list[int]]]:
    """The tokens of the context without the spaces at its end, and those by which the whole texts are longer.

    Source: lm-evaluation-harness lm_eval/api/model.py, _encode_pair.
    """
    texts = [context.rstrip(), *(f"{context} {ending}" for ending in endings)]
    encoded = tokenizer(texts, verbose=False)["input_ids"]
    tokens = [encoded[0], *(whole[len(encoded[0]) :] for whole in encoded[1:])]
    check_tokens(texts, tokens)
    return tokens[0], tokens[1:]


def check_tokens(texts: list[str], encoded: list[list[int]]) -> None:
    for text, tokens in zip(texts, encoded):
        if not tokens:
            raise UnsuitableTokenizer(
                f"the tokenizer has no token for {text!r}; it does not suit HellaSwag, or the item is invalid"
            )


def fit(context: list[int], endings: list[list[int]], limit: int | None) -> tuple[list[Question], bool]:
    """The context with its endings, and whether a row had to be cut to `limit` tokens.

    A row that is too long loses the start of its context, which is farthest from the scored tokens; the endings then
    have different contexts. One token of context is always kept, since the ending's first token needs one to be
    predicted from; an ending that still does not fit is truncated at its end. GPT-2's 1,024 positions fit every item
    (the longest has 149 tokens).
    """
    longest_row = len(context) + max(map(len, endings))
    if limit is None or longest_row <= limit:
        return [Question(context, endings)], False
    fitted = [ending[: limit - 1] for ending in endings]
    return [Question(context[-(limit - len(ending)) :], [ending]) for ending in fitted], True


@dataclass(frozen=True, eq=False)
class Scores:
    """What a model's scores of some items say, in one style.

    style: one of STYLES.
    items: the n items.
    summed_nll: (n, 4) float64, nats: negative log-likelihood of each ending, summed over its tokens.
    """

    style: str
    items: list[EncodedItem]
    summed_nll: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """(n,) int: the true endings."""
        return np.array([item.label for item in self.items])

    @property
    def predictions(self) -> dict[str, np.ndarray]:
        """(n,) int for each of acc, acc_norm and, in harness style, acc_bytes: the ending predicted by that rule; the
        first in a tie."""
        # Importing it imports `evaluate`, which takes a second that most training runs need not spend.
        from gpt2repro.evaluation.metrics.hellaswag.hellaswag import predict

        divisors: dict[str, Sequence | np.ndarray] = {"acc": np.ones_like(self.summed_nll)}
        if self.style == "completion":
            divisors["acc_norm"] = [item.ending_tokens for item in self.items]
        else:
            divisors["acc_norm"] = [item.ending_characters for item in self.items]
            divisors["acc_bytes"] = [item.ending_bytes for item in self.items]
        return {name: predict(self.summed_nll, divisor) for name, divisor in divisors.items()}

    @property
    def acc(self) -> np.ndarray:
        """(n,) bool: which items acc counts as right."""
        return self.predictions["acc"] == self.labels

    @property
    def acc_norm(self) -> np.ndarray:
        """(n,) bool: which items acc_norm counts as right."""
        return self.predictions["acc_norm"] == self.labels

    def metrics(self, source: str | None = None) -> dict:
        """The shares of right predictions over all items, or over those of one source.

        Returns:
            hellaswag_acc, hellaswag_acc_norm and, in harness style, hellaswag_acc_bytes; the standard error of each,
            hellaswag_..._stderr; hellaswag_items.
        """
        from gpt2repro.evaluation.metrics.hellaswag.hellaswag import mean_and_stderr

        chosen = np.array([source in (None, item.source) for item in self.items])
        right = {name: (predicted == self.labels)[chosen] for name, predicted in self.predictions.items()}
        shares = {name: mean_and_stderr(correct) for name, correct in right.items()}
        metrics = {f"hellaswag_{name}": share for name, (share, _) in shares.items()}
        metrics |= {f"hellaswag_{name}_stderr": stderr for name, (_, stderr) in shares.items()}
        return metrics | {"hellaswag_items": int(chosen.sum())}

    def by_source(self) -> dict[str, dict]:
        """`metrics` of ActivityNet's and of WikiHow's items, if every item says from where it is."""
        if not all(item.source for item in self.items):
            return {}
        sources = sorted({str(item.source) for item in self.items})
        return {source: self.metrics(source) for source in sources}

    def records(self) -> list[dict]:
        """What is needed to check each item's score, or to compare two models item by item."""
        names = {"acc": "prediction", "acc_norm": "prediction_norm", "acc_bytes": "prediction_bytes"}
        predictions = {names[name]: predicted.tolist() for name, predicted in self.predictions.items()}
        records = []
        for i, item in enumerate(self.items):
            record = {
                "label": item.label,
                "summed_nll": self.summed_nll[i].tolist(),
                "ending_tokens": item.ending_tokens,
                "ending_characters": item.ending_characters,
                "ending_bytes": item.ending_bytes,
            }
            records.append(record | {name: predicted[i] for name, predicted in predictions.items()})
        return records


def score_hellaswag(
    model,
    tokenizer,
    items: list[dict],
    accelerator: Accelerator,
    batch_size: int,
    styles: Sequence[str] = STYLES,
    progress: bool = False,
) -> dict[str, Scores]:
    """The scores of all items in each of the styles. Every rank calls it, and every rank gets the result.

    Args:
        items: as `load_items` returns them.
        batch_size, progress: see `score_encoded`.
    Raises:
        UserError: an unknown style, or see `encode_item` and `score_encoded`.
    """
    problems = {style: style_problem(style) for style in styles}
    refuse([f"HellaSwag style {style}: {problem}" for style, problem in problems.items() if problem])
    max_length = positions(model)
    encoded = {style: [encode_item(item, tokenizer, max_length, style) for item in items] for style in styles}
    return {style: score_encoded(model, encoded[style], accelerator, batch_size, style, progress) for style in styles}


def score_encoded(
    model,
    items: list[EncodedItem],
    accelerator: Accelerator,
    batch_size: int,
    style: str = "completion",
    progress: bool = False,
) -> Scores:
    """The scores of items that were encoded in one style. Every rank calls it, and every rank gets the result.

    Args:
        model: see `score_questions`.
        batch_size: rows per forward pass, see `score_questions`.
        progress: show a progress bar in the main process.
    Raises:
        UserError: a score is not finite; the model's weights are broken, or its precision is too low.
    """
    questions = [question for item in items for question in item.questions]
    title = f"HellaSwag, {style} style" if progress and accelerator.is_main_process else None
    nll = score_questions(model, questions, accelerator, batch_size, title)
    summed_nll = np.array([score for scores in nll for score in scores]).reshape(-1, ENDINGS)
    broken = int((~np.isfinite(summed_nll)).any(axis=1).sum())
    if broken:
        raise UserError(
            f"HellaSwag: the scores of {broken} of {len(items)} items are not finite; the model's weights are "
            "broken, or its precision is too low (float32 shows which)"
        )
    return Scores(style, items, summed_nll)


def default_batch_size(device: torch.device) -> int:
    """Rows per forward pass."""
    return CPU_BATCH_SIZE if device.type == "cpu" else BATCH_SIZE
