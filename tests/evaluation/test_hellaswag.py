"""HellaSwag: scores compared with a plain loop, the metric with arithmetic; the script from flags to output file."""

import gzip
import json
import os
import socket
import subprocess
import sys
import time
from types import MappingProxyType

import datasets
import evaluate
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
from gpt2repro.evaluation import hellaswag
from gpt2repro.evaluation.hellaswag import (
    encode_item,
    evaluate_hellaswag,
    load_items,
    predict,
    score_endings,
    score_items,
)
from modeling_gpt2repro import GPT2ReproForCausalLM


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
    """The reference: each ending on its own, without batching, padding or mask."""
    scores = []
    for ending in item["endings"]:
        context = tokenizer.encode(item["ctx"], add_special_tokens=False)
        completion = tokenizer.encode(" " + ending, add_special_tokens=False)
        tokens = torch.tensor([context + completion])
        logits = model(input_ids=tokens).logits
        losses = F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
        scores.append(losses[len(context) - 1 :].sum().item())
    return scores


def assert_same_scores(scores, expected, tolerance=1e-4):
    """Args: expected: the four summed losses of each item."""
    got = torch.tensor([score["summed_nll"] for score in scores])
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=tolerance)


# Scores


@pytest.mark.parametrize("name", ["ours", "theirs"])
def test_scores_equal_a_plain_loop(name, request, tokenizer, encoded):
    model = request.getfixturevalue(name)
    expected = [score_one_by_one(model, tokenizer, item) for item in make_items()]
    scores = score_items(model, encoded, batch_size=4, device="cpu")
    assert_same_scores(scores, expected)
    lengths = [[len(tokenizer.encode(" " + ending)) for ending in item["endings"]] for item in make_items()]
    assert [score["ending_tokens"] for score in scores] == lengths


def test_padded_vocabulary_is_invisible(ours, theirs, encoded):
    expected = [score["summed_nll"] for score in score_items(theirs, encoded, 4, "cpu")]
    assert_same_scores(score_items(ours, encoded, 4, "cpu"), expected)


@pytest.mark.skipif(not VALIDATION_SET.is_file(), reason=f"the validation set is not at {VALIDATION_SET}")
def test_scores_of_real_items(ours, tokenizer):
    items = load_items(VALIDATION_SET, limit=20)
    assert len(items) == 20
    encoded = [encode_item(item, tokenizer, max_length=256) for item in items]
    expected = [score_one_by_one(ours, tokenizer, item) for item in items]
    assert_same_scores(score_items(ours, encoded, 8, "cpu"), expected)


def test_batch_size_and_order_do_not_matter(ours, encoded):
    expected = [score["summed_nll"] for score in score_items(ours, encoded, 1, "cpu")]
    for batch_size in (2, 5, 100):
        assert_same_scores(score_items(ours, encoded, batch_size, "cpu"), expected)
    assert_same_scores(score_items(ours, encoded[::-1], 3, "cpu"), expected[::-1])


def test_batches_hold_items_of_similar_length_longest_first(encoded, monkeypatch):
    lengths = []

    def record_lengths(model, items, device):
        lengths.append([item.length for item in items])
        return [[0.0] * 4] * len(items), [[1] * 4] * len(items)

    monkeypatch.setattr(hellaswag, "score_batch", record_lengths)
    score_items(torch.nn.Identity(), encoded, 4, "cpu")
    assert list(map(len, lengths)) == [4, 4, 4, 1]
    assert sum(lengths, []) == sorted((item.length for item in encoded), reverse=True)


def test_padding_does_not_matter(ours, encoded, monkeypatch):
    expected = [score["summed_nll"] for score in score_items(ours, encoded, 4, "cpu")]
    collate = hellaswag.collate

    def collate_with_other_pads(items):
        tokens, ending_mask = collate(items)
        for r, row in enumerate(row for item in items for row in item.rows):
            tokens[r, len(row) :] = 17
        more = torch.full((len(tokens), 9), 23)
        return torch.cat([tokens, more], dim=1), torch.cat([ending_mask, more < 0], dim=1)

    monkeypatch.setattr(hellaswag, "collate", collate_with_other_pads)
    assert_same_scores(score_items(ours, encoded, 4, "cpu"), expected)


