"""What a command says at once: its help and mistakes in its flags come before what takes seconds to import."""

import inspect
import subprocess
import sys

import pytest
from support import PATIENCE, ROOT

from gpt2repro.model_fields import model_fields
from modeling_gpt2repro import GPT2ReproConfig


TAKES_SECONDS = {"torch", "transformers", "accelerate", "datasets", "matplotlib", "evaluate"}
DOORS = {
    "train_accelerate.py": ["--max_step", "3", "--optimizer", "adam"],
    "prepare_data.py": ["python-docs"],
    "eval_hellaswag.py": ["./no-run", "--limit", "0"],
    "scorecard.py": ["--limit", "0"],
    "sample.py": ["./no-run", "--num_samples", "0"],
    "publish.py": ["./no-run"],
    "gpt2repro.plot": ["./no-run", "--theme", "gray"],
    "gpt2repro.report": ["no/such/run"],
    "gpt2repro.planner": ["./no-recipe.yaml"],
}


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("asks_for_help", [True, False])
def test_help_and_mistakes_come_before_what_takes_seconds(door, asks_for_help):
    script = [door] if door.endswith(".py") else ["-m", door]
    flags = ["--help"] if asks_for_help else DOORS[door]
    command = [sys.executable, "-X", "importtime", *script, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    lines = done.stderr.splitlines()
    imported = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    assert "gpt2repro.errors" in imported and not imported & TAKES_SECONDS
    mistakes = [line for line in lines if not line.startswith("import time:")]
    if asks_for_help:
        assert done.returncode == 0 and mistakes == [] and "usage:" in done.stdout
    else:
        assert done.returncode == 2 and mistakes and all(line.startswith("error: ") for line in mistakes)


def test_every_script_is_a_door():
    files = [*ROOT.glob("*.py"), *(ROOT / "gpt2repro").glob("*.py")]
    run = [file for file in files if "    run_script(main" in file.read_text()]
    assert {file.name if file.parent == ROOT else f"gpt2repro.{file.stem}" for file in run} == DOORS.keys()


def test_the_fields_read_from_the_source_are_those_of_the_class():
    fields = model_fields()
    assert fields.__annotations__ == inspect.get_annotations(GPT2ReproConfig)
    for name in fields.__annotations__:
        assert getattr(fields, name) == getattr(GPT2ReproConfig, name)
