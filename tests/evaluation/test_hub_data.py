"""Benchmarks and OpenAI's weights from the Hub, through the real libraries against the server in hub_server.py."""

import io
import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hub_server import HubServer
from support import PATIENCE, ROOT, contents
from tiny_models import tiny_model

from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.hub.model_card import model_card
from gpt2repro.models.folder import save_model_folder
from gpt2repro.models.openai_weights import to_gpt2


pytestmark = pytest.mark.slow  # its client is a process
WIKITEXT_CONFIGS = ("wikitext-2-raw-v1", "wikitext-103-raw-v1")


def parquet(**columns) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def card(configs: dict[str, str]) -> bytes:
    """The README.md of a data set, which says where the test split of each configuration lies."""
    entries = [{"config_name": name, "data_files": [{"split": "test", "path": path}]} for name, path in configs.items()]
    return f"---\nconfigs: {json.dumps(entries)}\n---\n".encode()


@pytest.fixture
def hub(tmp_path, topics):
    with HubServer({}) as server:
        words = " ".join(topics[:3]).split()
        passages = [" ".join(words[start : start + 6]) for start in range(0, 60, 6)]
        pages = [f" = Page {n} = \n \n {topics[n][:200]} \n" for n in range(3)]
        repos = {
            "EleutherAI/lambada_openai": {
                "README.md": card({"default": "data/test.parquet"}),
                "data/test.parquet": parquet(text=passages),
            },
            "EleutherAI/wikitext_document_level": {
                "README.md": card({name: f"{name}/test.parquet" for name in WIKITEXT_CONFIGS}),
                **{f"{name}/test.parquet": parquet(page=pages) for name in WIKITEXT_CONFIGS},
            },
        }
        for name, files in repos.items():
            server.create(f"datasets/{name}").commit("data", files)
        treebank = server.create("datasets/ptb-text-only/ptb_text_only")
        sentences = {"penn_treebank/test/0000.parquet": parquet(sentence=["the shares did n't yield N", "no"])}
        treebank.commit("converted", sentences, branch="refs/convert/parquet")

        tokenizer = build_tokenizer("bpe:300", topics[:20]).fast
        ours = tiny_model(vocab_size=320, unpadded_vocab_size=300)
        for name, model in (("ours", ours), ("openai", to_gpt2(ours))):
            save_model_folder(tmp_path / name, model, tokenizer, model_card(model, name))
        server.create("gpt2").commit("weights", contents(tmp_path / "openai"))
        yield server


def scorecard(hub, home, output, *argv) -> dict:
    """What the script writes, in a process whose Hub is `hub`."""
    environment = os.environ | hub.environment(home) | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment |= {"HF_DATASETS_OFFLINE": "0", "HF_DATASETS_CACHE": f"{home}/datasets"}
    command = [sys.executable, str(ROOT / "scorecard.py"), *argv, "--output", str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return json.loads((output / "scorecard.json").read_text())


def test_models_of_the_hub_are_told_apart_by_their_commits(hub, tmp_path):
    """Before it is opened, only a model's configuration and tokenizer are here, which others may have as well."""
    files = contents(tmp_path / "openai")
    model = to_gpt2(tiny_model(vocab_size=320, unpadded_vocab_size=300))

    def commit(name: str) -> None:
        with torch.no_grad():
            model.transformer.wpe.weight.normal_()
        model.save_pretrained(tmp_path / "saved")
        hub.create(name).commit("weights", files | contents(tmp_path / "saved"))

    def perplexities(card: str) -> list[float]:
        found = scorecard(hub, tmp_path / "home", tmp_path / card, "somebody/a", "somebody/b", "--tasks", "lambada")
        measured = [result for result in found["results"] if result["origin"] == "measured"]
        return [result["value"] for result in measured if result["metric"] == "lambada_perplexity"]

    commit("somebody/a")
    commit("somebody/b")
    a, b = perplexities("card")
    commit("somebody/a")
    changed, same = perplexities("second card")
    assert len({a, b, changed}) == 3 and same == b


def test_benchmarks_and_openais_weights_come_from_the_hub(hub, tmp_path):
    home = tmp_path / "home"
    flags = "--against gpt2 gpt2-xl --tasks lambada wikitext2 ptb"
    found = scorecard(hub, home, tmp_path / "card", str(tmp_path / "ours"), *flags.split())

    data = {metric["task"]: metric["data"] for metric in found["metrics"]}
    assert {task: (entry["hub_id"], entry["n"]) for task, entry in data.items()} == {
        "lambada": ("EleutherAI/lambada_openai", 10),
        "wikitext2": ("EleutherAI/wikitext_document_level", 3),
        "ptb": ("ptb-text-only/ptb_text_only", 1),
    }
    # The same weights in OpenAI's layout, measured by the same code; the 1.5B model is not on this Hub.
    models = [(model["name"], model["origin"]) for model in found["models"]]
    assert models == [("ours", "measured"), ("gpt2 (124M)", "measured"), ("gpt2-xl (1.5B)", "published")]
    of_openai = [entry for entry in found["differences"] if entry["against"] == "gpt2 (124M)"]
    values = {result["metric"]: result["value"] for result in found["results"] if result["model"] == "ours"}
    assert len(of_openai) == len(values) == 8
    assert all(abs(entry["value"]) < 1e-4 * values[entry["metric"]] + 1e-9 for entry in of_openai)
    assert any(note.startswith("gpt2-xl (1.5B) cannot be had here") for note in found["notes"])
    assert list((home / "gpt2repro" / "scores").iterdir()), "what is of the Hub is cached in HF_HOME"