def test_a_model_without_logits_to_keep_scores_the_same(ours, encoded):
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = ours

        def forward(self, *args, **kwargs):
            assert "logits_to_keep" not in kwargs
            return self.module(*args, **kwargs)

    expected = [score["summed_nll"] for score in score_items(ours, encoded, 4, "cpu")]
    assert_same_scores(score_items(Wrapper(), encoded, 4, "cpu"), expected)


def test_the_mode_is_restored_and_dropout_is_off(encoded):
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=256, n_embd=32, n_layer=1, n_head=2)  # dropout 0.1
    model = GPT2LMHeadModel(config).train()
    in_train_mode = score_items(model, encoded, 4, "cpu")
    assert model.training and all(module.training for module in model.modules())
    model.eval()
    assert score_items(model, encoded, 4, "cpu") == in_train_mode
    assert not model.training

    model.train()
    with pytest.raises(ZeroDivisionError):
        model.register_forward_hook(lambda *_: 1 / 0)
        score_items(model, encoded, 4, "cpu")
    assert model.training


@pytest.mark.slow
def test_a_compiled_model_is_not_recompiled(ours, encoded):
    expected = [score["summed_nll"] for score in score_items(ours, encoded, 1, "cpu")]
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = GPT2ReproForCausalLM(ours.config)
    model.load_state_dict(ours.state_dict())
    model.compile(backend=backend)
    assert_same_scores(score_items(model, encoded, 1, "cpu"), expected)
    assert not compiled
    model(torch.zeros(1, 8, dtype=torch.int64))
    assert compiled  # a call outside of score_items does reach the backend


def test_autocast_of_the_caller_is_used(ours, encoded):
    with torch.autocast("cpu", torch.bfloat16):
        low = torch.tensor([score["summed_nll"] for score in score_items(ours, encoded, 4, "cpu")])
    full = torch.tensor([score["summed_nll"] for score in score_items(ours, encoded, 4, "cpu")])
    assert not torch.equal(low, full)
    torch.testing.assert_close(low, full, rtol=0.02, atol=1.0)


def test_score_endings_by_hand():
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.7, 0.2], [0.3, 0.3, 0.4], [0.9, 0.05, 0.05]])
    logits = probabilities.log().expand(2, -1, -1) + 5.0  # softmax ignores a constant
    tokens = torch.tensor([[2, 1, 0, 2], [2, 1, 2, 0]])
    ending_mask = torch.tensor([[False, False, True, True], [False, True, False, False]])
    summed_nll, counts = score_endings(logits, tokens, ending_mask)
    # position 1 scores token 0 and position 2 token 2; in the second row position 0 scores token 1
    expected = -torch.tensor([0.1 * 0.4, 0.25]).log()
    torch.testing.assert_close(summed_nll, expected)
    assert counts.tolist() == [2, 1]

    for broken in ([False] * 4, [True, True, False, False]):
        with pytest.raises(ValueError, match="each row needs an ending"):
            score_endings(logits, tokens, torch.tensor([broken, [False, True, False, False]]))


# Encoding


def test_context_and_ending_are_encoded_separately(tokenizer):
    item = make_items()[4]
    encoded = encode_item(item, tokenizer)
    for row, count, ending in zip(encoded.rows, encoded.ending_tokens, item["endings"]):
        assert tokenizer.decode(row) == item["ctx"] + " " + ending
        assert row[:-count] == tokenizer.encode(item["ctx"])
    assert encoded.label == item["label"] and not encoded.cut


def test_a_long_row_is_truncated_at_the_start_of_its_context(tokenizer):
    item = make_items()[6]
    full = encode_item(item, tokenizer)
    longest_ending = max(full.ending_tokens)
    max_length = longest_ending + 5
    cut = encode_item(item, tokenizer, max_length)
    assert cut.cut and cut.length == max_length and cut.ending_tokens == full.ending_tokens
    for short, row in zip(cut.rows, full.rows):
        assert short == row[-max_length:]

    assert encode_item(item, tokenizer, full.length) == full
    context_tokens = len(full.rows[0]) - full.ending_tokens[0]
    tiny = encode_item(item, tokenizer, max_length=4)  # one token of context and the first three of the ending
    assert tiny.ending_tokens == [min(3, count) for count in full.ending_tokens]
    for short, row in zip(tiny.rows, full.rows):
        assert short == row[context_tokens - 1 : context_tokens + 3]


