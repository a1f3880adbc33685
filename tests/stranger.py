"""What a user without the checkout does with a model: `stranger.py FUNCTION ARGUMENT ...`, in an interpreter that finds
neither the checkout nor an editable install of it."""

import builtins
import json
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path = [entry for entry in sys.path if Path(entry).resolve() not in (Path.cwd(), ROOT, ROOT / "tests")]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]

import torch  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline  # noqa: E402


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits


def use_folder(folder: str) -> None:
    """Generate from a model folder, as its card says and by pipeline."""
    example = Path(folder, "README.md").read_text().split("```python\n")[1].split("```")[0]
    names, questions = {}, []
    builtins.input = questions.append  # transformers asks before it runs code that it was not told to trust
    exec(example.replace("PATH_OR_REPO", folder), names)
    model, tokenizer = names["model"], names["tokenizer"]
    assert not questions
    assert "transformers_modules" in type(model).__module__
    ids = tokenizer("The ", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape == (1, ids.shape[1] + 5)
    text = pipeline("text-generation", folder, trust_remote_code=True)("The ", max_new_tokens=5)[0]["generated_text"]
    assert text.startswith("The ") and len(text) > 4


def load_by_name(name: str, result: str) -> None:
    """Load every Auto class that the config names; save logits, those made from the trunk, and a greedy text."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=True)
    trunk = AutoModel.from_pretrained(name, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(name)
    package = f"transformers_modules.{name.replace('/', '.')}"
    assert all(package in type(thing).__module__ for thing in (config, trunk, model))
    ids = tokenizer("A cat ", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=5, do_sample=False)[0])
    with torch.no_grad():
        by_hand = trunk(torch.arange(8)[None]).last_hidden_state @ trunk.wte.weight[: config.unpadded_vocab_size].T
    torch.save([logits(model), by_hand, text], result)


def open_space(folder: str, result: str) -> None:
    """Ask the model of a Space, with the code in the Space's folder only; save the probabilities of the next token."""
    sys.path.insert(0, folder)
    from language_model import LanguageModel

    settings = json.loads(Path(folder, "settings.json").read_text())
    language_model = LanguageModel(settings["model"] or str(Path(folder, "model")), settings["revision"])
    code = sys.modules[type(language_model.model).__module__].__file__
    assert Path(str(code)).parent == Path(folder)
    torch.save(language_model.next_tokens("A cat ", temperature=1.0, top_k=0, count=4), result)


def load_revisions(name: str, first: str, second: str, result: str) -> None:
    """Load a repository by every kind of revision; save the logits and the code's VERSION of each."""
    revisions = {
        "main": {},
        "sha": {"revision": first},
        "tag": {"revision": "v1"},
        "branch": {"revision": "release/1"},
        "old weights, new code": {"revision": first, "code_revision": second},
        "new weights, old code": {"code_revision": "v1"},
    }
    found = {}
    for case, revision in revisions.items():
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, **revision)
        code = sys.modules[type(model).__module__]
        found[case] = [logits(model), getattr(code, "VERSION", 1)]
    torch.save(found, result)


def load_plain(name: str, revision: str, result: str) -> None:
    """Load a GPT2LMHeadModel; save its class, the tokens of a text, and logits."""
    model = AutoModelForCausalLM.from_pretrained(name, revision=revision)
    tokens = AutoTokenizer.from_pretrained(name, revision=revision)("A cat").input_ids
    torch.save((type(model).__name__, tokens, logits(model)), result)


if __name__ == "__main__":
    _, function, *arguments = sys.argv
    globals()[function](*arguments)
    found = sys.modules.get("modeling_gpt2repro")  # a Space has a copy of its own
    assert found is None or Path(str(found.__file__)).parent != ROOT, "the checkout's own model was imported"
