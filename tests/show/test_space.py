"""The demo that publish.py --space writes: what its folder holds, and what its model answers."""

import importlib
import json
import sys

import pytest
import torch
import yaml
from support import ROOT, contents
from tiny_models import tiny_model
from transformers import GPT2LMHeadModel, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

import publish
from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.hub.model_card import model_card
from gpt2repro.models.folder import save_model_folder
from gpt2repro.models.openai_weights import to_gpt2
from gpt2repro.models.sampling import generate
from gpt2repro.show.space import GRADIO, PLOTLY


PROMPT = "The type of an object"
RECORD = {
    "data_dir": "/home/ada/data",
    "output_dir": "/home/ada/run",
    "license": "mit",
    "sample_prompts": ["class Queue", "The "],
    "data": {
        "corpus": {"name": "/home/ada/texts"},
        "tokenizer": {"name": "/home/ada/tokenizer"},
        "manifest_sha256": "f" * 64,
        "splits": {"train": {"tokens": 1000}, "val": {"tokens": 100, "bytes": 300}},
    },
    "versions": {"torch": "2.13.0"},
    "global_batch_tokens": 100,
}


@pytest.fixture(scope="module")
def tokenizer(topics):
    return build_tokenizer("bpe:300", topics[:5]).fast


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=300, unpadded_vocab_size=300, eos_token_id=299, bos_token_id=299).eval()


