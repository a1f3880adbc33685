"""Multiple choice: how likely is each ending of a context? Exact, with each context encoded once.

    questions = [Question(context=[464, 3290], endings=[[318], [373, 1043]])]
    nll = score_questions(model, questions, accelerator, batch_size=16)     # [[nats, nats]]

Written out, four endings of one context are four rows that begin alike:

    context context context ending ending
    context context context ending ending ending
    ...

A causal model computes the same keys and values for the context in each of them. So the context runs once, its cache is
copied for every ending, and the endings run on the copies. Contexts of one length make up a batch, which therefore
needs no padding before an ending, no attention mask and no position ids; endings are padded on the right, where no
scored token sees it. The sums equal those of the written-out rows up to rounding.

A model without such a cache, and a context with a single ending, run as written-out rows.
"""

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import DynamicCache

from gpt2repro.evaluation.rows import last_logits, padded, share_of_rank
from modeling_gpt2repro import CACHE


@dataclass(frozen=True)
class Question:
    """One context and the endings that are compared after it, as token ids; none of them is empty."""

    context: Sequence[int]
    endings: Sequence[Sequence[int]]

    @property
    def longest_ending(self) -> int:
        return max(map(len, self.endings))

    @property
    def tokens(self) -> int:
        """Of its longest row."""
        return len(self.context) + self.longest_ending


@dataclass(frozen=True)
class Batch:
    """What is scored together.

    indices: of the questions.
    on_cache: they have contexts of one length, which run first, and their endings on the contexts' cache; otherwise
        their rows run as a whole.
    """

    indices: list[int]
    on_cache: bool


def score_questions(
    model, questions: Sequence[Question], accelerator: Accelerator, batch_size: int, progress: str | None = None
) -> list[list[float]]:
    """The negative log-likelihood of each ending given its context. Every rank calls this and gets the result.

    Args:
        model: a transformers causal LM on the accelerator's device, the same on every rank or sharded over them. It
            runs in eval mode, under the accelerator's autocast, and returns to its previous mode; a compiled model runs
            eagerly, because nearly every batch has a new shape.
        batch_size: questions in a batch.
        progress: the name of a progress bar; None shows none.
    Returns:
        For each question, in the given order, one sum over its tokens for each ending, in nats. The softmax is
        computed in float32.
    """
    batches = plan_batches(questions, batch_size, reuses_contexts(model))
    rank_batches = batches_of_rank(batches, accelerator.process_index, accelerator.num_processes)
    scores: dict[int, list[float]] = {}
    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),  # not inference_mode: FSDP keeps tensors that it creates in here
            torch.compiler.set_stance("force_eager"),
            accelerator.autocast(),
            tqdm(total=sum(len(batch.indices) for batch in rank_batches), desc=progress, disable=not progress) as bar,
        ):
            for batch in rank_batches:
                score = score_on_cache if batch.on_cache else score_whole_rows
                nll = score(model, [questions[i] for i in batch.indices], accelerator.device)
                scores |= zip(batch.indices, nll)
                bar.update(len(batch.indices))
    finally:
        model.train(was_training)
    scores = dict(gather_object(list(scores.items())))
    return [scores[i] for i in range(len(questions))]


def reuses_contexts(model) -> bool:
    """Whether endings can run on a copy of their context's cache. A stateful model (Mamba) keeps a running state
    instead of one entry a token."""
    parameters = inspect.signature(type(model).forward).parameters
    return CACHE in parameters and not getattr(model, "_is_stateful", False)


def plan_batches(questions: Sequence[Question], batch_size: int, has_cache: bool) -> list[Batch]:
    """All questions in batches, those on a cache first; of each kind the longest first.

    Neighbours then have similar lengths, which minimizes padding; a batch that does not fit into memory fails at the
    start rather than at the end; and the progress bar overestimates the remaining time.
    """

    def context_length(i: int) -> int:
        return len(questions[i].context)

    longest_first = sorted(range(len(questions)), key=lambda i: -questions[i].tokens)
    shared = [i for i in longest_first if has_cache and is_worth_a_cache(questions[i])]
    whole = [i for i in longest_first if not (has_cache and is_worth_a_cache(questions[i]))]

    batches = []
    shared.sort(key=context_length, reverse=True)
    for _, same_length in itertools.groupby(shared, key=context_length):
        batches += [Batch(indices, on_cache=True) for indices in chunks(list(same_length), batch_size)]
    batches += [Batch(indices, on_cache=False) for indices in chunks(whole, batch_size)]
    return batches


