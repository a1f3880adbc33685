"""The files of a checkpoint: what state they hold, and whether they are intact. No weights are read, so torch is not
imported."""

import json
from pathlib import Path
from typing import Any

from gpt2repro.errors import first_line
from gpt2repro.files import file_problem
from gpt2repro.models.find import ADAPTER_WEIGHTS, is_adapter


MODEL, OPTIMIZER, STATE, HASHES = "model.safetensors", "optimizer.safetensors", "trainer_state.json", "hashes.json"
MIN_FILES = 4  # state, configuration, weights, optimizer


def weights_file(checkpoint: Path) -> Path:
    """The file of the weights that are trained: with lora_rank, the adapter's."""
    return checkpoint / (ADAPTER_WEIGHTS if is_adapter(checkpoint) else MODEL)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The content of trainer_state.json: RunState.state_dict()."""
    return json.loads((checkpoint / STATE).read_text())


def read_intact_state(checkpoint: Path) -> dict[str, Any] | None:
    """The same, verified: with a byte flipped it may still be JSON. None: it is damaged or missing."""
    return None if find_damage(checkpoint, only=STATE) else read_state(checkpoint)


def find_damage(checkpoint: Path, only: str | None = None) -> str | None:
    """What is missing or altered in a checkpoint, or in its file `only`; None if it is intact."""
    try:
        hashes = json.loads((checkpoint / HASHES).read_text())
    except (OSError, ValueError, RecursionError) as error:
        return f"{HASHES} cannot be read: {first_line(error)}"
    listed = hashes.keys() if isinstance(hashes, dict) else set()
    if not {STATE, "config.json"} <= listed or len(listed) < MIN_FILES:
        return f"{HASHES} is damaged: it does not list the checkpoint's files"
    expected = hashes if only is None else {only: hashes.get(only)}
    for name, sha256 in expected.items():
        problem = file_problem(checkpoint / name, sha256, f"the one in {HASHES}")
        if problem:
            return problem
    return None
