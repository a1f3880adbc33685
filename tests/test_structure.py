"""Imports go one way: scripts -> gpt2repro -> libraries; nothing imports a script."""

import ast
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - {"modeling_gpt2repro"}


def imported(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_no_script_imports_a_script(path):
    assert not imported(path) & SCRIPTS


@pytest.mark.parametrize("path", sorted((ROOT / "gpt2repro").rglob("*.py")), ids=lambda path: path.name)
def test_the_package_imports_neither_scripts_nor_the_model(path):
    """Models come in as arguments or through the Auto classes; only what opens or converts models and what settles a
    run names the model's classes."""
    allowed = {"modeling_gpt2repro"} if path.name in ("folder.py", "openai_weights.py", "preflight.py") else set()
    assert not imported(path) & (SCRIPTS | {"modeling_gpt2repro"}) - allowed


def test_the_model_file_needs_torch_and_transformers_only():
    assert imported(ROOT / "modeling_gpt2repro.py") - sys.stdlib_module_names == {"torch", "transformers"}
