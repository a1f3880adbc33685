"""Multiple choice: scores compared with a plain loop over single rows, for models with and without a cache."""

import math
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_models import as_gpt2_tensors, tiny_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from gpt2repro.evaluation import multiple_choice
from gpt2repro.evaluation.multiple_choice import (
    Question,
    batches_of_rank,
    plan_batches,
    reuses_contexts,
    score_on_cache,
    score_questions,
    score_whole_rows,
    summed_nll,
)
from modeling_gpt2repro import GPT2ReproForCausalLM


VOCAB_SIZE = 61
PADDED_VOCAB_SIZE = 64
POSITIONS = 48
FAR_FROM_UNIFORM = 0.3  # weights of this size, so that a wrong position or token changes a score
SIZES = {"vocab_size": VOCAB_SIZE, "initializer_range": FAR_FROM_UNIFORM, "bos_token_id": 0, "eos_token_id": 0}


def make_questions() -> list[Question]:
    """Contexts of 1 to 9 tokens, several of each length; one to five endings of 1 to 12 tokens."""
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(VOCAB_SIZE) for _ in range(count)]

    questions = [
        Question(tokens(draw.randint(1, 9)), [tokens(draw.randint(1, 12)) for _ in range(draw.choice([1, 4, 4, 4, 5]))])
        for _ in range(40)
    ]
    one_token_each = Question(tokens(5), [tokens(1) for _ in range(4)])
    full = Question(
        tokens(POSITIONS - 11), [tokens(12), tokens(3)]
    )  # its longest row has one token more than positions
    return [*questions, one_token_each, full]


QUESTIONS = make_questions()


@pytest.fixture(scope="module")
def ours():
    vocabulary = {"vocab_size": PADDED_VOCAB_SIZE, "unpadded_vocab_size": VOCAB_SIZE}
    return tiny_model(**vocabulary, n_positions=POSITIONS, initializer_range=FAR_FROM_UNIFORM).eval()


@pytest.fixture(scope="module")
def theirs(ours):
    """The same weights as a GPT2LMHeadModel, without the padding rows."""
    model = GPT2LMHeadModel(GPT2Config(**SIZES, n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=2)).eval()
    model.load_state_dict(as_gpt2_tensors(ours.state_dict(), VOCAB_SIZE))
    return model


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@torch.no_grad()
def one_by_one(model, question: Question) -> list[float]:
    """The reference: each ending's row on its own, without batching, padding, mask or cache."""
    scores = []
    for ending in question.endings:
        row = torch.tensor([[*question.context, *ending]])
        logits = model(input_ids=row[:, :-1], use_cache=False).logits[0].float()
        nll = F.cross_entropy(logits, row[0, 1:], reduction="none")
        scores.append(nll[-len(ending) :].sum().item())
    return scores


def assert_same_scores(scores: list[list[float]], expected: list[list[float]]) -> None:
    assert [len(one) for one in scores] == [len(one) for one in expected]
    torch.testing.assert_close(torch.tensor(sum(scores, [])), torch.tensor(sum(expected, [])), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ours", "theirs"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_scores_equal_a_plain_loop(name, batch_size, request, accelerator):
    model = request.getfixturevalue(name)
    expected = [one_by_one(model, question) for question in QUESTIONS]
    assert_same_scores(score_questions(model, QUESTIONS, accelerator, batch_size), expected)
    assert_same_scores(score_questions(model, QUESTIONS[::-1], accelerator, batch_size), expected[::-1])


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": POSITIONS}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
OTHERS = {
    "rotary positions, grouped heads": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **SMALL, **HEADS)),
    "a window of 4": lambda: MistralForCausalLM(MistralConfig(**SIZES, **SMALL, **HEADS, sliding_window=4)),
    "slopes instead of positions": lambda: BloomForCausalLM(BloomConfig(**SIZES, hidden_size=32, n_layer=2, n_head=2)),
    "positions from the mask": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB_SIZE, init_std=0.3, **SMALL, ffn_dim=48, num_attention_heads=2, word_embed_proj_dim=32
        )
    ),
    "a cache and a state": lambda: RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
        )
    ),
    "a state instead of a cache": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, initializer_range=0.3)
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models(kind, accelerator):
    torch.manual_seed(0)
    model = OTHERS[kind]().eval()
    assert reuses_contexts(model) == ("state" not in kind)
    expected = [one_by_one(model, question) for question in QUESTIONS]
    assert_same_scores(score_questions(model, QUESTIONS, accelerator, batch_size=4), expected)


def test_padded_vocabulary_is_invisible(ours, theirs, accelerator):
    expected = score_questions(theirs, QUESTIONS, accelerator, 4)
    assert_same_scores(score_questions(ours, QUESTIONS, accelerator, 4), expected)


