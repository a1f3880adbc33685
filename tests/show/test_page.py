"""report.html: what it says, that it is one file which runs nobody else's code and fetches nothing, and its errors."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import yaml
from support import PATIENCE

from gpt2repro import report
from gpt2repro.errors import UserError
from gpt2repro.evaluation.reference_curves import load_curve
from gpt2repro.evaluation.score_cache import model_sha256
from gpt2repro.evaluation.scorecard import FORMAT
from gpt2repro.run_folder import RunFolder
from gpt2repro.show.logged_run import LoggedRun
from gpt2repro.train.report import open_run, write_report


pytest.importorskip("bokeh")
pytestmark = pytest.mark.slow  # together
HOSTILE = (
    """</pre></script><script>document.title = "hacked"</script><img src="https://evil.example/x" onerror="alert(1)">"""
)
LLMC = "llmc-124m-fineweb"
RECORD = {
    "data_dir": "/home/ada/data",
    "output_dir": "/home/ada/runs/one",
    "init_from": "scratch",
    "model": {"n_layer": 12, "n_embd": 768},
    "sequence_length": 1024,
    "validation_tokens": 10485760,
    "max_steps": 19560,
    "global_batch_tokens": 524288,
    "batch_ramp_start": 0,
    "batch_ramp_tokens": 0,
    "learning_rate": 0.0006,
    "reference_losses": {"a level": 3.2},
    "data": {
        "manifest_sha256": "f" * 64,
        "corpus": {"name": "HuggingFaceFW/fineweb", "hub_id": "HuggingFaceFW/fineweb", "config": "sample-10BT"},
        "tokenizer": {"name": "gpt2", "vocab_size": 50257, "sha256": "e" * 64},
        "splits": {
            "train": {"tokens": 10_000_000_000, "documents": 100},
            "val": {"tokens": 100_000_000, "bytes": 440_000_000},
        },
    },
    "hardware": "8 x NVIDIA H100",
    "versions": {"torch": "2.13.0", "git_commit": "abc123"},
}  # fmt: skip
RECORD["data"]["corpus"]["revision"] = "0a1"
CARD = {
    "format": FORMAT,
    "made": {"date": "2026-11-26T10:41:07+00:00"},
    "models": [{"name": "one"}, {"name": "gpt2 (124M)"}],
    "metrics": [
        {"key": "acc", "task": "hellaswag", "title": "HellaSwag acc", "unit": "share", "higher_is_better": True,
         "method": "a method", "data": {"name": "val", "sha256": "d" * 64, "n": 10, "units": "items"}},
    ],
    "results": [
        {"model": "one", "metric": "acc", "value": 0.31, "low": 0.29, "high": 0.33, "origin": "measured",
         "source": None, "same_method": True, "note": None},
    ],
    "differences": [],
    "sentences": ["one: above gpt2 (124M) on HellaSwag acc by 1.9 points [0.9, 2.9]"],
    "notes": [],
}  # fmt: skip


def rows_of(*val_losses: float, tokens: int = 250 * 524288, samples: str = "Once") -> list[dict]:
    rows = []
    for number, loss in enumerate(val_losses, start=1):
        at = {"step": 250 * number, "tokens": tokens * number}
        training = {"loss": loss - 0.1, "lr": 6e-4, "grad_norm": 0.5, "tokens_per_second": 1e6, "hours": 1.5}
        rows += [at | training, at | {"val_loss": loss}, at | {"samples": [f"{samples} {number}"]}]
    return rows


def make_run(folder, *val_losses, samples="Once", **record):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECORD | record))
    rows = rows_of(*val_losses, samples=samples)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(tmp_path):
    """A run that is on llm.c's curve."""
    curve = load_curve(LLMC)
    losses = [curve.loss_at(250 * number * 524288) for number in range(1, 5)]
    return make_run(tmp_path / "runs" / "one", *losses, reference_curve=LLMC)


def written(*arguments) -> str:
    """The report that these arguments of `python -m gpt2repro.report` write."""
    report.main([str(argument) for argument in arguments])
    output = arguments[arguments.index("--output") + 1] if "--output" in arguments else arguments[0] / "report.html"
    return output.read_text()


