"""HellaSwag: scores compared with a plain loop, the metric with arithmetic; the script from flags to output file."""

import gzip
import json
import os
import re
import socket
import subprocess
import sys
from types import MappingProxyType

import datasets
import evaluate
import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from huggingface_hub import constants
from support import PATIENCE, ROOT, write_jsonl
from tiny_models import as_gpt2_tensors, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, T5Config

import eval_hellaswag
from gpt2repro.errors import UserError
from gpt2repro.evaluation import hellaswag_items, task_data
from gpt2repro.evaluation.hellaswag import (
    EncodedItem,
    Scores,
    encode_item,
    harness_texts,
    score_encoded,
    score_hellaswag,
    tokenize_together,
)
from gpt2repro.evaluation.hellaswag_items import STYLES, load_items, split_context


VALIDATION_SET = ROOT.parent / "shared" / "data" / "hellaswag_val.jsonl.gz"
VOCAB_SIZE = 293
PADDED_VOCAB_SIZE = 320  # 27 rows of padding

CONTEXTS = [
    "A woman is standing in a kitchen. she",
    "Two boys throw a ball on a wide green lawn while a dog watches them from the shade. the dog",
    "A man in a blue coat climbs a ladder. He leans it against the wall of an old barn. the man",
    "A girl",
    "How to clean a window. Fill a bucket with warm water. Add a little soap and stir it until it foams.",
    "A band plays on a small stage. The singer walks to the microphone. the singer",
    "How to plant a tree. Choose a place with enough light. The roots need room, so dig a hole that is twice as wide.",
    "A swimmer stands at the edge of the pool. he",
    "The camera shows a street at night. It is raining and cars pass by slowly. a cyclist",
    "How to fold a paper boat. Take a sheet of paper.",
    "An old man sits on a bench in the park. He opens a paper bag. the pigeons",
    "A chef cuts onions on a wooden board, then wipes the knife with a cloth. the chef",
    "People are dancing.",
]
ENDINGS = [
    "opens the drawer and takes out a long wooden spoon.",
    "falls asleep.",
    "picks it up, turns around twice, and puts it back where it was before.",
    "is not there any more when the others come back from the house at the end of the road.",
    "Repeat this on the other side.",
    "looks up",
    "starts to run towards the water, then stops.",
]


def make_items():
    """13 items with endings of very different lengths."""
    return [
        {"ind": i, "ctx": ctx, "endings": [ENDINGS[(i + 2 * e) % len(ENDINGS)] for e in range(4)], "label": i % 4}
        for i, ctx in enumerate(CONTEXTS)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE like GPT-2's, with few merges."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CONTEXTS + ENDINGS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=256
    )


@pytest.fixture(scope="module")
def encoded(tokenizer):
    return [encode_item(item, tokenizer, max_length=256) for item in make_items()]


@pytest.fixture(scope="module")
def ours():
    # The weights are far from uniform, so that a wrong position changes the score.
    vocabulary = {"vocab_size": PADDED_VOCAB_SIZE, "unpadded_vocab_size": VOCAB_SIZE}
    vocabulary |= {"bos_token_id": 0, "eos_token_id": 0}
    return tiny_model(**vocabulary, n_positions=256, initializer_range=0.3).eval()


@pytest.fixture(scope="module")
def theirs(ours):
    """The same weights as a GPT2LMHeadModel, without the padding rows."""
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=256, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    model.load_state_dict(as_gpt2_tensors(ours.state_dict(), VOCAB_SIZE))
    return model


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@torch.no_grad()
def score_one_by_one(model, tokenizer, item):
    """The reference for completion style: each ending on its own, without batching, padding, mask or cache."""
    scores = []
    for ending in item["endings"]:
        context = tokenizer.encode(item["ctx"], add_special_tokens=False)
        completion = tokenizer.encode(" " + ending, add_special_tokens=False)
        tokens = torch.tensor([context + completion])
        logits = model(input_ids=tokens, use_cache=False).logits
        losses = F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
        scores.append(losses[len(context) - 1 :].sum().item())
    return scores


