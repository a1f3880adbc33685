"""The scorecard: its arithmetic on known columns, what it says of them, and scorecard.py as users run it."""

import dataclasses
import json
import math
import os
import shutil
import socket
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import constants
from matplotlib.figure import Figure
from support import DAMAGED_JSON, PATIENCE, ROOT, prepare
from tiny_models import tiny_model

import scorecard as script
from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.errors import UserError
from gpt2repro.evaluation import score_cache, tasks
from gpt2repro.evaluation.perplexity import WindowSettings
from gpt2repro.evaluation.published import openai_model, openai_models, published_score
from gpt2repro.evaluation.scorecard import (
    MeasuredModel,
    decimals,
    make_scorecard,
    make_sentences,
    public_part,
    read_scorecard,
)
from gpt2repro.evaluation.scorecard_views import as_markdown, as_table, draw_scorecard, escaped, shown_value
from gpt2repro.evaluation.tasks import PreparedData, spread
from gpt2repro.hub.model_card import model_card
from gpt2repro.models.folder import save_model_folder
from gpt2repro.models.openai_weights import to_gpt2


N = 2_000
HELLASWAG = [
    {
        "ctx": f"He took the {thing} and",
        "activity_label": "Doing",
        "label": i % 4,
        "ctx_a": "He took it.",
        "ctx_b": "and",
    }
    | {"endings": [f"threw it {where} {i}." for where in ("away", "up", "down", "far over the wall")]}
    for i, thing in enumerate(["ball", "stone", "old wet towel", "cup", "pen", "hat"])
]
SETTING = {"device": "CPU", "dtype": "auto", "mixed_precision": "no"}


def items_task(caveat=None, hub_id="Rowan/hellaswag") -> tasks.Task:
    """HellaSwag's harness style and a perplexity, without data."""
    data = {"name": "val.jsonl", "hub_id": hub_id, "sha256": "0" * 64, "n": N, "units": "items", "complete": True}
    metrics = (
        tasks.Metric("hellaswag_harness_acc_norm", "HellaSwag", "right", "items", "share", True, True, False, caveat),
        tasks.Metric("text_word_perplexity", "perplexity a word", "nll", "items", "perplexity", False, True),
        tasks.Metric("text_loss", "loss a token", "nll", "items", "nats", False, False, True),
    )
    return tasks.Task("hellaswag", "HellaSwag", "how", 1, "items", data, metrics, lambda *_: {})


def measured(name, right, nll, vocabulary="v", is_reference=False) -> MeasuredModel:
    """A model that has the first `right` of N items right, and a loss of about `nll` on each."""
    correct = (np.arange(N) < right).astype(float)
    losses = nll + 0.1 * np.sin(np.arange(N))
    columns = {"hellaswag": {"right": correct, "items": np.ones(N), "nll": losses}}
    return MeasuredModel(name, f"sha of {name}", 1_000, vocabulary, columns, is_reference)


def card_of(*models, published=(), task=None, notes=()):
    return make_scorecard(list(models), list(published), [task or items_task()], SETTING, list(notes))


def find(entries, **fields):
    [entry] = [entry for entry in entries if fields.items() <= entry.items()]
    return entry


# ---- values, intervals, differences ----


def test_values_and_paired_differences():
    card = card_of(measured("a", 800, 3.0), measured("b", 760, 3.05))
    value = find(card["results"], model="a", metric="hellaswag_harness_acc_norm")
    error = math.sqrt(0.4 * 0.6 / N)
    assert value["value"] == 0.4 and value["low"] == pytest.approx(0.4 - 1.96 * error, abs=0.1 * error)

    difference = find(card["differences"], metric="hellaswag_harness_acc_norm")
    paired = math.sqrt(40 - 40**2 / N) / N  # 40 items only a has right, none only b
    assert difference["value"] == pytest.approx(0.02)
    assert difference["low"] == pytest.approx(0.02 - 1.96 * paired, abs=0.15 * paired)
    assert (difference["verdict"], difference["interval"]) == ("above", "paired bootstrap over items")

    perplexity = find(card["differences"], metric="text_word_perplexity")
    assert perplexity["value"] == pytest.approx(math.exp(3) - math.exp(3.05), rel=1e-3)
    assert perplexity["verdict"] == "above" and perplexity["high"] < 0  # less is better