class Opaque(torch.nn.Module):
    """A model whose signature promises neither a cache nor logits_to_keep."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, *args, **kwargs):
        assert not kwargs.keys() & {"logits_to_keep", "cache", "past_key_values"}
        return self.module(*args, **kwargs)


def test_a_model_that_promises_nothing_runs_whole_rows(ours, accelerator):
    expected = score_questions(ours, QUESTIONS, accelerator, 4)
    assert not reuses_contexts(Opaque(ours))
    assert_same_scores(score_questions(Opaque(ours), QUESTIONS, accelerator, 4), expected)


def test_each_context_runs_once(ours, accelerator):
    seen = []
    hook = ours.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    questions = [Question([1, 2, 3, length], [[5] * length, [6] * 3, [7], [8, 9]]) for length in (2, 3, 4)]
    score_questions(ours, questions, accelerator, batch_size=3)
    hook.remove()
    assert seen == [(3, 4), (12, 3)]  # three contexts of 4 tokens; twelve endings without their last token


def test_padding_does_not_matter(ours, accelerator, monkeypatch):
    expected = score_questions(ours, QUESTIONS, accelerator, 4)
    padded = multiple_choice.padded

    def padded_differently(rows, device):
        tokens, is_token = padded(rows, device)
        more = torch.full((len(tokens), 2), 23)
        return torch.cat([tokens.where(is_token, 17), more], dim=1), torch.cat([is_token, more < 0], dim=1)

    monkeypatch.setattr(multiple_choice, "padded", padded_differently)
    fitting = [i for i, question in enumerate(QUESTIONS) if question.tokens < POSITIONS - 2]
    scores = score_questions(ours, [QUESTIONS[i] for i in fitting], accelerator, 4)
    assert_same_scores(scores, [expected[i] for i in fitting])


def test_both_ways_agree_on_one_batch(ours):
    questions = [question for question in QUESTIONS if len(question.context) == 5 and question.longest_ending > 1]
    with torch.no_grad():
        assert_same_scores(score_on_cache(ours, questions, "cpu"), score_whole_rows(ours, questions, "cpu"))


@pytest.mark.parametrize("has_cache", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches(has_cache, batch_size):
    batches = plan_batches(QUESTIONS, batch_size, has_cache)
    assert sorted(sum((batch.indices for batch in batches), [])) == list(range(len(QUESTIONS)))
    assert all(1 <= len(batch.indices) <= batch_size for batch in batches)
    assert any(batch.on_cache for batch in batches) == has_cache

    lengths = Counter()  # of contexts that run apart
    for batch in batches:
        questions = [QUESTIONS[i] for i in batch.indices]
        if batch.on_cache:
            (length,) = {len(question.context) for question in questions}
            assert all(len(question.endings) > 1 and question.longest_ending > 1 for question in questions)
            lengths[length] += len(questions)
    fewest = sum(math.ceil(count / batch_size) for count in lengths.values())
    assert sum(batch.on_cache for batch in batches) == fewest

    whole = [QUESTIONS[i].tokens for batch in batches if not batch.on_cache for i in batch.indices]
    assert whole == sorted(whole, reverse=True)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_all_ranks_run_the_same_forward_passes(world_size):
    """As many batches of each kind: one kind has two forward passes, and a sharded model hangs if counts differ."""
    batches = plan_batches(QUESTIONS, 3, has_cache=True)
    ranks = [batches_of_rank(batches, rank, world_size) for rank in range(world_size)]
    assert len({tuple(batch.on_cache for batch in mine) for mine in ranks}) == 1
    covered = {i for mine in ranks for batch in mine for i in batch.indices}
    assert covered == set(range(len(QUESTIONS)))
    assert max(map(len, ranks)) <= len(batches) // world_size + 2
    assert batches_of_rank([], 0, world_size) == []


def test_the_mode_is_restored_and_dropout_is_off(accelerator):
    config = GPT2Config(**SIZES, n_positions=POSITIONS, n_embd=32, n_layer=1, n_head=2)  # dropout 0.1
    model = GPT2LMHeadModel(config).train()
    in_train_mode = score_questions(model, QUESTIONS, accelerator, 4)
    assert model.training and all(module.training for module in model.modules())
    model.eval()
    assert score_questions(model, QUESTIONS, accelerator, 4) == in_train_mode
    assert not model.training

    model.train()
    model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score_questions(model, QUESTIONS, accelerator, 4)
    assert model.training


@pytest.mark.slow
def test_a_compiled_model_is_not_recompiled(ours, accelerator):
    expected = score_questions(ours, QUESTIONS, accelerator, 1)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = GPT2ReproForCausalLM(ours.config)
    model.load_state_dict(ours.state_dict())
    model.compile(backend=backend)
    assert_same_scores(score_questions(model, QUESTIONS, accelerator, 1), expected)
    assert not compiled
    model(torch.zeros(1, 8, dtype=torch.int64))
    assert compiled  # a call outside of score_questions does reach the backend


def test_the_accelerators_autocast_is_used(ours, accelerator):
    full = torch.tensor(sum(score_questions(ours, QUESTIONS, accelerator, 4), []))
    AcceleratorState._reset_state(reset_partial_state=True)
    bf16 = Accelerator(cpu=True, mixed_precision="bf16")
    low = torch.tensor(sum(score_questions(ours, QUESTIONS, bf16, 4), []))
    assert not torch.equal(low, full)
    torch.testing.assert_close(low, full, rtol=0.02, atol=1.0)


def test_summed_nll_by_hand():
    probabilities = torch.tensor([[0.1, 0.7, 0.2], [0.3, 0.3, 0.4], [0.9, 0.05, 0.05]])
    logits = probabilities.log().expand(2, -1, -1) + 5.0  # softmax ignores a constant
    targets = torch.tensor([[0, 2, 1], [1, 0, 0]])
    is_scored = torch.tensor([[True, True, False], [True, False, False]])
    expected = -torch.tensor([0.1 * 0.4, 0.7]).log()
    torch.testing.assert_close(summed_nll(logits, targets, is_scored), expected)