def assert_same_scores(records, expected, tolerance=1e-4):
    """Args: expected: the four summed losses of each item."""
    got = torch.tensor([record["summed_nll"] for record in records])
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=tolerance)


# Scores


@pytest.mark.parametrize("name", ["ours", "theirs"])
def test_completion_scores_equal_a_plain_loop(name, request, tokenizer, accelerator):
    model, items = request.getfixturevalue(name), make_items()
    scores = score_hellaswag(model, tokenizer, items, accelerator, batch_size=4, styles=["completion"])["completion"]
    expected = [score_one_by_one(model, tokenizer, item) for item in items]
    assert_same_scores(scores.records(), expected)

    lengths = [[len(tokenizer.encode(" " + ending)) for ending in item["endings"]] for item in items]
    nll, tokens, labels = torch.tensor(expected), torch.tensor(lengths), torch.tensor([item["label"] for item in items])
    right, right_norm = nll.argmin(1) == labels, (nll / tokens).argmin(1) == labels
    assert scores.acc.tolist() == right.tolist() and scores.acc_norm.tolist() == right_norm.tolist()
    p, p_norm, n = right.double().mean().item(), right_norm.double().mean().item(), len(items)
    assert scores.metrics() == {
        "hellaswag_acc": pytest.approx(p),
        "hellaswag_acc_norm": pytest.approx(p_norm),
        "hellaswag_acc_stderr": pytest.approx((p * (1 - p) / (n - 1)) ** 0.5),
        "hellaswag_acc_norm_stderr": pytest.approx((p_norm * (1 - p_norm) / (n - 1)) ** 0.5),
        "hellaswag_items": n,
    }


@pytest.mark.skipif(not VALIDATION_SET.is_file(), reason=f"the validation set is not at {VALIDATION_SET}")
def test_scores_and_choices_of_real_items(ours, theirs, tokenizer, accelerator):
    """Ours in packed rows, GPT2LMHeadModel in rows that are written out."""
    items = [item for item in load_items(VALIDATION_SET)[::160] if not encode_item(item, tokenizer, 256).cut]
    assert len(items) > 20
    scores = score_hellaswag(ours, tokenizer, items, accelerator, batch_size=8, styles=["completion"])["completion"]
    expected = [score_one_by_one(theirs, tokenizer, item) for item in items]
    assert_same_scores(scores.records(), expected)
    mean = np.array(expected) / [item.ending_tokens for item in scores.items]
    assert scores.predictions["acc"].tolist() == np.argmin(expected, axis=1).tolist()
    assert scores.predictions["acc_norm"].tolist() == mean.argmin(axis=1).tolist()


def test_non_finite_scores_are_an_error(encoded, accelerator):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, n_positions=256, n_embd=32, n_layer=1, n_head=2))
    model.transformer.ln_f.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="13 of 13 items are not finite"):
        score_encoded(model, encoded, accelerator, batch_size=4)


def test_scores_by_source(ours, tokenizer, accelerator):
    items = [
        item | {"source_id": f"{'wikihow' if i % 3 else 'activitynet'}~{i}"} for i, item in enumerate(make_items())
    ]
    scores = score_hellaswag(ours, tokenizer, items, accelerator, batch_size=4, styles=["completion"])["completion"]
    by_source = scores.by_source()
    right = {"ActivityNet": scores.acc[::3], "WikiHow": [scores.acc[i] for i in range(13) if i % 3]}
    assert list(by_source) == list(right)
    for source, expected in right.items():
        assert by_source[source]["hellaswag_acc"] == pytest.approx(sum(expected) / len(expected))
        assert by_source[source]["hellaswag_items"] == len(expected)

    items[5]["source_id"] = "elsewhere"  # where one item is from is not known, so nothing is guessed
    scores = score_hellaswag(ours, tokenizer, items, accelerator, batch_size=4, styles=["completion"])["completion"]
    assert scores.by_source() == {}


# Encoding


def rows_of(item):
    """The rows of an encoded item: the context of each ending, and the ending."""
    return [(question.context, ending) for question in item.questions for ending in question.endings]