def test_a_model_beside_itself_is_level():
    card = card_of(measured("a", 800, 3.0), measured("a (2)", 800, 3.0))
    for difference in card["differences"]:
        assert (difference["value"], difference["low"], difference["high"]) == (0, 0, 0)
        assert difference["verdict"] == "level"
    assert card["sentences"] == [
        "a: level with a (2) on HellaSwag (+0.0 points [0.0, 0.0]), on perplexity a word (+0.0 [0.0, 0.0])"
    ]


def test_losses_a_token_are_compared_only_with_the_same_vocabulary():
    card = card_of(measured("a", 800, 3.0), measured("b", 760, 3.05, vocabulary="other"))
    assert {entry["metric"] for entry in card["differences"]} == {"hellaswag_harness_acc_norm", "text_word_perplexity"}


def test_who_is_compared_with_whom():
    models = [measured(name, 700, 3, is_reference=name.startswith("r")) for name in ("a", "b", "c", "r1", "r2")]
    pairs = {(entry["model"], entry["against"]) for entry in card_of(*models)["differences"]}
    with_references = {(ours, theirs) for ours in "abc" for theirs in ("r1", "r2")}
    assert pairs == {("a", "b"), ("a", "c")} | with_references


def test_against_a_published_figure_only_our_own_error_counts():
    card = card_of(measured("a", 700, 3.0), published=[openai_models()["gpt2"]])
    ours = find(card["results"], model="a", metric="hellaswag_harness_acc_norm")
    theirs = find(card["results"], model="gpt2 (124M)")
    assert (theirs["value"], theirs["origin"], theirs["low"]) == (0.3114, "published", None)
    assert "lm-evaluation-harness" in theirs["source"]
    difference = find(card["differences"], against="gpt2 (124M)")
    assert difference["value"] == pytest.approx(0.35 - 0.3114)
    assert difference["low"] == pytest.approx(ours["low"] - 0.3114)
    assert (difference["verdict"], difference["interval"]) == ("above", "sampling error of a alone")
    assert card["sentences"] == ["a: above gpt2 (124M) on HellaSwag by 3.9 points [1.8, 6.0]"]  # 1.96 x 1.067 points


def test_a_model_without_published_figures_has_no_column():
    figures = [
        openai_models()["gpt2"],
        openai_models()["gpt2-medium"],
    ]  # of the latter acc_norm in harness style is unknown
    assert [model["name"] for model in card_of(measured("a", 700, 3.0), published=figures)["models"]] == [
        "a",
        "gpt2 (124M)",
    ]


def test_figures_of_other_data_are_shown_but_not_compared():
    card = card_of(measured("a", 700, 3.0), published=[openai_models()["gpt2"]], task=items_task(caveat="other items"))
    theirs = find(card["results"], model="gpt2 (124M)")
    assert not theirs["same_method"] and theirs["note"] == "other items" and card["differences"] == []
    assert "31.14% †" in as_table(card) and "(other items)" in as_table(card)


@pytest.mark.parametrize("tokens, compared", [(10_485_760, True), (1_048_576, False)])
def test_a_published_loss_holds_for_its_validation_tokens(tokens, compared):
    metric = tasks.Metric("validation_loss", "loss", "nll", "items", "nats", False, True, True)
    data = items_task().data | {"n": tokens}
    corpus = "HuggingFaceFW/fineweb, sample-10BT"
    task = dataclasses.replace(items_task(), metrics=(metric,), data=data, corpus=corpus)
    card = card_of(measured("a", 800, 3.3), published=[openai_models()["gpt2"]], task=task)
    published = find(card["results"], origin="published")
    assert (published["value"], published["same_method"]) == (3.425, compared)
    assert bool(card["differences"]) == compared and bool(card["sentences"]) == compared