@pytest.fixture(scope="module")
def space(model, tokenizer, tmp_path_factory):
    """The demo of a run, in a folder."""
    run = tmp_path_factory.mktemp("runs") / "my-run"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(RECORD))
    rows = [{"step": 1, "tokens": 100, "loss": 5.0}, {"step": 1, "tokens": 100, "val_loss": 5.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_model_folder(run / "model", model, tokenizer, model_card(model, "my-run"))
    folder = tmp_path_factory.mktemp("spaces") / "try-it"
    publish.main([str(run), "--space", str(folder)])
    return folder


@pytest.fixture
def in_space(space, monkeypatch):
    """Imports of the Space's own files, as if it were the working directory."""
    monkeypatch.syspath_prepend(space)
    yield importlib.import_module
    for name in ("language_model", "app"):
        sys.modules.pop(name, None)


@pytest.fixture
def language_model(space, in_space):
    return in_space("language_model").LanguageModel(str(space / "model"))


def test_the_folder_holds_the_app_and_its_model_and_nothing_else(space):
    files = contents(space)
    app = {"app.py", "language_model.py", "modeling_gpt2repro.py", "settings.json", "requirements.txt", "README.md"}
    weights = {"config.json", "generation_config.json", "model.safetensors", "modeling_gpt2repro.py"}
    beside = {"tokenizer.json", "tokenizer_config.json", "README.md", "loss.png"}
    assert files.keys() == app | {f"model/{name}" for name in weights | beside}
    assert not [name for name, content in files.items() if b"/home/ada" in content]
    assert json.loads(files["settings.json"])["prompts"] == RECORD["sample_prompts"]


def test_the_readme_begins_with_what_the_hub_builds_the_space_by(space):
    _, header, body = (space / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert (metadata["title"], metadata["sdk"], metadata["app_file"]) == ("try-it", "gradio", "app.py")
    assert metadata["sdk_version"] == GRADIO and metadata["license"] == "mit" and "models" not in metadata
    assert len(metadata["short_description"]) <= 60  # the Hub refuses a longer one
    requirements = dict(line.split("==") for line in (space / "requirements.txt").read_text().splitlines())
    assert requirements.keys() == {"gradio", "plotly", "transformers", "torch"} and requirements["gradio"] == GRADIO


def test_the_releases_are_those_that_the_constraints_pin():
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert {f"gradio=={GRADIO}", f"plotly=={PLOTLY}"} <= set(pinned)


# ---- what the model answers ----


@pytest.mark.parametrize("top_k", [0, 5])
def test_a_continuation_is_the_text_that_sample_py_prints(language_model, model, tokenizer, top_k):
    *_, text = language_model.continuation("The class", 9, temperature=0.8, top_k=top_k, seed=3)
    assert text == generate(model, tokenizer, "The class", 9, seed=3, temperature=0.8, top_k=top_k)


def test_of_a_prompt_that_leaves_no_room_the_beginning_is_left_out(language_model, model, tokenizer):
    kept = tokenizer(PROMPT * 9).input_ids[-(model.config.n_positions - 12) :]
    *_, text = language_model.continuation(PROMPT * 9, 12, temperature=1.0, top_k=0, seed=1)
    assert text.startswith(tokenizer.decode(kept)) and len(text) > len(tokenizer.decode(kept))


def test_an_error_while_drawing_reaches_the_user(language_model, monkeypatch):
    monkeypatch.setattr(language_model.model, "generate", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(language_model.continuation("The", 5, temperature=1.0, top_k=0, seed=1))


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.5, 7), (2.0, 1000)])
def test_probabilities_are_those_of_transformers_own_warpers(language_model, model, tokenizer, temperature, top_k):
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    with torch.no_grad():
        expected = warpers(ids, model(ids).logits[:, -1])[0].softmax(0).sort(descending=True)
    shown = language_model.next_tokens(PROMPT, temperature, top_k, count=10)
    assert len(shown) == (7 if top_k == 7 else 10)
    assert [probability for _, probability in shown] == pytest.approx(expected.values[: len(shown)].tolist())
    assert shown[0][0] == language_model.token_text(int(expected.indices[0]))


def test_attention_is_that_of_gpt2lmheadmodel(language_model, model, tokenizer):
    plain = to_gpt2(model)
    assert isinstance(plain, GPT2LMHeadModel)
    plain.set_attn_implementation("eager")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids[:, -8:]
    with torch.no_grad():
        expected = plain(ids, output_attentions=True).attentions[1][0, 0]
    tokens, weights = language_model.attention(PROMPT, layer=2, head=1, longest=8)
    torch.testing.assert_close(weights, expected)
    assert len(tokens) == 8 and not weights.triu(1).any()


def test_tokens_are_written_so_that_they_can_be_told_apart(language_model, tokenizer):
    def written(text):
        return [language_model.token_text(id) for id in tokenizer(text).input_ids]

    assert written("\n") == ["\\n"] and written(" ") == ["␣"]
    assert all(name.startswith("part ") for name in written("é")) and len(set(written("é"))) == 2


def test_an_empty_prompt_begins_a_document(language_model, tokenizer):
    assert language_model.encode("", 10).tolist() == [[tokenizer.bos_token_id]]


# ---- the app ----


@pytest.mark.slow  # importing gradio takes seconds
def test_the_app_draws_what_the_model_answers(space, in_space, language_model):
    pytest.importorskip("gradio")
    app = in_space("app")
    assert list(app.write("The class", 9, 0.8, 5, 3)) == list(language_model.continuation("The class", 9, 0.8, 5, 3))
    (bars,) = app.draw_next_tokens(PROMPT, 0.5, 7).data
    assert list(bars.x) == [probability for _, probability in language_model.next_tokens(PROMPT, 0.5, 7, 10)]
    (heatmap,) = app.draw_attention(PROMPT, 2, 1).data
    tokens, weights = language_model.attention(PROMPT, 2, 1, 64)
    assert [list(row) for row in heatmap.z] == [row[: place + 1].tolist() for place, row in enumerate(weights)]
    buttons = {block.value for block in app.demo.blocks.values() if type(block).__name__ == "Button"}
    assert {"Continue", "Show where each token looks"} <= buttons and tokens


# ---- mistakes ----


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "add --to for the model, --space for a demo"),
        (["--space", "demo"], "--space demo is not owner/name; a folder starts with ./"),
        (["--space", "./taken"], "--space ./taken exists already; choose a new folder"),
        (["--space", "/proc/demo"], "--space /proc/demo: /proc cannot be written"),
        (["--space", "ada/demo"], "loads its model from there; add --to owner/name"),
        (["--space", "./demo", "--private"], "are for the Hub"),
        (["--space", "ada/demo", "--revision", "v2"], "are for the Hub"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(space, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "app.py").write_text("mine")
    with pytest.raises(publish.UserError, match=message) as caught:
        publish.main([str(space / "model"), *flags])
    assert len(str(caught.value).splitlines()) == 1
    assert contents(tmp_path) == {"taken/app.py": b"mine"}