def test_context_and_ending_are_encoded_separately(tokenizer):
    item = make_items()[4]
    encoded = encode_item(item, tokenizer)
    (question,) = encoded.questions
    assert question.context == tokenizer.encode(item["ctx"])
    for ending, text in zip(question.endings, item["endings"]):
        assert tokenizer.decode([*question.context, *ending]) == item["ctx"] + " " + text
    assert encoded.label == item["label"] and not encoded.cut
    assert encoded.ending_tokens == list(map(len, question.endings))


def test_a_long_row_is_truncated_at_the_start_of_its_context(tokenizer):
    item = make_items()[6]
    full = encode_item(item, tokenizer)
    longest_ending = max(full.ending_tokens)
    max_length = longest_ending + 5
    cut = encode_item(item, tokenizer, max_length)
    assert cut.cut and cut.ending_tokens == full.ending_tokens
    for (context, ending), (full_context, full_ending) in zip(rows_of(cut), rows_of(full)):
        assert ending == full_ending
        assert context == full_context[-(max_length - len(ending)) :]
    assert max(question.tokens for question in cut.questions) == max_length

    length = full.questions[0].tokens
    assert encode_item(item, tokenizer, length) == full
    assert encode_item(item, tokenizer, length - 1).cut
    tiny = encode_item(item, tokenizer, max_length=4)  # one token of context and the first three of the ending
    assert tiny.ending_tokens == [min(3, count) for count in full.ending_tokens]
    for (context, ending), (full_context, full_ending) in zip(rows_of(tiny), rows_of(full)):
        assert ending == full_ending[:3]
        assert context == full_context[-(4 - len(ending)) :]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("positions", [24, 8])
def test_truncated_rows_fit_the_model(style, positions, tokenizer, accelerator):
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=positions, n_embd=32, n_layer=1, n_head=2, bos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    items = [item | {"activity_label": "Painting"} for item in make_items()]
    scores = score_hellaswag(model, tokenizer, items, accelerator, batch_size=3, styles=[style])[style]
    assert any(item.cut for item in scores.items)
    longest = max(question.tokens for item in scores.items for question in item.questions)
    assert longest == positions + (style == "harness")  # nothing is predicted from a row's last token


def test_a_text_without_tokens_is_an_error(tokenizer):
    with pytest.raises(UserError, match="has no token for ''"):
        encode_item({"ctx": "", "endings": ["a", "b", "c", "d"], "label": 0}, tokenizer)


# Harness style; tests/evaluation/test_harness.py compares it with lm-evaluation-harness itself


@pytest.mark.parametrize(
    ("fields", "parts", "context"),
    [
        (
            {"ctx": "A man sits on a roof. he"},
            ("A man sits on a roof.", "he"),
            "Roofing: A man sits on a roof. He",
        ),
        (
            {"ctx": 'Is it Bob? " yes and Al'},
            ("Is it Bob?", '" yes and Al'),
            'Roofing: Is it Bob? " yes and al',
        ),
        (
            {"ctx": "Fill a bucket. Stir it.  "},
            ("Fill a bucket. Stir it.  ", ""),
            "Roofing: Fill a bucket. Stir it.",
        ),
        (
            {"ctx": "no sentence at all"},
            ("no sentence at all", ""),
            "Roofing: no sentence at all",
        ),
        (
            {"ctx": "not read", "ctx_a": "[header] How to stir [title] Take it. [step] Stir.", "ctx_b": ""},
            ("[header] How to stir [title] Take it. [step] Stir.", ""),
            "Roofing: How to stir. Take it. Stir.",
        ),
        (
            {"ctx": "not read", "ctx_a": "A man sits.", "ctx_b": "then Bob"},
            ("A man sits.", "then Bob"),
            "Roofing: A man sits. Then bob",
        ),
    ],
)
def test_the_text_of_a_context_in_harness_style(fields, parts, context):
    item = {"activity_label": "Roofing", "endings": ["a [substeps] b", " c", "[step] d", "e"], "label": 0} | fields
    assert split_context(item) == parts
    assert harness_texts(item) == (context, ["a b", "c", " d", "e"])