def test_what_is_the_same_for_all_items_has_no_interval():
    """A model that has nothing right is not certain to have nothing right."""
    card = card_of(measured("a", 0, 3.0), measured("b", 500, 3.0), published=[openai_models()["gpt2"]])
    assert find(card["results"], model="a", metric="hellaswag_harness_acc_norm")["low"] is None
    assert find(card["differences"], against="gpt2 (124M)", model="a")["verdict"] is None
    assert find(card["differences"], against="b", metric="hellaswag_harness_acc_norm")["verdict"] == "below"


def test_a_single_unit_has_a_value_and_no_interval():
    columns = {"hellaswag": {"right": np.ones(1), "items": np.full(1, 2.0), "nll": np.full(1, 6.0)}}
    models = [MeasuredModel(name, name, 1, "v", columns) for name in ("a", "b")]
    card = card_of(*models)
    assert find(card["results"], model="a", metric="text_loss")["value"] == 3
    assert {entry["low"] for entry in card["results"] + card["differences"]} == {None}
    assert card["sentences"] == [] and "50.00%" in as_table(card)


@pytest.mark.parametrize("width, digits", [(2.0, 1), (0.013, 3), (150, 0), (0.9, 2), (0, 1), (1e-9, 5)])
def test_intervals_are_shown_with_two_digits_of_their_width(width, digits):
    assert decimals(width) == digits


def test_huge_perplexities_stay_readable():
    result = {"value": 3.54e12, "low": 1.87e11, "high": 3.28e13, "origin": "measured", "same_method": True}
    assert shown_value(result, "perplexity") == "3.5e+12 [1.9e+11, 3.3e+13]"
    assert shown_value(result | {"low": None, "high": None}, "perplexity") == "3.5e+12"


def test_sentences_give_direction_and_amount():
    metrics = [
        {"key": "acc", "title": "HellaSwag", "unit": "share", "higher_is_better": True, "headline": True},
        {"key": "ppl", "title": "WikiText-2", "unit": "perplexity", "higher_is_better": False, "headline": True},
        {"key": "acc2", "title": "not spoken of", "unit": "share", "higher_is_better": True, "headline": False},
    ]
    pair = {"model": "mine", "against": "gpt2 (124M)"}
    differences = [
        pair | {"metric": "acc", "value": 0.019, "low": 0.009, "high": 0.029, "verdict": "above"},
        pair | {"metric": "ppl", "value": 3.1, "low": 2.04, "high": 4.2, "verdict": "below"},
        pair | {"metric": "acc2", "value": 0.019, "low": 0.009, "high": 0.029, "verdict": "above"},
    ]
    assert make_sentences(metrics, differences) == [
        "mine: above gpt2 (124M) on HellaSwag by 1.9 points [0.9, 2.9]; below on WikiText-2 (3.1 more [2.0, 4.2])"
    ]


# ---- published figures ----


def test_published_figures():
    assert openai_model("openai-community/gpt2-xl") is openai_models()["gpt2-xl"] and openai_model("runs/gpt2") is None
    paper = published_score("gpt2-xl", "ptb_word_perplexity")
    assert (paper.value, paper.same_method) == (35.76, False) and "table 3" in paper.source
    fineweb = published_score("gpt2", "validation_loss", "HuggingFaceFW/fineweb-edu, sample-10BT")
    assert fineweb.value == 3.2924 and published_score("gpt2", "validation_loss", "some/corpus") is None


# ---- for people ----


