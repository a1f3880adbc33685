"""Multiple choice: scores compared with a plain loop over single rows, for models that pack rows and for others."""

import random

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
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
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
    packed_attention,
    packs_rows,
    plan_batches,
    predictions,
    score_questions,
    score_rows,
)
from gpt2repro.evaluation.rows import share_of_rank
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
PACKED = {
    "rotary positions, grouped heads": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **SMALL, **HEADS)),
    "attention beside the MLP": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**SIZES, **SMALL, num_attention_heads=4, intermediate_size=48)
    ),
}
WRITTEN_OUT = {
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


@pytest.mark.parametrize("kind", [*PACKED, *WRITTEN_OUT])
def test_other_models(kind, accelerator):
    torch.manual_seed(0)
    model = (PACKED | WRITTEN_OUT)[kind]().eval()
    assert packs_rows(model) == (kind in PACKED)
    expected = [one_by_one(model, question) for question in QUESTIONS]
    assert_same_scores(score_questions(model, QUESTIONS, accelerator, batch_size=4), expected)


def test_another_attention_implementation_gets_rows_that_are_written_out(ours, accelerator):
    model = tiny_model(
        vocab_size=PADDED_VOCAB_SIZE, unpadded_vocab_size=VOCAB_SIZE, n_positions=POSITIONS, attn_implementation="eager"
    )
    model.load_state_dict(ours.state_dict())
    assert packs_rows(ours) and not packs_rows(model)
    expected = score_questions(ours, QUESTIONS, accelerator, 4)
    assert_same_scores(score_questions(model, QUESTIONS, accelerator, 4), expected)


def test_padded_vocabulary_is_invisible(ours, theirs, accelerator):
    expected = [one_by_one(theirs, question) for question in QUESTIONS]
    assert_same_scores(score_questions(ours, QUESTIONS, accelerator, 4), expected)


class Opaque(torch.nn.Module):
    """A model without a configuration, whose signature does not promise logits_to_keep."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, *args, **kwargs):
        assert not kwargs.keys() & {"logits_to_keep", "attention_mask", "position_ids"}
        return self.module(*args, **kwargs)


def test_a_model_that_promises_nothing_gets_rows_that_are_written_out(ours, accelerator):
    expected = score_questions(ours, QUESTIONS, accelerator, 4)
    assert not packs_rows(Opaque(ours))
    assert_same_scores(score_questions(Opaque(ours), QUESTIONS, accelerator, 4), expected)


def test_each_context_runs_once(ours, accelerator):
    seen = []
    hook = ours.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    questions = [Question([1, 2, 3, length], [[5] * length, [6] * 3, [7], [8, 9]]) for length in (2, 3, 4)]
    score_questions(ours, questions, accelerator, batch_size=3)
    hook.remove()
    assert seen == [(3, 4 + 3 + 2 + 0 + 1)]  # each context once, and the endings without their last tokens


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


def test_a_packed_row_by_hand():
    row = Question([10, 11, 12], [[20, 21, 22], [30], [40, 41]])
    assert row.packed_tokens == [10, 11, 12, 20, 21, 40]
    assert list(predictions(row)) == [(2, 20), (3, 21), (4, 22), (2, 30), (2, 40), (5, 41)]
    attention = packed_attention([row, Question([1], [[2, 3], [4]])], "cpu")
    assert attention["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 0, 0, 0, 0]]
    assert attention["attention_mask"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]
    assert attention["attention_mask"][1, 0, :2].int().tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]


@torch.no_grad()
def test_packed_rows_equal_those_that_are_written_out(ours):
    packed = score_rows(ours, QUESTIONS, "cpu")
    written_out = [sum(score_rows(ours, question.written_out, "cpu"), []) for question in QUESTIONS]
    assert_same_scores(packed, written_out)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches(batch_size):
    batches = plan_batches(QUESTIONS, batch_size)
    lengths = [len(QUESTIONS[i].packed_tokens) for batch in batches for i in batch]
    assert sorted(sum(batches, [])) == list(range(len(QUESTIONS)))
    assert lengths == sorted(lengths, reverse=True)
    assert {len(batch) for batch in batches[:-1]} <= {batch_size} and 1 <= len(batches[-1]) <= batch_size


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_all_ranks_run_equally_many_forward_passes(world_size):
    """A sharded model hangs otherwise."""
    batches = plan_batches(QUESTIONS, 3)
    ranks = [share_of_rank(batches, rank, world_size) for rank in range(world_size)]
    assert len({len(mine) for mine in ranks}) == 1
    assert {i for mine in ranks for batch in mine for i in batch} == set(range(len(QUESTIONS)))
    assert len(ranks[0]) <= len(batches) // world_size + 1
    assert share_of_rank([], 0, world_size) == []


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