@pytest.mark.skipif(not VALIDATION_SET.is_file(), reason=f"the validation set is not at {VALIDATION_SET}")
def test_unfinished_sentences_are_those_of_activitynet():
    """Its 3,243 items come first in the validation set; WikiHow's 6,799 consist of whole sentences."""
    unfinished = [split_context(item)[1] != "" for item in load_items(VALIDATION_SET)]
    assert unfinished == [True] * 3243 + [False] * 6799


def test_tokens_in_harness_style(tokenizer):
    item = make_items()[2] | {"activity_label": "Climbing"}
    encoded = encode_item(item, tokenizer, style="harness")
    context = f"Climbing: {item['ctx'].removesuffix('the man')}The man"
    (question,) = encoded.questions
    assert question.context == tokenizer.encode(context)
    for ending, text in zip(question.endings, item["endings"]):
        assert [*question.context, *ending] == tokenizer.encode(f"{context} {text}")
    assert encoded.ending_characters == [len(text) for text in item["endings"]]

    accented = encode_item(item | {"endings": ["a na\u00efve", "b", "c", "d"]}, tokenizer, style="harness")
    assert accented.ending_characters == [7, 1, 1, 1] and accented.ending_bytes == [8, 1, 1, 1]


def test_spaces_at_the_end_of_a_context_belong_to_the_ending(tokenizer):
    context, endings = tokenize_together("A man  ", ["falls."], tokenizer)
    assert context == tokenizer.encode("A man")
    assert [*context, *endings[0]] == tokenizer.encode("A man   falls.")


def test_what_acc_norm_and_acc_bytes_divide_by():
    lengths = {"ending_tokens": [1, 2, 4, 8], "ending_characters": [8, 4, 2, 1], "ending_bytes": [9, 9, 90, 9]}
    item = EncodedItem([], 0, **lengths, source=None, cut=False)
    nll = np.array([[8.0, 8.0, 9.0, 9.0]])  # a tie: the first; by tokens the last, by characters the first
    completion, harness = Scores("completion", [item], nll), Scores("harness", [item], nll)
    assert {name: value.tolist() for name, value in completion.predictions.items()} == {"acc": [0], "acc_norm": [3]}
    assert {name: value.tolist() for name, value in harness.predictions.items()} == {
        "acc": [0],
        "acc_norm": [0],
        "acc_bytes": [2],
    }
    assert "hellaswag_acc_bytes_stderr" in harness.metrics() and "hellaswag_acc_bytes" not in completion.metrics()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, "activity_label is None and must be a text"),
        ({"activity_label": 3}, "activity_label is 3 and must be a text"),
        ({"activity_label": "Roofing", "ctx_a": 1}, "ctx_a is 1 and ctx_b None"),
        ({"activity_label": "Roofing", "endings": ["a", "b", "[step] ", "d"]}, ".* has nothing but marks"),
    ],
)
def test_items_without_a_text_in_harness_style(tmp_path, tokenizer, change, complaint):
    items = [item | {"activity_label": "Roofing"} for item in make_items()]
    del items[6]["activity_label"]
    items[6] |= change
    path = write_jsonl(tmp_path / "items.jsonl", items)
    assert len(load_items(path)) == 13
    with pytest.raises(UserError, match=f"items.jsonl, line 7: {complaint}"):
        load_items(path, styles=STYLES)
    with pytest.raises(UserError, match=complaint):
        encode_item(items[6], tokenizer, style="harness")


@pytest.mark.parametrize(
    ("style", "remedy"), [("harnes", "did you mean harness?"), ("zero-shot", "choose completion, harness")]
)
def test_an_unknown_style(style, remedy, ours, tokenizer, accelerator, run_main):
    with pytest.raises(UserError, match=re.escape(f"style {style}: no such style; {remedy}")):
        score_hellaswag(ours, tokenizer, make_items(), accelerator, batch_size=1, styles=[style])
    with pytest.raises(UserError, match=re.escape(f"--style {style}: no such style; {remedy}")):
        run_main("model", "--style", style)


# Data