def test_table_markdown_and_picture(tmp_path, monkeypatch):
    models = [measured("my_run", 800, 3.0), measured("other|run", 760, 12.0)]
    card = card_of(*models, published=[openai_models()["gpt2"]], notes=["a note"])
    table = as_table(card).splitlines()
    assert table[0].split() == ["my_run", "other|run", "gpt2", "(124M)"]
    assert table[1].startswith("HellaSwag ↑") and "40.0% [37.9, 42.2]" in table[1] and table[1].endswith("31.14% *")
    assert table[-1] == "note: a note" and "hellaswag: how; 2,000 items of val.jsonl, sha256 000000000000" in table

    markdown = as_markdown(card)
    assert "| HellaSwag ↑ | 40.0% [37.9, 42.2] |" in markdown and "other\\|run" in markdown
    assert "\n- a note\n" in markdown and "\n- my\\_run: above other\\|run on HellaSwag" in markdown

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (drawn.append(self), save(self, *args, **kw)))
    draw_scorecard(card, tmp_path / "card.png")
    panels = [axes for axes in drawn[0].axes if axes.get_visible()]
    assert [len(panel.get_yticklabels()) for panel in panels] == [3, 2]  # the second has no published figure
    assert panels[1].get_xscale() == "log" and panels[0].get_xscale() == "linear"
    assert (tmp_path / "card.png").read_bytes().startswith(b"\x89PNG")


def test_markdown_finds_no_marks_in_names():
    assert escaped("a_b|c*<d>`") == r"a\_b\|c\*\<d\>\`"


def test_what_is_published_of_a_card_names_no_other_model():
    models = [
        measured("mine", 800, 3.0),
        measured("secret", 700, 3.0),
        measured("gpt2 (124M)", 600, 3.0, is_reference=True),
    ]
    card = card_of(*models)
    part = public_part(card, "sha of mine")
    assert [model["name"] for model in part["models"]] == ["this model", "gpt2 (124M)"]
    assert "secret" not in json.dumps(part) and '"mine"' not in json.dumps(part)
    [sentence] = part["sentences"]
    assert sentence.startswith("this model: above gpt2 (124M) on HellaSwag by 10.0 points [8.7, 11.3]; level on ")
    assert public_part(card, "another sha") is None


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[1]", b'{"format": "other"}', b"\xff", b'{"format": "gpt2repro scorecard 1"}']
)
def test_a_damaged_card_is_one_line(tmp_path, content):
    (tmp_path / "scorecard.json").write_bytes(content)
    with pytest.raises(UserError, match="make it again with"):
        read_scorecard(tmp_path / "scorecard.json")


# ---- tasks ----


def test_a_limit_takes_items_from_everywhere():
    assert spread(list(range(10)), 4) == [0, 2, 5, 7] and spread([1, 2], None) == [1, 2] and spread([1, 2], 5) == [1, 2]


def test_only_a_file_of_the_sets_size_is_taken_for_the_set(tmp_path, monkeypatch):
    """Neither a part of it nor, say, its training split gets its name or is compared with figures of it."""
    monkeypatch.setattr(tasks.hellaswag_items, "FULL_SET", 3)
    monkeypatch.setattr(tasks.lambada, "FULL_SET", 3)
    for units, is_set in ((2, False), (3, True), (4, False)):
        (tmp_path / "h").write_text("".join(json.dumps(item) + "\n" for item in HELLASWAG[:units]))
        (tmp_path / "l").write_text('{"text": "He threw the ball"}\n' * units)
        (tmp_path / "p").write_text(" no it was n't black monday \n" * (3_758 + units))
        made = [
            tasks.hellaswag_task(str(tmp_path / "h"), None, "--f"),
            tasks.lambada_task(str(tmp_path / "l"), None, "--f"),
            tasks.benchmark_task("ptb", str(tmp_path / "p"), None, "--f", None, None),
        ]
        assert [task.data["complete"] for task in made] == [is_set] * 3
        assert [task.data["hub_id"] is not None for task in made] == [is_set] * 3
        assert [task.metrics[0].caveat is None for task in made] == [False, is_set, is_set]  # the first lacks marks
        assert made[1].metrics[0].caveat == (None if is_set else f"{units} were given, the set has 3")


