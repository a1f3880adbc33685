"""Corpora that need no dataset: the documentation that every CPython carries, and Tiny Shakespeare."""

import ast
import sysconfig
import urllib.request
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from gpt2repro.errors import UserError


SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
NOT_DOCUMENTATION = {
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip")
}


def python_docs() -> Iterator[str]:
    """The language reference (pydoc_data.topics), then the docstrings of every standard library module, laid out as by
    pydoc. The order is fixed: topics by name, then modules by path."""
    from pydoc_data.topics import topics  # half a megabyte that only this corpus needs

    for name in sorted(topics):
        yield topics[name].strip() + "\n"
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()):
        parts = path.relative_to(library).with_suffix("").parts
        if NOT_DOCUMENTATION.isdisjoint(parts):
            yield from _module_docs(".".join(parts).removesuffix(".__init__"), path)


def _module_docs(name: str, path: Path) -> Iterator[str]:
    """The document of a module, docstring and documented classes and functions; nothing if there are none."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # some files of the library are broken on purpose
        return
    doc = ast.get_docstring(tree)
    entries = list(_entries(tree, indent=""))
    if not doc and not entries:
        return
    head = [f"Module {name}", ""] + ([doc, ""] if doc else [])
    yield "\n".join(head + entries).rstrip() + "\n"


def _entries(node: ast.AST, indent: str) -> Iterator[str]:
    """The lines of all documented classes and functions in a node."""
    for child in getattr(node, "body", []):
        if isinstance(child, ast.ClassDef):
            bases = ", ".join(map(ast.unparse, child.bases))
            signature = f"class {child.name}({bases})" if bases else f"class {child.name}"
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            signature = f"{child.name}({ast.unparse(child.args)})"
        else:
            continue
        doc = ast.get_docstring(child)
        members = list(_entries(child, indent + "    ")) if isinstance(child, ast.ClassDef) else []
        if doc or members:
            yield indent + signature
            yield from (f"{indent}    {line}".rstrip() for line in (doc or "").splitlines())
            yield ""
            yield from members


def shakespeare(source: str | None) -> str:
    """Tiny Shakespeare, from a local copy or downloaded; its hash is checked either way.

    Raises:
        UserError: unavailable, or another text.
    """
    try:
        if source:
            data = Path(source).read_bytes()
        else:
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=60) as response:
                data = response.read()
    except OSError as error:
        raise UserError(
            f"cannot read Tiny Shakespeare from {source or SHAKESPEARE_URL} ({error}); "
            "give a local copy of the file with --source FILE"
        ) from error
    if sha256(data).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(
            f"{source or SHAKESPEARE_URL} is not Tiny Shakespeare: its sha256 is not {SHAKESPEARE_SHA256}; "
            "to prepare another text use the corpus `files`"
        )
    return data.decode()
