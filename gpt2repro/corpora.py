"""Corpora: where documents come from. A corpus is an iterator of texts and the facts that its manifest records."""

import ast
import difflib
import glob
import gzip
import sys
import sysconfig
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from gpt2repro.errors import UserError, first_line


SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

HUB_CORPORA = {  # name -> Hub id, configuration
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT"),
    "openwebtext": ("Skylion007/openwebtext", None),
}
LOCAL_CORPORA = ("python-docs", "shakespeare", "shakespeare-char", "files")
TEXT_SUFFIXES = {".txt"}
TABLE_SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # suffix -> builder of datasets


@dataclass(frozen=True)
class Corpus:
    """Documents and what is known of them.

    documents: starts a fresh pass over the texts, always in the same order.
    facts: what the manifest records of the origin (Hub id, configuration, commit; or files and their sizes).
    single_text: the corpus is one long text, which is split for validation by position, not by document.
    default_split: val_tokens or val_fraction where the user asks for neither, as the best-known recipe on it has it.
    default_tokenizer: as build_tokenizer names it.
    """

    documents: Callable[[], Iterator[str]]
    facts: dict
    single_text: bool = False
    default_split: dict = field(default_factory=lambda: {"val_fraction": 0.005})
    default_tokenizer: str = "gpt2"


def open_corpus(
    name: str,
    source: str | None = None,
    text_column: str = "text",
    hub_config: str | None = None,
    split: str = "train",
    revision: str | None = None,
) -> Corpus:
    """The corpus of that name; nothing large is read yet.

    Args:
        name: one of LOCAL_CORPORA or HUB_CORPORA, or a dataset's Hub id (or local folder in the Hub's format).
        source: for `files`, a file or folder; for shakespeare, a local copy of the text.
        text_column: the column of documents in tables.
        hub_config, split, revision: which part of a Hub dataset.
    Raises:
        UserError: unknown name, missing source, unreadable or unreachable data.
    """
    if name == "python-docs":
        return Corpus(python_docs, {"python": sys.version.split()[0]}, False, {"val_fraction": 0.1}, "bpe:2048")
    if name in ("shakespeare", "shakespeare-char"):
        text = _shakespeare(source)
        tokenizer = "char" if name == "shakespeare-char" else "gpt2"
        facts = {"url": SHAKESPEARE_URL, "sha256": SHAKESPEARE_SHA256}
        return Corpus(lambda: iter([text]), facts, True, {"val_fraction": 0.1}, tokenizer)
    if name == "files":
        return _files(source, text_column)
    if name in HUB_CORPORA:
        hub_id, default_config = HUB_CORPORA[name]
        corpus_split = {"val_fraction": 0.0005} if name == "openwebtext" else {"val_tokens": 100_000_000}
        return _hub(hub_id, hub_config or default_config, split, revision, text_column, corpus_split)
    if "/" in name or Path(name).is_dir():
        return _hub(name, hub_config, split, revision, text_column, {"val_fraction": 0.005})
    known = [*LOCAL_CORPORA, *HUB_CORPORA]
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = (
        f"did you mean {nearest[0]}?" if nearest else f"use one of {', '.join(known)}, or a Hub id such as owner/name"
    )
    raise UserError(f"unknown corpus {name!r}; {hint}")


# ---- the text that every CPython carries ----


def python_docs() -> Iterator[str]:
    """The language reference (pydoc_data.topics), then the documentation strings of each standard library module, laid
    out as pydoc does. The order is fixed: topics by name, then modules by path."""
    from pydoc_data.topics import topics  # half a megabyte that only this corpus needs

    for name in sorted(topics):
        yield topics[name].strip() + "\n"
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()):
        parts = path.relative_to(library).with_suffix("").parts
        if skipped.isdisjoint(parts) and (text := _module_docs(".".join(parts).removesuffix(".__init__"), path)):
            yield text


