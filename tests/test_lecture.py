"""docs/lecture.md follows all chapters of the lecture, points at code that exists, and prints what it says."""

import ast
import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from support import ROOT


LECTURE = ROOT / "docs" / "lecture.md"
CHAPTERS = 31
LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<target>[^)]+)\)")
NAME = re.compile(r"`([A-Za-z_][\w.]*)`")
OUTPUTS_THAT_VARY = {3: "torch's repr of a module changes between releases", 8: "the device of this machine"}


def chapters() -> dict[int, str]:
    parts = re.split(r"^### (\d+)\. ", LECTURE.read_text(), flags=re.M)[1:]
    return {int(number): text.partition("\n## ")[0] for number, text in zip(parts[::2], parts[1::2])}


def fence(kind: str, text: str) -> str:
    (found,) = re.findall(rf"^```{kind}\n(.*?)\n```$", text, flags=re.M | re.S)
    return found


def definitions(path: Path) -> set[str]:
    """Functions, classes, their methods, and names that are assigned at the top of a module."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
            names |= {f"{node.name}.{part.name}" for part in ast.walk(node) if isinstance(part, ast.FunctionDef)}
    return names


def code_alone(command: str) -> list[str]:
    """The code of each `python -c`, if the command consists of such lines and needs no run, data or network."""
    words = [shlex.split(line) for line in command.splitlines()]
    is_code = all(line[:2] == ["python", "-c"] and len(line) == 3 for line in words)
    return [line[2] for line in words] if is_code and not re.search("runs/|data/|publish/", command) else []


def test_every_chapter_is_there_with_a_command_and_its_output():
    assert list(chapters()) == list(range(1, CHAPTERS + 1))
    for number, text in chapters().items():
        assert fence("bash", text) and fence("text", text), number
        assert re.search(r"^Here: .*\[", text, flags=re.M), f"chapter {number} names no code"


def test_links_lead_to_files_and_to_names_that_are_defined_there():
    missing = []
    for text, target in LINK.findall(LECTURE.read_text()):
        path = (LECTURE.parent / target).resolve()
        if target.startswith("https://"):
            continue
        if not path.is_file():
            missing.append(target)
        elif path.suffix == ".py" and (name := NAME.fullmatch(text)) and name[1] != path.name:
            missing += [] if name[1] in definitions(path) else [f"{name[1]} in {target}"]
    assert not missing


OF_CODE_ALONE = [
    number for number, text in chapters().items() if code_alone(fence("bash", text)) and number not in OUTPUTS_THAT_VARY
]


@pytest.mark.slow
@pytest.mark.parametrize("number", OF_CODE_ALONE)
def test_what_depends_on_the_code_alone_prints_what_the_page_says(number):
    text = chapters()[number]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for code in code_alone(fence("bash", text)):
            exec(code, {})
    assert printed.getvalue().rstrip() == fence("text", text)