class Page(HTMLParser):
    """What a page shows, and what it would load.

    text: what lies outside of scripts and styles.
    scripts: their texts.
    links: the values of src, href and the like.
    """

    def __init__(self, html: str):
        super().__init__()
        self.text, self.scripts, self.links, self.policy = "", [], [], ""
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.inside = tag
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text += data


# ---- what it says ----


def test_the_report_says_what_the_run_logged(run):
    text = Page(written(run)).text
    final = rows_of(*open_run(run).series("val_loss")[1])[-2]["val_loss"]
    assert open_run(run).verdict.headline in text and "on track" in text
    for said in (
        f"{final:.4f}",
        "Once 4",
        "Once 1",
        "0a1",
        "f" * 64,
        "e" * 64,
        "8 x NVIDIA H100",
        "abc123",
        "1.50 hours",
    ):
        assert said in text
    assert "Dotted: a level, 3.2000" in text and "Dashed: llm.c's GPT-2 124M" in text


def test_the_recipe_stands_beside_the_defaults_and_the_reference(run):
    record = yaml.safe_load((run / "recipe.yaml").read_text()) | {"learning_rate": 0.0123}
    record["overrides"] = [{"step": 500, "learning_rate": {"from": 0.0006, "to": 0.0123}}]
    (run / "recipe.yaml").write_text(yaml.safe_dump(record))
    html = written(run)
    (row,) = re.findall(r"<tr[^>]*><th scope=\"row\">learning_rate</th>.*?</tr>", html, re.DOTALL)
    assert re.findall(r"<td>(.*?)</td>", row) == ["0.0123", "0.0006", "0.0006"]
    assert "from step 500 on: learning_rate=0.0123 instead of 0.0006" in html


def test_several_runs_lie_on_top_of_each_other_with_their_differences(run, tmp_path):
    other = make_run(tmp_path / "runs" / "two", 4.0, 3.9, learning_rate=0.001, hardware="a laptop")
    html = written(run, other, "--output", tmp_path / "both.html")
    text = Page(html).text
    assert "one and two" in text and all(open_run(path).verdict.headline in text for path in (run, other))
    differing = re.findall(r'<tr class="differs"><th scope="row">(.*?)</th>', html)
    assert differing == ["learning_rate", "hardware"]


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / parent / "same" / "run", 4.0) for parent in ("a", "b")]
    page = Page(written(*runs, runs[0], "--output", tmp_path / "both.html"))
    assert "a/same/run and b/same/run" in page.text


def test_a_run_is_compared_with_the_reference_that_is_asked_for(tmp_path):
    run = make_run(tmp_path / "one", 4.0)
    assert "on track" not in written(run)
    assert "llm.c" in written(run, "--reference_curve", LLMC)


def test_a_scorecard_in_the_runs_folder_is_shown_if_it_is_of_its_model(run, tmp_path, capsys):
    (run / "model").mkdir()
    (run / "model" / "model.safetensors").write_text("the weights")
    measured = [{"name": "one", "sha256": model_sha256(run / "model")}]
    (run / "scorecard.json").write_text(json.dumps(CARD | {"models": measured}))
    text = Page(written(run)).text
    assert CARD["sentences"][0] in text and "31.0% [29.0, 33.0]" in text and "a method" in text
    elsewhere = tmp_path / "card.json"
    elsewhere.write_text(json.dumps(CARD | {"sentences": ["another card"]}))
    assert "another card" in written(run, "--scorecard", elsewhere)
    (run / "model" / "model.safetensors").write_text("weights of later steps")
    assert "Scorecard" not in Page(written(run)).text
    assert "is of other weights" in capsys.readouterr().err


def test_a_run_that_has_only_begun_has_a_report():
    page = pytest.importorskip("gpt2repro.show.page")
    assert "2.3000" in page.report_page([LoggedRun("new", RECORD, [{"step": 0, "tokens": 0, "val_loss": 2.3}])])


def test_a_broken_run_has_a_report(tmp_path):
    assert "1e+304" in Page(written(make_run(tmp_path / "run", 812.5))).text


# ---- one file, nobody else's code, no private paths ----


