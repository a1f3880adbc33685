"""python -m gpt2repro.plot: the pictures of runs, and the verdict on each."""

import subprocess
import sys

import pytest
from logged_runs import SHAKESPEARE, record_of, rows_like, write_run
from support import PATIENCE, ROOT

from gpt2repro import plot
from gpt2repro.errors import UserError
from gpt2repro.evaluation.reference_curves import load_curve


PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def run(tmp_path):
    """A run that follows the reference of its recipe."""
    rows = rows_like(load_curve("shakespeare-char-cpu"), tokens_per_step=768)
    return write_run(tmp_path / "a" / "run", record_of("shakespeare-char-cpu", SHAKESPEARE), rows)


def refusal(*args: object) -> list[str]:
    with pytest.raises(UserError) as caught:
        plot.main([str(arg) for arg in args])
    return str(caught.value).splitlines()


def test_a_runs_pictures_are_written_into_its_folder_with_the_verdict(run, capsys):
    plot.main([str(run), "--theme", "dark"])
    printed = capsys.readouterr().out
    assert printed.startswith("run: on track: validation loss ")
    for name in ("loss.png", "training.png"):
        assert (run / name).read_bytes().startswith(PNG) and str(run / name) in printed


def test_several_runs_are_drawn_into_a_folder_and_told_apart(run, tmp_path, capsys):
    rows = rows_like(load_curve("shakespeare-char-cpu"), above=0.3, tokens_per_step=768)
    mine = record_of("shakespeare-char-cpu", SHAKESPEARE, reference_curve=None)
    other = write_run(tmp_path / "b" / "run", mine, rows)
    plot.main([str(run), str(other), "--output_dir", str(tmp_path / "pictures")])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("a/run: on track: ")
    assert printed[1] == "b/run: no verdict: its recipe names no reference_curve"
    assert (tmp_path / "pictures" / "loss.png").read_bytes().startswith(PNG)

    plot.main([str(other), "--reference_curve", "shakespeare-char-cpu"])
    assert capsys.readouterr().out.startswith("run: off: validation loss ")


def test_a_run_without_a_validation_is_drawn_without_a_verdict(tmp_path, capsys):
    row = {"step": 1, "tokens": 768, "loss": 4.2}
    run = write_run(tmp_path / "run", record_of("shakespeare-char-cpu", SHAKESPEARE), [row])
    plot.main([str(run)])
    assert capsys.readouterr().out.startswith("run: no verdict yet: the run has not been validated\n")


def test_all_mistakes_are_one_line_each_and_nothing_is_written(run, tmp_path):
    names = ("begun", "garbled", "damaged", "recipe")
    begun, garbled, damaged, recipe = (write_run(tmp_path / name, {"data": {}}, []) for name in names)
    (begun / "metrics.jsonl").unlink()
    (garbled / "metrics.jsonl").write_text("no metrics\n")
    (damaged / "recipe.yaml").write_text("{")
    (recipe / "recipe.yaml").write_text("max_steps: 3")
    (run / "model").mkdir()
    paths = [run / "model", tmp_path / "nowhere", begun, garbled, damaged, recipe]
    assert refusal(*paths, "--reference_curve", "shakespeare-char-cpv") == [
        f"{run}/model is no run, as it has no recipe.yaml; give {run}",
        f"{tmp_path}/nowhere is no run, as it has no recipe.yaml; give the output_dir of a run",
        f"{begun} has logged nothing yet, as it has no metrics.jsonl; wait for its first row",
        f"{garbled}/metrics.jsonl holds no row of a run's metrics; restore it, or give another run",
        f"{damaged}/recipe.yaml is damaged (while parsing a flow node); restore it, or choose another --output_dir",
        f"{recipe}/recipe.yaml is damaged (it holds no record of a run); restore it, or choose another --output_dir",
        "reference_curve=shakespeare-char-cpv does not exist; did you mean shakespeare-char-cpu?",
        "the pictures of 6 runs need a folder; add --output_dir FOLDER",
    ]
    assert refusal(run, "--output_dir", run / "recipe.yaml") == [
        f"--output_dir {run}/recipe.yaml: {run}/recipe.yaml is a file; choose another"
    ]
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.slow
def test_it_is_run_with_python_m(run):
    command = [sys.executable, "-m", "gpt2repro.plot", run, "--theme", "pink"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: argument --theme: invalid choice: 'pink'")
    assert "`python -m gpt2repro.plot --help`" in done.stderr
