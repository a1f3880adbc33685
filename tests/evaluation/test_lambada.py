"""LAMBADA against a plain loop, one forward pass a token."""

import copy
import gzip
import json
import math

import pytest
import torch
from accelerate import Accelerator
from tiny_models import tiny_model
from tokenizers import processors

from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.errors import UserError
from gpt2repro.evaluation.lambada import encode_passage, measure_lambada, read_lambada
from gpt2repro.evaluation.perplexity import WindowSettings


@pytest.fixture(scope="module")
def tokenizer(topics):
    return build_tokenizer("bpe:300", topics[:20]).fast


@pytest.fixture(scope="module")
def model():
    model = tiny_model(vocab_size=320, unpadded_vocab_size=300)
    torch.manual_seed(30)  # one whose likeliest tokens are words often enough
    with torch.no_grad():
        for matrix in (parameter for parameter in model.parameters() if parameter.dim() == 2):
            matrix.normal_(std=0.2)
    return model.eval()


def likeliest_word(model, tokenizer, context):
    """The passage with the model's likeliest next token, if that begins a word."""
    with torch.no_grad():
        token = model(torch.tensor([tokenizer(context).input_ids])).logits[0, -1, :300].argmax()
    word = tokenizer.decode(token)
    return f"{context}{word}" if word.startswith(" ") and word.strip() else None


def plain_score(model, tokenizer, text):
    """The summed loss of the last word's tokens, and whether each is the likeliest after all before it."""
    context, _, word = text.rpartition(" ")
    before = tokenizer(context).input_ids or [tokenizer.eos_token_id]
    after = tokenizer(f" {word}").input_ids
    loss, right = 0.0, True
    for k, target in enumerate(after):
        ids = [*before, *after][-33:][:-1] if len(before) + len(after) > 33 else [*before, *after][:-1]
        position = len(ids) - len(after) + k
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0, position, :300].double().log_softmax(-1)
        loss -= log_p[target].item()
        right &= log_p.argmax().item() == target
    return loss, right


def test_scores_equal_a_plain_loop(model, tokenizer, topics):
    words = " ".join(topics[:3]).split()
    contexts = [" ".join(words[start : start + 2]) for start in range(0, 80, 2)]
    foreseen = [passage for context in contexts if (passage := likeliest_word(model, tokenizer, context))]
    others = [" ".join(words[start : start + 6]) for start in range(0, 60, 6)]
    items = [*foreseen[:3], *others, "a b", "many words " * 20 + "end"]  # the last is longer than the positions
    score = measure_lambada(model, tokenizer, items, Accelerator(cpu=True), WindowSettings(batch_size=2))
    expected = [plain_score(model, tokenizer, text) for text in items]
    assert score.nll == pytest.approx([loss for loss, _ in expected], abs=1e-3)
    assert score.correct.tolist() == [right for _, right in expected]
    assert len(foreseen) >= 3 and 3 <= score.correct.sum() < len(items)
    assert score.accuracy().value() == score.correct.mean()
    mean = sum(loss for loss, _ in expected) / len(expected)
    assert score.perplexity().value() == pytest.approx(math.exp(mean), rel=1e-4)


def test_a_passage_is_encoded_as_a_whole(gpt2):
    """A word that does not begin with a token of its own when encoded together, as in the harness."""
    row = encode_passage(gpt2.fast, 'she said: "Hello', 1024)
    assert gpt2.fast.decode(row.ids[-row.scored :]) == ' "Hello'
    assert row.ids.tolist() == gpt2.fast('she said: "Hello').input_ids


def test_blanks_before_the_last_word_are_a_part_of_it(gpt2):
    row = encode_passage(gpt2.fast, "It was  over", 1024)
    assert gpt2.fast.decode(row.ids[-row.scored :]) == "  over"


def test_what_a_tokenizer_puts_before_every_text_stands_before_a_passage(gpt2):
    llama_like = copy.deepcopy(gpt2.fast)
    start = ("<|endoftext|>", llama_like.eos_token_id)
    llama_like.backend_tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [start])
    row, plain = (encode_passage(tokenizer, "It was over", 1024) for tokenizer in (llama_like, gpt2.fast))
    assert row.ids.tolist() == [llama_like.eos_token_id, *plain.ids] and row.scored == plain.scored == 1


def test_passages_of_a_file(tmp_path):
    lines = ['{"text": "one two"}', "", '{"text": "three \\u00e9", "other": 1}']
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    (tmp_path / "items.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    for name in ("items.jsonl", "items.jsonl.gz"):
        assert read_lambada(tmp_path / name, name) == ["one two", "three é"]


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("{", "line 7: not JSON"),
        ('"text"', 'line 7: not {"text": "..."}'),
        ('{"text": null}', 'line 7: not {"text": "..."}'),
        ('{"text": "half \\ud800"}', 'line 7: not {"text": "..."}'),
        ('{"text": "oneword"}', "line 7: 'oneword' does not end with a blank and a word"),
        ('{"text": "ends with "}', "line 7: 'ends with ' does not end with a blank and a word"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, complaint):
    rows = [json.dumps({"text": "fine words"})] * 6 + [line]
    (tmp_path / "items.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError) as caught:
        read_lambada(tmp_path / "items.jsonl", "--task_data lambada=items.jsonl")
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content, complaint", [(b"", "holds no items"), (b"\x1f\x8b", "cannot be read")])
def test_a_broken_file_is_named(tmp_path, content, complaint):
    (tmp_path / "items.jsonl.gz").write_bytes(content if content else gzip.compress(b""))
    with pytest.raises(UserError, match=complaint):
        read_lambada(tmp_path / "items.jsonl.gz", "--task_data lambada=items.jsonl.gz")