def hostile_run(folder):
    """Whatever people choose is code."""
    data = RECORD["data"] | {"corpus": {"name": HOSTILE}, "tokenizer": {"name": HOSTILE, "vocab_size": 9}}
    return make_run(
        folder, 4.0, 3.9, samples=HOSTILE, data=data, hardware=HOSTILE, reference_losses={HOSTILE: 3.5, "$$x$$": 3.6}
    )


def test_text_is_text(tmp_path):
    hostile = hostile_run(tmp_path / "<script>alert(1)<")
    page = Page(written(hostile))
    assert len(page.scripts) == 3 and not page.links
    assert page.text.count(HOSTILE) >= 4 and "<script>alert(1)<" in page.text


def test_the_policy_allows_the_pages_own_scripts_and_no_connection(run):
    page = Page(written(run))
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts]
    assert re.findall("'sha256-(.*?)'", page.policy) == hashes
    assert page.policy.startswith("default-src 'none'; img-src data:;") and "http" not in page.policy
    assert not page.links


def test_no_path_of_the_machine_leaves_it(tmp_path):
    data = RECORD["data"] | {
        "corpus": {"name": "/home/ada/texts", "revision": None},
        "tokenizer": {"name": "/home/ada/tokenizer", "vocab_size": 9},
    }
    run = make_run(
        tmp_path / "one", 4.0, data=data, init_from="/home/ada/start", hellaswag_data="/home/ada/h.jsonl",
        reference_curve=LLMC,
    )  # fmt: skip
    html = written(run)
    assert "not comparable" in html and "/home" not in html and str(tmp_path) not in html
    assert "texts" in html and "tokenizer" in html


@pytest.mark.slow  # it starts a browser
def test_a_browser_draws_it_without_complaint(tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("chromium is not installed")
    hostile = hostile_run(tmp_path / "a run")
    written(hostile)
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom", f"file://{hostile}/report.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "bokeh 3" not in line]
    assert complaints == []
    assert "<title>a run</title>" in done.stdout and done.stdout.count('class="bk-') > 0
    shown = re.findall(r'<div data-step="(\d+)">', done.stdout)
    assert shown == ["500"] and 'data-step="250" hidden' in done.stdout


# ---- mistakes ----


def refusal(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        report.main([str(argument) for argument in arguments])
    return str(caught.value)


def test_mistakes_are_reported_together_each_in_a_line(run, tmp_path):
    (tmp_path / "empty").mkdir()
    young = make_run(tmp_path / "young")
    (young / "metrics.jsonl").write_text('{"step": 1, "tokens": 10, "loss": 5.0}\n')
    (tmp_path / "card.json").write_text("{}")
    flags = ("--scorecard", tmp_path / "card.json", "--reference_curve", "llmc-124m")
    lines = refusal(tmp_path / "empty", young, *flags).splitlines()
    said = ("did you mean llmc-124m-fineweb?", "is no run", "has not been validated yet", "add --output FILE")
    assert len(lines) == 5
    assert all(words in line for words, line in zip((*said, "cannot be used"), lines))


def test_another_file_of_that_name_is_left_alone(run):
    written(run)
    written(run)  # our own is replaced
    (run / "report.html").write_text("mine")
    assert "exists and is no report of ours" in refusal(run)
    assert "move it away" in write_report(RunFolder(run), open_run(run))
    assert (run / "report.html").read_text() == "mine"


def test_a_run_ends_with_its_results_even_if_its_report_cannot_be_made(run, monkeypatch):
    monkeypatch.setattr("gpt2repro.show.page.components", lambda *_, **__: 1 / 0)
    line = write_report(RunFolder(run), open_run(run))
    assert line == "none, as it could not be made (division by zero)" and not (run / "report.html").exists()


def test_without_its_packages_one_line_says_how_to_get_them(run, monkeypatch):
    monkeypatch.setattr("gpt2repro.train.report.REPORT_PACKAGES", ("bokeh", "no_such_package"))
    assert refusal(run) == 'a report needs no_such_package; run `pip install "gpt2repro[report]"`'
    line = write_report(RunFolder(run), open_run(run))
    assert line.startswith("none: a report needs no_such_package; run `pip install")
    assert f"`python -m gpt2repro.report {run}`" in line and not (run / "report.html").exists()