def is_worth_a_cache(question: Question) -> bool:
    """Whether anything is saved, and anything left to run on the cache: the context's logits predict first tokens."""
    return len(question.endings) > 1 and question.longest_ending > 1


def chunks(indices: list[int], size: int) -> list[list[int]]:
    return [indices[first : first + size] for first in range(0, len(indices), size)]


def batches_of_rank(batches: list[Batch], rank: int, world_size: int) -> list[Batch]:
    """The batches that a rank scores: its share of each kind, as the two kinds take different forward passes."""
    on_cache = [batch for batch in batches if batch.on_cache]
    whole_rows = [batch for batch in batches if not batch.on_cache]
    return share_of_rank(on_cache, rank, world_size) + share_of_rank(whole_rows, rank, world_size)


def score_on_cache(model, questions: list[Question], device) -> list[list[float]]:
    """The scores of questions with contexts of one length: one forward pass for the contexts, one for the endings.

    contexts                 endings, on copies of the cache
    [ A     man    is ]      [ on     a     pad ]
                   |           |      |
                   |           |      +--- would score a third token
                   |           +---------- scores "a"
                   +---------------------- scores "on"
    """
    contexts = torch.tensor([question.context for question in questions], device=device)  # (Q, C)
    endings, is_ending = padded([ending for question in questions for ending in question.endings], device)  # (R, E)
    counts = torch.tensor([len(question.endings) for question in questions], device=device)
    question_of_row = torch.arange(len(questions), device=device).repeat_interleave(counts)  # (R,)

    cache = DynamicCache(config=model.config)
    first_logits = last_logits(model, contexts, 1, cache)[question_of_row]  # (R, 1, V)
    cache.batch_select_indices(question_of_row)
    inputs = endings[:, :-1]
    later_logits = last_logits(model, inputs, inputs.shape[1], cache)  # (R, E - 1, V)
    first_nll = summed_nll(first_logits, endings[:, :1], is_ending[:, :1])
    later_nll = summed_nll(later_logits, endings[:, 1:], is_ending[:, 1:])
    return by_question((first_nll + later_nll).tolist(), questions)


def score_whole_rows(model, questions: list[Question], device) -> list[list[float]]:
    """The scores of questions in one forward pass, each row a context and an ending.

    The logits at one position predict the token at the next:

        position       0      1      2      3      4      5
        row          [ A     man    is     on     a      pad ]
        is_ending      .      .      .     x      x      .
                                     |     |
                                     |     +--- scores "a"
                                     +--------- scores "on"
    """
    pairs = [(question.context, ending) for question in questions for ending in question.endings]
    tokens, is_token = padded([[*context, *ending] for context, ending in pairs], device)  # (R, T)
    first_scored = torch.tensor([len(context) for context, _ in pairs], device=device)
    is_ending = is_token & (torch.arange(tokens.shape[1], device=device) >= first_scored[:, None])

    start = min(len(context) for context, _ in pairs)  # no ending begins earlier, so no logits are needed before
    inputs, targets = tokens[:, :-1], tokens[:, start:]
    logits = last_logits(model, inputs, targets.shape[1])
    return by_question(summed_nll(logits, targets, is_ending[:, start:]).tolist(), questions)


def summed_nll(logits: torch.Tensor, targets: torch.Tensor, is_scored: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each row, summed over its scored positions.

    Only the scored logits are converted to float32: all of them would be the evaluation's largest tensor.

    Args:
        logits: (R, T, V) float of any precision; those at t predict the target at t.
        targets: (R, T) int64.
        is_scored: (R, T) bool.
    Returns:
        (R,) float32, nats.
    """
    nll = torch.zeros(targets.shape, dtype=torch.float32, device=logits.device)
    nll[is_scored] = F.cross_entropy(logits[is_scored].float(), targets[is_scored], reduction="none")
    return nll.sum(dim=1)


def by_question(scores: list[float], questions: list[Question]) -> list[list[float]]:
    """One score a row, regrouped by question."""
    remaining = iter(scores)
    return [list(itertools.islice(remaining, len(question.endings))) for question in questions]
