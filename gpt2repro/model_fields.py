"""The fields of the model's configuration, without importing it: that takes seconds, and a mistake in a flag is to be
found before."""

import ast
import functools
from importlib.util import find_spec
from pathlib import Path


MODEL_FILE, CONFIG = "modeling_gpt2repro", "GPT2ReproConfig"


@functools.cache
def model_fields() -> type:
    """A class that has the annotated fields of GPT2ReproConfig with their defaults, and nothing else of it. Values of
    the fields are checked by the real one."""
    spec = find_spec(MODEL_FILE)
    assert spec is not None and spec.origin is not None, f"{MODEL_FILE}.py is installed beside this package"
    module = ast.parse(Path(spec.origin).read_text())
    (config,) = (node for node in module.body if isinstance(node, ast.ClassDef) and node.name == CONFIG)
    config.bases = []
    config.body = [statement for statement in config.body if isinstance(statement, ast.AnnAssign)]
    namespace: dict[str, type] = {}
    exec(compile(ast.Module([config], []), spec.origin, "exec"), namespace)
    return namespace[CONFIG]