def test_items_from_jsonl_and_gzip(tmp_path):
    items = make_items()
    plain = write_jsonl(tmp_path / "items.jsonl", items)
    packed = tmp_path / "items.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert load_items(plain) == load_items(packed) == items
    assert load_items(plain, limit=3) == items[:3]
    assert load_items(plain, limit=10_000) == items


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"label": 4}, "label is 4 and must be 0 to 3"),
        ({"label": ""}, "label is '' and must be 0 to 3"),
        ({"label": True}, "label is True"),
        ({"endings": ["one", "two", "three"]}, "must be a list of 4 non-empty texts"),
        ({"endings": ["one", "two", "three", " "]}, "must be a list of 4 non-empty texts"),
        ({"ctx": ""}, "ctx is '' and must be a non-empty text"),
        ({"ctx": None}, "ctx is None and must be a non-empty text"),
        ({"ctx": "half \ud83d"}, "must be a non-empty text of whole characters"),
        ({"endings": ["one", "two", "three", "\udc00"]}, "must be a list of 4 non-empty texts of whole characters"),
    ],
)
def test_the_error_for_an_invalid_item_names_its_line(tmp_path, change, complaint):
    items = make_items()
    items[2] |= change
    path = write_jsonl(tmp_path / "items.jsonl", items)
    with pytest.raises(UserError) as error:
        load_items(path)
    assert str(error.value).startswith(f"{path}, line 3: ") and complaint in str(error.value)
    assert load_items(path, limit=2) == items[:2]


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b'{"ctx": \n', r"line 1: not JSON .*; correct or remove the line"),
        (b"\n\xff\n", r"line 2: not JSON"),
        (b"[1]\n", r"line 1: not a JSON object"),
        pytest.param(b"[" * 99_999 + b"\n", r"line 1: not JSON", id="deep"),
        (b"\n", r"holds no items"),
    ],
)
def test_an_invalid_file(tmp_path, content, complaint):
    path = tmp_path / "items.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        load_items(path)


def test_a_truncated_gzip_file(tmp_path):
    path = tmp_path / "items.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(make_items()[0]).encode() * 50)[:100])
    with pytest.raises(UserError, match="cannot be read"):
        load_items(path)


def test_items_from_the_hub_have_labels_as_text(tmp_path, monkeypatch):
    rows = [{**item, "label": str(item["label"])} for item in make_items()]
    (tmp_path / "repo" / "data").mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "repo" / "data" / "validation-00000-of-00001.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(hellaswag_items, "HUB", task_data.HubSource(str(tmp_path / "repo"), None, "validation"))
    assert load_items() == make_items()
    assert load_items(limit=4) == make_items()[:4]


def test_without_the_hub_the_error_names_data(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach it\nfor many reasons")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match="--data FILE") as error:
        load_items()
    assert "\n" not in str(error.value)


def test_without_a_network_the_hub_is_asked_once(monkeypatch, tmp_path, no_network):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match="cannot be downloaded from the Hub"):
        load_items()
    assert len(no_network) <= 2  # `load_dataset` itself tries for half a minute


# Metric


def test_metric_by_hand(monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("the metric must load without a network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    metric = evaluate.load(str(ROOT / "gpt2repro" / "evaluation" / "metrics" / "hellaswag"))
    result = metric.compute(
        summed_nll=[
            [4.0, 3.0, 9.0, 9.0],  # acc: 1; means 1, 3, 9, 9: acc_norm: 0
            [5.0, 5.0, 5.0, 5.0],  # a tie: acc and acc_norm: the first, 0
            [9.0, 6.0, 4.0, 6.0],  # acc: 2; means 9, 2, 4, 2: a tie, acc_norm: 1
            [2.0, 8.0, 8.0, 1.0],  # acc: 3; means 2, 4, 4, 1: acc_norm: 3
            [2.0, 8.0, 8.0, 1.0],  # the same
        ],
        ending_lengths=[[4, 1, 1, 1], [1, 1, 1, 1], [1, 3, 1, 3], [1, 2, 2, 1], [1, 2, 2, 1]],
        references=[1, 0, 1, 3, 0],
    )
    # acc: right, right, wrong, right, wrong; acc_norm: wrong, right, right, right, wrong
    assert result == {
        "acc": 0.6,
        "acc_norm": 0.6,
        "acc_stderr": pytest.approx((0.6 * 0.4 / 4) ** 0.5),
        "acc_norm_stderr": pytest.approx((0.6 * 0.4 / 4) ** 0.5),
        "n": 5,
    }
    correct = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])  # lm-evaluation-harness: sample deviation over root n
    assert result["acc_stderr"] == pytest.approx(correct.std(correction=1).item() / 5**0.5)

    one = metric.compute(summed_nll=[[1.0, 2.0, 3.0, 4.0]], ending_lengths=[[1, 1, 1, 1]], references=[0])
    assert (one["acc"], one["acc_stderr"], one["n"]) == (1.0, None, 1)
    with pytest.raises(ValueError, match="finite"):
        metric.compute(summed_nll=[[1.0, float("nan"), 3.0, 4.0]], ending_lengths=[[1, 1, 1, 1]], references=[0])


