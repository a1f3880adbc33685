"""Multiple choice: how likely is each ending of a context? Exact, with each context run once.

    questions = [Question(context=[464, 3290], endings=[[318], [373, 1043]])]
    nll = score_questions(model, questions, accelerator, batch_size=16)     # [[nats, nats]]

Written out, four endings of one context are four rows that begin alike:

    context context context  A A A
    context context context  B B
    ...

Packed, they are one row in which the context stands once:

    tokens       context context context  A A  B      without each ending's last token, from which nothing is predicted
    positions    0       1       2        3 4  3
    sees         what is before it in the context, and in its own ending

So each token computes what it would in the row that is written out, the sums are equal up to rounding, and HellaSwag
has half as many tokens. The logits begin at the context's last token, which predicts the first token of every ending.

This takes a model that uses a mask and positions of our own; other models run the rows that are written out.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from gpt2repro.evaluation.rows import last_logits, padded, share_of_rank


# A list, because a model that takes mask and positions but computes something else with them (a sliding window over the
# row, slopes counted from the mask) would be scored wrongly without an error. The tests run each of these.
PACKABLE = ("gpt2repro", "gpt2", "gpt_neox", "llama")


@dataclass(frozen=True)
class Question:
    """One context and the endings that are compared after it, as token ids; none of them is empty."""

    context: Sequence[int]
    endings: Sequence[Sequence[int]]

    @property
    def tokens(self) -> int:
        """Of its longest row, written out."""
        return len(self.context) + max(map(len, self.endings))

    @property
    def packed_tokens(self) -> list[int]:
        """The tokens of its one row."""
        return [*self.context, *(token for ending in self.endings for token in ending[:-1])]

    @property
    def written_out(self) -> list["Question"]:
        """Each ending in a row of its own."""
        return [Question(self.context, [ending]) for ending in self.endings]


def score_questions(
    model, questions: Sequence[Question], accelerator: Accelerator, batch_size: int, progress: str | None = None
) -> list[list[float]]:
    """The negative log-likelihood of each ending given its context. Every rank calls this and gets the result.

    Args:
        model: a transformers causal LM on the accelerator's device, the same on every rank or sharded over them. It
            runs in eval mode, under the accelerator's autocast, and returns to its previous mode; a compiled model runs
            eagerly, because nearly every batch has a new shape.
        batch_size: rows in a batch; a row is a question, or with a model that does not pack rows one of its endings.
        progress: the name of a progress bar; None shows none.
    Returns:
        For each question, in the given order, one sum over its tokens for each ending, in nats. The softmax is
        computed in float32.
    """
    rows = list(questions) if packs_rows(model) else [row for question in questions for row in question.written_out]
    batches = plan_batches(rows, batch_size)
    rank_batches = share_of_rank(batches, accelerator.process_index, accelerator.num_processes)
    scores: dict[int, list[float]] = {}
    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),  # not inference_mode: FSDP keeps tensors that it creates in here
            torch.compiler.set_stance("force_eager"),
            accelerator.autocast(),
            tqdm(total=sum(map(len, rank_batches)), desc=progress, disable=not progress) as bar,
        ):
            for batch in rank_batches:
                scores |= zip(batch, score_rows(model, [rows[i] for i in batch], accelerator.device))
                bar.update(len(batch))
    finally:
        model.train(was_training)
    scores = dict(gather_object(list(scores.items())))
    nll = itertools.chain.from_iterable(scores[i] for i in range(len(rows)))
    return [list(itertools.islice(nll, len(question.endings))) for question in questions]


def packs_rows(model) -> bool:
    """Whether the model uses the mask and the positions of a packed row."""
    config = getattr(model, "config", None)
    return config is not None and config.model_type in PACKABLE and config._attn_implementation == "sdpa"


def plan_batches(rows: Sequence[Question], batch_size: int) -> list[list[int]]:
    """The indices of all rows in batches, the longest first.

    Neighbours then have similar lengths, which minimizes padding; a batch that does not fit into memory fails at the
    start rather than at the end; and the progress bar overestimates the remaining time.
    """
    longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i].packed_tokens))
    return [longest_first[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def score_rows(model, rows: list[Question], device) -> list[list[float]]:
    """The scores of questions in one forward pass, a row each.

    The logits at one position predict the token at the next, in the context or in the same ending:

        tokens      [ A     man    is     on     a      standing  pad ]
        predicts                   |      |      |      |
                                   |      a      roof   still
                                   on, standing
    """
    tokens, _ = padded([row.packed_tokens for row in rows], device)  # (R, T)
    packing = {} if all(len(row.endings) == 1 for row in rows) else packed_attention(rows, device)
    first = min(len(row.context) for row in rows) - 1  # position of the first logits that are needed
    logits = last_logits(model, tokens, tokens.shape[1] - first, **packing)
    nll = []
    for row, row_logits in zip(rows, logits):  # the log-probabilities of all rows would be the largest tensor by far
        log_probs = F.log_softmax(row_logits, dim=-1, dtype=torch.float32)  # (T - first, V)
        position, target = torch.tensor(list(predictions(row)), device=device).unbind(1)
        nll.append(-log_probs[position - first, target])
    by_ending = torch.cat(nll).cpu().split([len(ending) for row in rows for ending in row.endings])
    sums = iter([ending_nll.sum().item() for ending_nll in by_ending])
    return [list(itertools.islice(sums, len(row.endings))) for row in rows]


def predictions(row: Question) -> Iterator[tuple[int, int]]:
    """The tokens of all endings, each with the position in the packed row that predicts it."""
    last_of_context = len(row.context) - 1
    start = len(row.context)
    for ending in row.endings:
        yield last_of_context, ending[0]
        yield from enumerate(ending[1:], start)
        start += len(ending) - 1


def packed_attention(rows: list[Question], device) -> dict[str, torch.Tensor]:
    """What makes the endings of a packed row independent of each other.

    Returns:
        position_ids: (R, T) int64.
        attention_mask: (R, 1, T, T) bool, True where a token (third axis) sees another (fourth).
    """
    positions, parts = [], []
    for row in rows:
        start = len(row.context)
        lengths = [len(ending) - 1 for ending in row.endings]
        positions.append([*range(start), *(start + i for length in lengths for i in range(length))])
        parts.append([0] * start + [number for number, length in enumerate(lengths, 1) for _ in range(length)])
    position_ids, _ = padded(positions, device)
    part, _ = padded(parts, device)  # 0: the context, and padding, which is to the right of all that could see it
    same_part = part[:, :, None] == part[:, None, :]
    in_context = part[:, None, :] == 0
    return {"position_ids": position_ids, "attention_mask": (same_part | in_context).tril()[:, None]}
