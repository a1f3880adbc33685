"""Examples in documents, docstrings and model cards."""

import ast
import re

from support import ROOT
from tiny_models import tiny_model

from gpt2repro.hub.model_card import model_card


DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("notebooks/*.ipynb")]
PYTHON = [*ROOT.glob("*.py"), *ROOT.glob("gpt2repro/**/*.py"), *ROOT.glob("benchmarks/*.py")]
LOCAL = ("FOLDER", "./", "/", "~", "...", "runs/", "publish/")  # what a reader has written himself starts with one
LOADS_CODE = re.compile(
    r"""(?: \w+\.from_pretrained\( | pipeline\( [^,()]*, ) (?P<arguments> [^()]* trust_remote_code=True [^()]* ) \)
    | pretrained= (?P<harness> \S* trust_remote_code=True \S* )""",  # of lm_eval's --model_args
    re.VERBOSE,
)


def unpinned(text: str) -> list[str]:
    """The examples that run the code of a Hub repository at whatever commit is the newest."""
    examples = [match["arguments"] or match["harness"] for match in LOADS_CODE.finditer(text)]
    from_hub = [example for example in examples if not example.lstrip(" \\\"'").startswith((*LOCAL, "MODEL"))]
    return [example for example in from_hub if "revision=" not in example]


def docstrings(source: str) -> str:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    return "\n".join(filter(None, found))


def test_code_from_the_hub_is_pinned_wherever_it_is_run():
    texts = {path: path.read_text() for path in DOCUMENTS} | {path: docstrings(path.read_text()) for path in PYTHON}
    model = tiny_model()
    texts |= {repo_id: str(model_card(model, "tiny", repo_id)) for repo_id in ("ada/tiny", None)}
    assert not {path: examples for path, text in texts.items() if (examples := unpinned(text))}
    assert sum(len(LOADS_CODE.findall(text)) for text in texts.values()) > 5, "the pattern finds examples"


def test_examples_that_are_not_pinned_are_found():
    load = "AutoModelForCausalLM.from_pretrained({}, trust_remote_code=True)"
    pipeline = 'pipeline("text-generation", {}, trust_remote_code=True)'
    assert unpinned(load.format('"ada/tiny"')) and unpinned(pipeline.format('"ada/tiny"'))
    assert unpinned("lm_eval --model_args pretrained=ada/tiny,trust_remote_code=True --tasks hellaswag")
    assert not unpinned(load.format('"ada/tiny", revision="COMMIT"') + load.format('"runs/demo/model"'))
    assert not unpinned(pipeline.format('"./tiny"'))