def test_a_text_without_tokens_is_an_error(tokenizer):
    with pytest.raises(UserError, match="has no token for ''"):
        encode_item({"ctx": "", "endings": ["a", "b", "c", "d"], "label": 0}, tokenizer)


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
    monkeypatch.setattr(hellaswag, "HUB_ID", str(tmp_path / "repo"))
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


def test_without_a_network_the_hub_is_asked_once(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: (_ for _ in ()).throw(socket.gaierror("no DNS")))
    started = time.monotonic()
    with pytest.raises(UserError, match="cannot be downloaded from the Hub"):
        load_items()
    assert time.monotonic() - started < 5


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
        ending_tokens=[[4, 1, 1, 1], [1, 1, 1, 1], [1, 3, 1, 3], [1, 2, 2, 1], [1, 2, 2, 1]],
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

    one = metric.compute(summed_nll=[[1.0, 2.0, 3.0, 4.0]], ending_tokens=[[1, 1, 1, 1]], references=[0])
    assert (one["acc"], one["acc_stderr"], one["n"]) == (1.0, None, 1)
    with pytest.raises(ValueError, match="finite"):
        metric.compute(summed_nll=[[1.0, float("nan"), 3.0, 4.0]], ending_tokens=[[1, 1, 1, 1]], references=[0])


def test_evaluate_hellaswag(ours, encoded, accelerator):
    metrics, records = evaluate_hellaswag(ours, encoded, accelerator, batch_size=4)
    scores = score_items(ours, encoded, 4, "cpu")
    assert records == [{"label": item.label, **score} for item, score in zip(encoded, scores)]
    right = [predict(record)[0] == record["label"] for record in records]
    right_norm = [predict(record)[1] == record["label"] for record in records]
    p, p_norm, n = sum(right) / 13, sum(right_norm) / 13, 13
    assert metrics == {
        "hellaswag_acc": pytest.approx(p),
        "hellaswag_acc_norm": pytest.approx(p_norm),
        "hellaswag_acc_stderr": pytest.approx((p * (1 - p) / (n - 1)) ** 0.5),
        "hellaswag_acc_norm_stderr": pytest.approx((p_norm * (1 - p_norm) / (n - 1)) ** 0.5),
        "hellaswag_items": n,
    }


def test_non_finite_scores_are_an_error(encoded, accelerator):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, n_positions=256, n_embd=32, n_layer=1, n_head=2))
    model.transformer.ln_f.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="13 of 13 items are not finite"):
        evaluate_hellaswag(model, encoded, accelerator, batch_size=4)


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
def test_the_script_alone_and_on_two_processes(folder, ours, encoded):
    done = run_script(folder, "--output", "one.json")
    assert done.returncode == 0, done.stderr
    one = json.loads((folder / "one.json").read_text())
    scores = score_items(ours, encoded, 1, "cpu")
    assert_same_scores(one["items"], [score["summed_nll"] for score in scores])
    for item, row in zip(make_items(), one["items"]):
        assert (row["ind"], row["label"]) == (item["ind"], item["label"])
        assert (row["prediction"], row["prediction_norm"]) == predict(row)
    assert (one["n"], one["protocol"], one["dtype"]) == (13, "completion style, build-nanogpt", "float32")
    assert len(one["data"]["sha256"]) == 64
    acc = one["results"]["hellaswag_acc"]
    assert acc == sum(row["prediction"] == row["label"] for row in one["items"]) / 13
    for text in (f"{acc:.4f} ±", "0.2859", "0.4893", "only the first 13 of 10,042 items"):
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
    yield lambda *flags: eval_hellaswag.main([*flags, "--data", "items.jsonl"])
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
    monkeypatch.setattr(hellaswag, "_ask_hub_once", lambda: (_ for _ in ()).throw(ConnectionError("no DNS")))
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


def test_truncated_items_are_reported(run_main, tokenizer, tmp_path, capsys):
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=24, n_embd=32, n_layer=1, n_head=2, bos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    run_main(str(tmp_path / "short"), "--limit", "1")
    output = capsys.readouterr().out
    assert "1 items were cut to the model's 24 positions" in output and "± n/a" in output