def _module_docs(name: str, path: Path) -> str | None:
    """The documented classes and functions of a module, or None where nothing is documented."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # some files of the library are broken on purpose
        return None
    lines = [f"Module {name}", ""]
    if doc := ast.get_docstring(tree):
        lines += [doc, ""]
    entries = list(_entries(tree, indent=""))
    return "\n".join(lines + entries).rstrip() + "\n" if doc or entries else None


def _entries(node: ast.AST, indent: str) -> Iterator[str]:
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


# ---- Tiny Shakespeare ----


def _shakespeare(source: str | None) -> str:
    """Tiny Shakespeare's text, from a local copy or by download; its hash is checked either way."""
    try:
        if source is not None:
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


# ---- local files and the Hub ----


def _files(source: str | None, text_column: str) -> Corpus:
    if source is None:
        raise UserError("the corpus `files` needs --source FILE_OR_FOLDER")
    root = Path(source)
    if not root.exists():
        raise UserError(f"--source {source} does not exist")
    candidates = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]
    files = [path for path in candidates if _suffix(path) in TEXT_SUFFIXES | TABLE_SUFFIXES.keys()]
    if not files:
        raise UserError(
            f"--source {source} holds no file that ends in .txt, .jsonl, .json or .parquet (or those + .gz)"
        )

    def documents() -> Iterator[str]:
        for path in files:
            yield from _file_documents(path, text_column)

    facts = {"files": [{"name": path.name, "bytes": path.stat().st_size} for path in files]}
    single_text = len(files) == 1 and _suffix(files[0]) in TEXT_SUFFIXES
    return Corpus(documents, facts, single_text, {"val_fraction": 0.1 if single_text else 0.005})


def _suffix(path: Path) -> str:
    """The suffix that tells the format: `a.json.gz` is `.json`."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _file_documents(path: Path, text_column: str) -> Iterator[str]:
    import datasets

    if _suffix(path) in TEXT_SUFFIXES:
        yield _reading(str(path), _read_text, path)
        return
    if not path.stat().st_size:  # no rows; datasets takes it for a broken file
        return
    builder, pattern = TABLE_SUFFIXES[_suffix(path)], glob.escape(str(path))
    rows = _reading(str(path), datasets.load_dataset, builder, data_files=pattern, split="train", streaming=True)
    yield from _texts(rows, str(path), text_column)


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix.lower() == ".gz" else data).decode()


def _hub(hub_id, config, split, revision, text_column, default_split) -> Corpus:
    import datasets
    from huggingface_hub import HfApi

    if not Path(hub_id).is_dir():  # pin the commit, so that the manifest says exactly what was read
        revision = _reading(hub_id, HfApi().dataset_info, hub_id, revision=revision).sha
    rows = _reading(hub_id, datasets.load_dataset, hub_id, config, split=split, revision=revision, streaming=True)
    facts = {"hub_id": hub_id, "config": config, "split": split, "revision": revision, "text_column": text_column}
    return Corpus(lambda: _texts(rows, hub_id, text_column), facts, False, default_split)


def _reading(origin: str, function: Callable, *args, **kwargs):
    """Call a reader of somebody else's data; whatever it raises becomes one line that names the origin."""
    try:
        return function(*args, **kwargs)
    except Exception as error:  # network, Hub, format and configuration errors share no base class
        reason = first_line(error)
        raise UserError(
            f"cannot read {origin}: {reason}; check the name, --hub_config, --split, --revision and the network "
            "(a folder that holds a copy of the data does as well)"
        ) from error


def _texts(rows, origin: str, text_column: str) -> Iterator[str]:
    iterator = iter(rows)
    while (row := _reading(origin, next, iterator, None)) is not None:
        if text_column not in row:
            raise UserError(f"{origin} has no column {text_column!r} but {', '.join(row)}; choose with --text_column")
        if not isinstance(row[text_column], str):
            raise UserError(f"{origin}: column {text_column!r} holds {type(row[text_column]).__name__}, not text")
        yield row[text_column]
