"""The rules of imports: scripts -> rooms of gpt2repro, strictly downward and without cycles -> libraries."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest
from support import ROOT


PACKAGE = ROOT / "gpt2repro"
MODEL = "modeling_gpt2repro"  # on the ground floor; it imports nothing of this project
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - {MODEL}
GROUND = "ground"
ROOMS = {  # room -> the rooms that it may import from, besides itself
    GROUND: set(),
    "data": {GROUND},
    "prepare": {GROUND, "data"},
    "plan": {GROUND},
    "models": {GROUND, "data"},
    "evaluation": {GROUND, "data", "models"},
    "show": {GROUND, "data", "models", "evaluation"},
    "train": {GROUND, "plan", "data", "models", "evaluation", "show"},
    "hub": {GROUND, "plan", "data", "models", "evaluation", "show", "train"},
}
# Run with `python -m`; like scripts they may import every room, and nobody imports them.
DOORS = {"gpt2repro.planner", "gpt2repro.plot", "gpt2repro.report"}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    # `evaluate` copies and executes a metric; a demo runs on its own
    if not {"metrics", "space_app"} & set(path.relative_to(PACKAGE).parts)
}


def imports(path: Path, at_module_level: bool = False) -> set[str]:
    """The dotted names that a file imports, anywhere or only at module level."""
    tree = ast.parse(path.read_text())
    names = set()
    for node in tree.body if at_module_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            names |= submodules or {node.module or ""}
    return names


def top_level(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def room_of(module: str) -> str:
    room = module.split(".")[1] if "." in module else GROUND
    return room if room in ROOMS else GROUND


def our_imports(module: str) -> set[str]:
    return imports(MODULES[module]) & MODULES.keys()


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_no_script_imports_a_script_or_a_door(path):
    assert not top_level(imports(path)) & SCRIPTS
    assert not imports(path) & DOORS


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_from_the_rooms_below_it_only(module):
    room = room_of(module)
    allowed = ROOMS.keys() if module in DOORS else ROOMS[room] | {room}
    assert {room_of(imported) for imported in our_imports(module)} <= allowed
    assert not top_level(imports(MODULES[module])) & SCRIPTS
    assert not our_imports(module) & DOORS


def test_imports_have_no_cycle():
    graph = {module: our_imports(module) for module in MODULES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


def test_every_file_stands_in_a_room_that_says_what_lives_there():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == ROOMS.keys() - {GROUND}
    for room in rooms:
        text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
        missing = [path.stem for path in (PACKAGE / room).glob("*.py") if path.stem not in (text or "")]
        assert missing in (["__init__"], []), f"{room}/__init__.py does not mention {missing}"


@pytest.mark.parametrize("module", ["gpt2repro.errors", "gpt2repro.recipe"])
def test_what_every_start_imports_needs_the_standard_library_only(module):
    assert top_level(imports(MODULES[module])) <= sys.stdlib_module_names


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) == "prepare"])
def test_preparation_starts_without_torch_and_transformers(module):
    """Every worker process imports it."""
    assert not top_level(imports(MODULES[module], at_module_level=True)) & {"torch", "transformers", "accelerate"}


def test_the_model_file_needs_torch_and_transformers_only():
    assert top_level(imports(ROOT / f"{MODEL}.py")) - sys.stdlib_module_names == {"torch", "transformers"}