# Script


@pytest.fixture(scope="module")
def folder(tmp_path_factory, ours, tokenizer):
    """A model folder with tokenizer, `model`, and items.jsonl next to it."""
    folder = tmp_path_factory.mktemp("hellaswag")
    ours.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_jsonl(folder / "items.jsonl", make_items())
    return folder


def run_script(folder, *flags, launcher=(), environment=MappingProxyType({})):
    script = [sys.executable, *launcher, str(ROOT / "eval_hellaswag.py"), "model", "--data", "items.jsonl", *flags]
    settings = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = os.environ | settings | environment
    return subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.slow
def test_the_script_alone_and_on_two_processes(folder, ours, tokenizer):
    done = run_script(folder, "--output", "one.json")
    assert done.returncode == 0, done.stderr
    one = json.loads((folder / "one.json").read_text())
    assert_same_scores(one["items"], [score_one_by_one(ours, tokenizer, item) for item in make_items()])
    for item, row in zip(make_items(), one["items"]):
        assert (row["ind"], row["label"]) == (item["ind"], item["label"])
        nll, tokens = torch.tensor(row["summed_nll"]), torch.tensor(row["ending_tokens"])
        assert (row["prediction"], row["prediction_norm"]) == (nll.argmin(), (nll / tokens).argmin())
    assert (one["n"], one["protocol"], one["dtype"]) == (13, "completion style, build-nanogpt", "float32")
    assert len(one["data"]["sha256"]) == 64
    acc = one["results"]["hellaswag_acc"]
    assert acc == sum(row["prediction"] == row["label"] for row in one["items"]) / 13
    for text in (f"{acc:.4f} ±", "0.2859", "0.4893", "13 items; the full set has 10,042: do not compare"):
        assert text in done.stdout

    # 13 items on two ranks: one item is scored by both and must count once.
    done = run_script(
        folder,
        *("--output", "two.json", "--batch_size", "3"),
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("OpenAI gpt2-xl") == 1
    two = json.loads((folder / "two.json").read_text())
    assert_same_scores(two["items"], [row["summed_nll"] for row in one["items"]])
    assert two["results"] == one["results"]

    done = run_script(folder, "--output", "one.json", "--limit", "0")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]  # libraries may warn before
    assert errors == [
        "error: --limit 0: must be 1 or more",
        "error: --output one.json: exists and is not overwritten; remove it or choose another name",
    ]
    assert json.loads((folder / "one.json").read_text()) == one


@pytest.mark.slow
def test_neither_a_writable_home_nor_a_cache_is_needed(folder):
    nowhere = "/dev/null/nowhere"  # not even root can write there
    caches = dict.fromkeys(("HOME", "HF_HOME", "HF_MODULES_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME"), nowhere)
    done = run_script(folder, "--limit", "2", environment=caches)
    assert done.returncode == 0, done.stderr
    assert "acc_norm" in done.stdout and "Traceback" not in done.stderr


