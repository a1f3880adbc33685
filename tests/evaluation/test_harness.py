"""HellaSwag in harness style, item by item against lm-evaluation-harness itself: its command, with the local task of
docs/evaluation.md, on folders that publish.py wrote."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from support import ROOT, write_jsonl
from tiny_models import tiny_model

import publish
from gpt2repro.data.tokenization import Tokenizer
from gpt2repro.evaluation.hellaswag import Scores, score_hellaswag
from gpt2repro.evaluation.hellaswag_items import load_items
from gpt2repro.models.folder import open_model


pytestmark = pytest.mark.slow
lm_eval_main = pytest.importorskip("lm_eval.__main__", reason="pip install -e '.[harness]'")

POSITIONS = 40  # some rows are longer, no ending is
ACTIVITYNET = [
    ("Roof shingle removal", "A man is sitting on a roof.", "he"),
    ("Canoeing", "Two women are in a canoe. A man pulls it! Is it Ada, or Bob?", "the child and Mr Bob"),
    ("Getting a piercing", "3 the guy puts a ring on. 4 the guy cleans up.", "5 the guy"),
    ("Surfing", "A wave breaks over the pier while the camera turns slowly around and shows the beach.", '" a surfer'),
]
WIKIHOW = [
    ("Home and Garden", "[header] How to clean a window [title] Fill a bucket. [step] Stir it until it foams."),
    ("Family Life", "[header] How to be a good niece [title] Respect the beliefs and the home of others. [step] "
     "Listen to their points without any resistance (or nearly none), and wait for the end. [substeps] Do not talk."),
    ("Food", "[header] How to fry [title] Heat it  up. [step] "),
]  # fmt: skip
ENDINGS = [
    "opens the drawer, and takes out a long wooden spoon.",
    "falls asleep.",
    "picks it up [substeps] turns around twice [step] and puts it back.",
    "eats a cr\u00eape on the rue de la Libert\u00e9  at noon.",
    "[title] Repeat. [step] On the other side.",
]


def make_items() -> list[dict]:
    """28 items in the published form."""
    contexts = [(activity, f"{a} {b}", a, b) for activity, a, b in ACTIVITYNET]
    contexts += [(activity, ctx, ctx, "") for activity, ctx in WIKIHOW]
    items = []
    for i in range(4 * len(contexts)):
        activity, ctx, ctx_a, ctx_b = contexts[i % len(contexts)]
        endings = [ENDINGS[(i + e * (1 + i % 3)) % len(ENDINGS)] for e in range(4)]
        text = {"activity_label": activity, "ctx": ctx, "ctx_a": ctx_a, "ctx_b": ctx_b, "endings": endings}
        items.append({"ind": i, **text, "label": str(i % 4)})
    return items


@pytest.fixture(scope="module")
def folders(tmp_path_factory, gpt2: Tokenizer) -> dict[str, Path]:
    """One model with GPT-2's tokenizer, published in both formats."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 50304, "unpadded_vocab_size": 50257, "n_positions": POSITIONS, "n_embd": 16, "n_layer": 1}
    model = tiny_model(**sizes, initializer_range=0.5, eos_token_id=50256)
    model.save_pretrained(root / "source")
    gpt2.fast.save_pretrained(root / "source")
    for name in ("gpt2repro", "gpt2"):
        publish.main([str(root / "source"), "--to", str(root / name), "--format", name])
    return {name: root / name for name in ("gpt2repro", "gpt2")}


def documented(language: str) -> str:
    """The block of docs/evaluation.md in a language."""
    text = (ROOT / "docs" / "evaluation.md").read_text().partition("## lm-eval and lighteval")[2]
    return re.search(rf"```{language}\n(.*?)```", text, re.S)[1]


@pytest.fixture
def run_lm_eval(tmp_path, monkeypatch):
    """lm_eval's command on a model folder and items; returns its samples, in order, and its results."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "hellaswag_local.yaml").write_text(documented("yaml").replace(".jsonl.gz", ".jsonl"))
    (tasks / "hellaswag_local.py").write_text(documented("python"))
    monkeypatch.chdir(tmp_path)

    def run(folder: Path, items: list[dict]) -> tuple[list[dict], dict]:
        write_jsonl(tmp_path / "hellaswag_val.jsonl", items)
        model = ("--model", "hf", "--model_args", f"pretrained={folder},trust_remote_code=True", "--device", "cpu")
        task = ("--tasks", "hellaswag_local", "--include_path", str(tasks), "--batch_size", "4")
        monkeypatch.setattr(sys, "argv", ["lm_eval", *model, *task, "--output_path", "out", "--log_samples"])
        lm_eval_main.cli_evaluate()
        (samples,) = Path("out").rglob("samples_*.jsonl")
        (results,) = Path("out").rglob("results_*.json")
        rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        return rows, json.loads(results.read_text())["results"]["hellaswag_local"]

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def our_scores(folder: Path, items: Path) -> Scores:
    AcceleratorState._reset_state(reset_partial_state=True)
    model, tokenizer = open_model(str(folder))
    return score_hellaswag(model, tokenizer, load_items(str(items)), Accelerator(cpu=True), 3)["harness"]


@pytest.mark.parametrize(("format", "is_published_form"), [("gpt2repro", True), ("gpt2", False)])
def test_harness_style_is_lm_evals(format, is_published_form, folders, run_lm_eval, tmp_path):
    items = make_items()
    if not is_published_form:
        without = ("ctx_a", "ctx_b")
        items = [{name: value for name, value in item.items() if name not in without} for item in items]
    samples, results = run_lm_eval(folders[format], items)
    scores = our_scores(folders[format], tmp_path / "hellaswag_val.jsonl")

    assert len(samples) == len(items) and 0 < sum(item.cut for item in scores.items) < len(items)
    log_likelihoods = [[float(response[0][0]) for response in sample["resps"]] for sample in samples]
    np.testing.assert_allclose(-scores.summed_nll, log_likelihoods, rtol=1e-5, atol=1e-4)
    metrics = scores.metrics()
    for name in ("acc", "acc_norm", "acc_bytes"):
        right = scores.predictions[name] == scores.labels
        assert right.tolist() == [sample[name] == 1.0 for sample in samples]
        assert metrics[f"hellaswag_{name}"] == pytest.approx(results[f"{name},none"], abs=1e-12)
        assert metrics[f"hellaswag_{name}_stderr"] == pytest.approx(results[f"{name}_stderr,none"], abs=1e-12)
    assert metrics["hellaswag_acc"] != metrics["hellaswag_acc_norm"]  # the items tell the rules apart
