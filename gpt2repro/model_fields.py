"""The fields of the model's configuration, and the constants of its file, without importing it: that takes seconds, and
a mistake in a flag is to be found before."""

import ast
import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any


MODEL_FILE, CONFIG = "modeling_gpt2repro", "GPT2ReproConfig"


@functools.cache
def model_fields() -> type:
    """A class that has the annotated fields of GPT2ReproConfig with their defaults, and nothing else of it. Values of
    the fields are checked by the real one."""
    (config,) = (node for node in _model_file().body if isinstance(node, ast.ClassDef) and node.name == CONFIG)
    config.bases = []
    config.body = [statement for statement in config.body if isinstance(statement, ast.AnnAssign)]
    namespace: dict[str, type] = {}
    exec(compile(ast.Module([config], []), MODEL_FILE, "exec"), namespace)
    return namespace[CONFIG]


def model_defaults() -> dict[str, Any]:
    """The fields of GPT2ReproConfig with their defaults."""
    fields = model_fields()
    return {name: getattr(fields, name) for name in fields.__annotations__}


@functools.cache
def model_constant(name: str) -> int:
    """A number that the model's file defines at its top, e.g. MAX_CHUNKS."""
    assignments = [node for node in _model_file().body if isinstance(node, ast.Assign)]
    (value,) = (node.value for node in assignments if ast.unparse(node.targets[0]) == name)
    return eval(compile(ast.Expression(value), MODEL_FILE, "eval"), {})


@functools.cache
def _model_file() -> ast.Module:
    spec = find_spec(MODEL_FILE)
    assert spec is not None and spec.origin is not None, f"{MODEL_FILE}.py is installed beside this package"
    return ast.parse(Path(spec.origin).read_text())
