"""Each notebook runs from its first cell to its last in a fresh kernel, and keeps what such a run has written."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from support import PATIENCE, ROOT


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_BYTES = 500_000
HOW = "run `PYTHONWARNINGS=ignore jupyter execute --inplace NOTEBOOK`, after `make demo`"


@pytest.fixture(scope="module")
def small_run(data_dir, run_script, tmp_path_factory) -> Path:
    """What `make demo` leaves, smaller: 40 steps with two validations."""
    run = tmp_path_factory.mktemp("runs") / "small"
    every = "--log_every 2 --validate_every 20 --validation_tokens 2048 --sample_every 20"
    batch = "--micro_batch_size 4 --global_batch_tokens 512 --max_steps 40 --warmup_steps 5"
    finished = run_script(
        *("train_accelerate.py", "--config", ROOT / "recipes" / "demo.yaml", "--data_dir", data_dir),
        *("--output_dir", run, *every.split(), *batch.split(), "--model.n_layer", 2, "--model.n_embd", 64),
        ACCELERATE_USE_CPU="true",
    )
    assert finished.returncode == 0, finished.stderr
    return run


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_a_fresh_state(path, small_run, monkeypatch):
    monkeypatch.setenv("RUN", str(small_run))  # of explore_gpt2 and training_report
    monkeypatch.setenv("STEPS", "40")  # of scaling_laws
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(notebook, timeout=PATIENCE, resources={"metadata": {"path": str(path.parent)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_its_outputs_and_nothing_of_the_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), HOW
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs and not any(output.output_type == "error" for output in outputs)
    printed = "".join(output.get("text", "") + str(output.get("data", {}).get("text/plain", "")) for output in outputs)
    assert not re.findall(r"\S*site-packages\S*|/home/\S*|/Users/\S*", printed), HOW
    assert path.stat().st_size < MOST_BYTES