@pytest.fixture
def run_main(folder, monkeypatch):
    """`main` in this process, on the CPU, in the model's parent folder."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(folder)
    yield lambda *flags: eval_hellaswag.main(["--data", "items.jsonl", *flags])
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["items.jsonl"], "items.jsonl is not a checkpoint"),
        (["no/such/folder"], "no/such/folder does not exist"),
        (["model", "--limit", "-1"], "--limit -1: must be 1 or more"),
        (["model", "--batch_size", "0"], "--batch_size 0: must be 1 or more"),
        (["model", "--output", "nowhere/out.json"], "no folder nowhere"),
        (["model", "--output", "/proc/out.json"], "/proc cannot be written"),
        (["~/no_such_model"], "~/no_such_model does not exist"),
    ],
)
def test_mistakes_in_the_flags(run_main, flags, complaint):
    with pytest.raises(UserError, match=complaint):
        run_main(*flags)


def test_a_missing_model_and_a_missing_network_are_said_together(run_main, monkeypatch):
    monkeypatch.setattr(task_data, "_ask_hub_once", lambda source: (_ for _ in ()).throw(ConnectionError("no DNS")))
    with pytest.raises(UserError) as error:
        eval_hellaswag.main(["~/no_such_model"])
    about_data, about_model = str(error.value).splitlines()
    assert "cannot be downloaded from the Hub (no DNS)" in about_data and "--data FILE" in about_data
    assert "~/no_such_model does not exist" in about_model


def test_a_missing_data_file(run_main):
    with pytest.raises(UserError, match="--data none.jsonl: no such file"):
        eval_hellaswag.main(["model", "--data", "none.jsonl"])


def test_folders_without_a_causal_language_model(run_main, ours, theirs, tokenizer, tmp_path):
    def complaint_about(name):
        with pytest.raises(UserError) as error:
            run_main(str(tmp_path / name))
        assert "\n" not in str(error.value)
        return str(error.value)

    (tmp_path / "empty").mkdir()
    assert "holds no model" in complaint_about("empty")

    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")  # for which transformers makes a tokenizer with an empty vocabulary
    assert "no tokenizer can be loaded from there" in complaint_about("ours")
    assert "no tokenizer can be loaded from there" in complaint_about("theirs")

    T5Config().save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    assert "not a causal language model" in complaint_about("t5")

    small = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))
    small.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    assert "the model 100: it belongs to another model" in complaint_about("small")


def test_both_styles_in_one_report(run_main, folder, capsys):
    items = [item | {"activity_label": "Painting", "source_id": f"wikihow~{i}"} for i, item in enumerate(make_items())]
    write_jsonl(folder / "labelled.jsonl", items)
    run_main("model", "--style", "both", "--output", "both.json", "--data", "labelled.jsonl")
    output = capsys.readouterr().out
    assert output.index("completion style, build-nanogpt") < output.index("harness style, lm-evaluation-harness")
    assert output.count("\n  WikiHow ") == 2 and "13 items have no ctx_a and ctx_b" in output
    report = json.loads((folder / "both.json").read_text())
    harness = report["harness"]
    assert (report["style"], harness["style"]) == ("completion", "harness")
    assert report["results"] != harness["results"] and "hellaswag_acc_bytes" in harness["results"]
    assert report["by_source"] == {"WikiHow": report["results"]}
    for item, record in zip(items, harness["items"]):
        nll, characters = torch.tensor(record["summed_nll"]), torch.tensor(list(map(len, item["endings"])))
        assert record["prediction_norm"] == (nll / characters).argmin()


def test_only_a_limit_gives_the_first_items(run_main, capsys, monkeypatch):
    run_main("model", "--limit", "3")
    assert "only the first 3 items, not a random sample" in capsys.readouterr().out
    run_main("model", "--limit", "100")
    output = capsys.readouterr().out
    assert "13 items; the full set has 10,042" in output and "first" not in output
    monkeypatch.setattr(eval_hellaswag, "FULL_SET", 13)
    run_main("model", "--limit", "13")
    output = capsys.readouterr().out
    assert "first" not in output and "lacks WikiHow's [header]" in output


def test_truncated_items_are_reported(run_main, tokenizer, tmp_path, capsys):
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=24, n_embd=32, n_layer=1, n_head=2, bos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    run_main(str(tmp_path / "short"), "--limit", "1")
    output = capsys.readouterr().out
    assert "1 items were cut to the model's 24 positions" in output and "± n/a" in output