@pytest.fixture(scope="module")
def bpe_data(tmp_path_factory, topics):
    """Prepared documents with <|endoftext|>."""
    root = tmp_path_factory.mktemp("bpe")
    rows = "".join(json.dumps({"text": topic[:600]}) + "\n" for topic in topics[:40])
    (root / "topics.jsonl").write_text(rows)
    prepare("files", "--source", root / "topics.jsonl", "--tokenizer", "bpe:300", "--output_dir", root / "data",
            "--val_fraction", "0.2")  # fmt: skip
    return root / "data"


@pytest.fixture(scope="module")
def model():
    model = tiny_model(vocab_size=320, unpadded_vocab_size=300)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize("stride", [None, 8])
def test_the_validation_loss_is_the_trainers(bpe_data, model, stride):
    """Every window's mean loss, by transformers' own class, whatever --stride says; documents are the units."""
    data = PreparedData.open(str(bpe_data), 0)
    task = tasks.validation_task(data)
    columns = task.measure(model, data.tokenizer, Accelerator(cpu=True), WindowSettings(stride))
    windows = torch.tensor(data.tokens[: len(data.tokens) // 32 * 32 + 1]).unfold(0, 33, 32)
    with torch.no_grad():
        logits = to_gpt2(model)(windows[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    [metric] = task.metrics
    assert metric.score(columns).value() == pytest.approx(expected, rel=1e-6)
    assert len(columns["nll"]) == data.manifest.splits["val"].documents
    assert columns["tokens"].sum() == windows[:, 1:].numel()


def test_the_validation_split_as_text_is_what_was_prepared(bpe_data, topics):
    data = PreparedData.open(str(bpe_data), 0)
    texts = data.texts()
    assert len(texts) == data.manifest.splits["val"].documents and set(texts) <= {topic[:600] for topic in topics}
    assert sum(len(text.encode()) for text in texts) == data.manifest.splits["val"].bytes


def test_prepared_data_without_documents_has_blocks(data_dir):
    data = PreparedData.open(str(data_dir), 5_000)
    assert len(data.tokens) == 5_001 and data.starts.tolist() == [0, 1024, 2048, 3072, 4096]
    assert "blocks of 1,024 tokens" in data.units


@pytest.mark.parametrize(
    "tokenizer, preparation, caveat",
    [
        ("gpt2", {"split": {"val_tokens": 100_000_000}, "deduplication": None}, None),
        ("gpt2", {}, None),  # another trainer's tokens
        ("bpe:50257", {"split": {"val_tokens": 100_000_000}}, "here the tokenizer is bpe:50257"),
        ("gpt2", {"split": {"val_fraction": 0.005}}, "here the validation documents are chosen by hash"),
        ("gpt2", {"split": {"val_tokens": 1}, "deduplication": {"kind": "exact"}}, "here the corpus is deduplicated"),
    ],
)
def test_a_published_loss_holds_for_the_same_validation_split(data_dir, tokenizer, preparation, caveat):
    data = PreparedData.open(str(data_dir), 1_000)
    record = dataclasses.replace(data.manifest.tokenizer, name=tokenizer)
    manifest = dataclasses.replace(data.manifest, tokenizer=record, preparation=preparation)
    [metric] = tasks.validation_task(dataclasses.replace(data, manifest=manifest)).metrics
    assert metric.caveat == caveat


def test_other_tokens_are_other_data(tmp_path):
    """Also where the fingerprint, of the ends of another trainer's files, is the same."""
    tokens = np.arange(400_000, dtype=np.uint16) % 50_000
    tokens.tofile(tmp_path / "train.bin")
    hashes = set()
    for token in (1, 2):
        tokens[200_000] = token
        tokens.tofile(tmp_path / "val.bin")
        data = PreparedData.open(str(tmp_path), 0)
        hashes.add((data.manifest.fingerprint, data.describe()["sha256"]))
    (first, _), (second, _) = hashes
    assert first == second, "or the tokens need no hash of their own"


# ---- scorecard.py ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory, topics):
    """Two models, ours and one in OpenAI's layout, and files of tasks."""
    root = tmp_path_factory.mktemp("models")
    bpe = build_tokenizer("bpe:300", topics[:20]).fast
    ours = tiny_model(vocab_size=320, unpadded_vocab_size=300, n_positions=64)
    save_model_folder(root / "ours", ours, bpe, model_card(ours, "ours"))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    to_gpt2(ours).save_pretrained(root / "plain")
    bpe.save_pretrained(root / "plain")
    (root / "hellaswag.jsonl").write_text("".join(json.dumps(item) + "\n" for item in HELLASWAG))
    (root / "lambada.jsonl").write_text('{"text": "He threw the ball"}\n' * 3)
    (root / "wiki.txt").write_text("\n".join(f" = Page {n} = \n \n {topics[n][:300]} \n" for n in range(4)))
    return root


def flags_of(folders, *names) -> list[str]:
    suffixes = {"wikitext2": "wiki.txt"}
    files = [f"{name}={folders / suffixes.get(name, f'{name}.jsonl')}" for name in names]
    return ["--tasks", *names, "--task_data", *files]


@pytest.mark.slow  # a few seconds
def test_the_script_measures_once_and_again_when_the_model_changes(folders, tmp_path, bpe_data, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    copy = tmp_path / "copy"
    shutil.copytree(folders / "ours", copy)
    argv = [str(copy), str(folders / "plain"), *flags_of(folders, "hellaswag", "lambada", "wikitext2")]
    argv += ["--data", str(bpe_data), "--text", str(folders / "wiki.txt")]
    script.main([*argv, "--output", str(tmp_path / "card")])
    first = json.loads((tmp_path / "card" / "scorecard.json").read_text())
    assert {metric["task"] for metric in first["metrics"]} == {
        "validation_text",
        "hellaswag",
        "lambada",
        "wikitext2",
        "text:wiki",
    }
    assert [model["name"] for model in first["models"]] == ["copy", "plain", "gpt2 (124M)"]
    assert (tmp_path / "card" / "scorecard.md").read_text().startswith("# Scorecard\n")
    text, pages = (
        find(first["results"], model="copy", metric=f"{task}_bits_per_byte") for task in ("text_wiki", "wikitext2")
    )
    assert text["value"] != pages["value"]  # one document instead of four, and not de-tokenized

    def not_again(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(script, "measure_task", not_again)
    script.main([*argv, "--output", str(tmp_path / "again")])
    again = json.loads((tmp_path / "again" / "scorecard.json").read_text())
    assert again["results"] == first["results"] and again["differences"] == first["differences"]
    with monkeypatch.context() as newer:
        newer.setattr(script, "software_versions", lambda: {"transformers": "99"})
        with pytest.raises(AssertionError, match="measured again"):
            script.main(argv)
    (folders / "ours" / "config.json").touch()  # the content counts
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.1}))
    with pytest.raises(AssertionError, match="measured again"):
        script.main(argv)
    with pytest.raises(UserError, match="scorecard.json exists and is not overwritten"):
        script.main([*argv, "--output", str(tmp_path / "card")])


@pytest.mark.slow
def test_two_processes_measure_the_same(folders, tmp_path):
    argv = flags_of(folders, "hellaswag", "lambada", "wikitext2")
    values = []
    for number, launcher in enumerate(([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"])):
        model, card = tmp_path / f"model{number}", tmp_path / f"card{number}"
        shutil.copytree(folders / "plain", model, ignore=shutil.ignore_patterns(score_cache.FOLDER))
        command = [sys.executable, *launcher, str(ROOT / "scorecard.py"), str(model), *argv, "--output", str(card)]
        settings = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        results = json.loads((card / "scorecard.json").read_text())["results"]
        values.append({result["metric"]: result["value"] for result in results if result["origin"] == "measured"})
    alone, together = values
    assert len(alone) == 9 and together == pytest.approx(alone, rel=1e-6)


def test_a_cache_that_is_damaged_or_cannot_be_written_does_not_matter(tmp_path, folders, monkeypatch):
    task = items_task()
    file = score_cache.cache_file(folders / "ours", "hash", task, {})
    assert file.parent == folders / "ours" / ".scores"
    score_cache.write_cached(tmp_path / "a" / "x.json", task, 12, {"nll": np.array([1.5, 2.0])})
    parameters, columns = score_cache.read_cached(tmp_path / "a" / "x.json")
    assert parameters == 12 and columns["nll"].tolist() == [1.5, 2.0]
    for damage in DAMAGED_JSON.values():
        (tmp_path / "a" / "x.json").write_bytes(damage)
        assert score_cache.read_cached(tmp_path / "a" / "x.json") is None
    (tmp_path / "file").touch()
    score_cache.write_cached(tmp_path / "file" / "x.json", task, 12, {})  # cannot be written

    monkeypatch.setattr(score_cache, "write_problem", lambda folder: "read-only")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    elsewhere = score_cache.cache_file(folders / "ours", "hash", task, {})
    assert elsewhere.parent == tmp_path / "home" / "gpt2repro" / "scores" and elsewhere.name == file.name


def test_every_file_that_tokens_depend_on_is_in_a_models_hash(tmp_path, folders):
    shutil.copytree(folders / "plain", tmp_path / "model")
    hashes = {score_cache.model_sha256(tmp_path / "model")}
    for name in ("special_tokens_map.json", "added_tokens.json", "spiece.model", "tokenizer.json", "config.json"):
        (tmp_path / "model" / name).write_text("changed")
        hashes.add(score_cache.model_sha256(tmp_path / "model"))
    (tmp_path / "model" / "README.md").write_text("not a part of the model")
    assert len(hashes) == 6 and score_cache.model_sha256(tmp_path / "model") in hashes


@pytest.mark.parametrize("change", [{"version": 2}, {"method": "other"}, {"data": {"sha256": "other"}}])
def test_what_the_numbers_depend_on_is_in_the_name(folders, change):
    task = items_task()
    names = {score_cache.cache_file(folders / "ours", "hash", task, {"dtype": "auto"}).name}
    names.add(
        score_cache.cache_file(folders / "ours", "hash", dataclasses.replace(task, **change), {"dtype": "auto"}).name
    )
    names.add(score_cache.cache_file(folders / "ours", "other", task, {"dtype": "auto"}).name)
    names.add(score_cache.cache_file(folders / "ours", "hash", task, {"dtype": "bfloat16"}).name)
    assert len(names) == 4


@pytest.mark.parametrize(
    "words, mistakes",
    [
        ("ours --tasks hellaswgag", ["--tasks hellaswgag: no such task; did you mean hellaswag?"]),
        ("ours --tasks zzz", ["--tasks zzz: no such task; choose from validation, hellaswag"]),
        ("ours --tasks validation", ["--tasks validation needs the prepared directory: give --data DIR"]),
        ("ours --tasks hellaswag --task_data hellaswag=broken.jsonl", ["broken.jsonl, line 7: not JSON"]),
        ("ours --tasks lambada --task_data lambada=broken.jsonl", ["broken.jsonl, line 1: not"]),
        ("ours --tasks ptb --task_data ptb=nope.txt", ["--task_data ptb=nope.txt: no such file"]),
        ("ours --tasks ptb --task_data lambada=lambada.jsonl ptb", ["lambada is not measured", "must be NAME=FILE"]),
        ("ours --tasks wikitext2 --task_data wikitext2=empty.txt", ["wikitext2=empty.txt: is empty"]),
        ("ours --text latin1.txt --data no --tasks validation", ["latin1.txt: cannot be", "directory no does not"]),
        ("", ["no MODEL given"]),
        ("nope/nope/nope --limit 0 --stride 0", ["--limit 0 must", "--stride 0 must", "nope/nope/nope does not exist"]),
        ("--weights-only ours plain --data x", ["--weights-only A B measures no tasks"]),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_each(folders, monkeypatch, words, mistakes):
    monkeypatch.chdir(folders)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: (_ for _ in ()).throw(ConnectionError("off")))
    lines = [json.dumps(item) for item in HELLASWAG]
    (folders / "broken.jsonl").write_text("\n".join([*lines, "{"]))
    (folders / "empty.txt").write_text(" \n")
    (folders / "latin1.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError) as caught:
        script.main(words.split())
    found = [line for line in str(caught.value).splitlines() if " is left out: " not in line]
    assert len(found) == len(mistakes) and all(mistake in line for mistake, line in zip(mistakes, found)), found


def test_a_text_that_a_models_tokenizer_cannot_write_is_left_out(folders, tmp_path, monkeypatch, capsys):
    """Its characters would be missing from the losses, but not from the bytes that these are divided by."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "known.txt").write_text("to be or not")
    tokenizer = build_tokenizer("char", ["to be or not"]).fast
    model = tiny_model(vocab_size=64, unpadded_vocab_size=tokenizer.vocab_size)
    save_model_folder(tmp_path / "characters", model, tokenizer, model_card(model, "characters"))
    argv = [str(tmp_path / "characters"), str(folders / "plain"), "--tasks", "wikitext2"]
    argv += ["--task_data", f"wikitext2={folders / 'wiki.txt'}"]
    (tmp_path / "numbers.jsonl").write_text('{"text": "to be 12"}\n')
    both = [*argv[:3], "lambada", *argv[3:], f"lambada={tmp_path / 'numbers.jsonl'}"]
    script.main([*both, "--text", str(tmp_path / "known.txt")])
    printed = capsys.readouterr().out
    assert "characters has no score on LAMBADA: the tokenizer has no token for '1', and would" in printed
    assert "note: characters has no score on WikiText-2: the tokenizer has no token" in printed
    assert "known bits a byte" in printed and "WikiText-2 bits a byte" in printed
    with pytest.raises(UserError, match="and would leave it out of the text; choose other --tasks"):
        script.main(argv)


def test_a_tokenizer_of_another_model_is_refused(folders, tmp_path, topics, capsys):
    shutil.copytree(folders / "plain", tmp_path / "mixed")
    build_tokenizer("bpe:400", topics[:40]).fast.save_pretrained(tmp_path / "mixed")
    argv = [str(tmp_path / "mixed"), *flags_of(folders, "lambada")]
    with pytest.raises(UserError, match="the tokenizer has 400 tokens, the model 300") as caught:
        script.main(argv)
    assert "\n" not in str(caught.value)


def test_without_a_network_published_figures_stand_in(folders, monkeypatch, capsys, tmp_path):
    """And default tasks that cannot be had are left out."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: (_ for _ in ()).throw(socket.gaierror("no DNS")))
    argv = [str(folders / "plain"), "--against", "gpt2", "gpt2-xl"]
    script.main([*argv, "--task_data", f"hellaswag={folders / 'hellaswag.jsonl'}"])
    printed = capsys.readouterr().out
    assert "gpt2 (124M)" in printed and "48.93% †" in printed  # six items are not the set
    assert "note: gpt2-xl (1.5B) cannot be had here (gpt2-xl: no such file or folder, and no model " in printed
    assert "note: lambada is left out: LAMBADA (EleutherAI/lambada_openai, default, test) cannot be" in printed
    with pytest.raises(UserError) as caught:  # a mistake beside it does not make gpt2 one
        script.main(["nope/nope/nope", "--against", "gpt2", *flags_of(folders, "lambada")])
    assert str(caught.value) == "nope/nope/nope does not exist; give a model folder, a run folder or a Hub id"


def test_the_flags_know_every_benchmark():
    """Its names are written out in the script, which checks them before it imports what holds the benchmarks."""
    names = ("validation", "hellaswag", "lambada", *tasks.TEXT_BENCHMARKS)
    assert names == script.TASKS
