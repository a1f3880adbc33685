"""The documentation: its tables are what the code says today, and the check of the site's links finds what it must."""

import importlib.util
from types import ModuleType

import pytest
from support import ROOT


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_tables_in_the_pages_are_those_of_the_code():
    tables = script("write_tables")
    pages = {page.name: page.read_text() for page in (ROOT / "docs").glob("*.md")}
    stale = [name for name, text in pages.items() if tables.with_tables(text) != text]
    assert not stale, "run `python scripts/write_tables.py`"
    for name in tables.TABLES:
        assert sum(f"<!-- table: {name} -->" in text for text in pages.values()) == 1


PAGE = '<html><body id="top"><a href="{}">x</a><img src="{}"></body></html>'


@pytest.mark.parametrize(
    ("link", "image", "problem"),
    [
        ("b/#top", "a.png", None),
        ("#top", "data:image/png;base64,AA==", None),
        ("https://example.com/x#y", "a.png", None),
        ("b/#bottom", "a.png", "b/#bottom: there is no #bottom"),
        ("c/", "a.png", "c/ leads nowhere"),
        ("http://example.com", "a.png", "http://example.com is no https address"),
        ("#top", "b.png", "loads b.png, which does not exist"),
        ("#top", "https://cdn.example.com/a.png", "loads https://cdn.example.com/a.png from elsewhere"),
    ],
)
def test_a_dead_link_and_a_foreign_picture_are_found(tmp_path, link, image, problem):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.png").touch()
    (tmp_path / "index.html").write_text(PAGE.format(link, image))
    (tmp_path / "b" / "index.html").write_text(PAGE.format("../", "../a.png"))
    assert script("build_site").link_problems(tmp_path) == ([f"index.html: {problem}"] if problem else [])
