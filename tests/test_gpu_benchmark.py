"""benchmarks/gpu.py: that it runs, here at tiny sizes on the CPU, and what becomes of parts that do not."""

import argparse
import json
import re
import subprocess
import sys

import pytest
from support import PATIENCE, ROOT

from gpt2repro.errors import UserError


@pytest.fixture
def gpu(monkeypatch):
    """The benchmark as a module."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import gpu

    return gpu


@pytest.fixture
def run(gpu, tmp_path, monkeypatch):
    """Runs a part that consists of a given Python program."""
    monkeypatch.setattr(gpu, "CHECKOUT", tmp_path)

    def run(program: str, limit: float = PATIENCE):
        (tmp_path / "part.py").write_text(program)
        monkeypatch.setitem(gpu.PARTS, "step", gpu.Part("Part", 1, ["part.py"], ["part.py"]))
        args = argparse.Namespace(tiny=True, hellaswag_data=None)
        return gpu.run_part("step", gpu.PARTS["step"], args, limit)

    return run


@pytest.mark.slow
def test_it_runs_at_tiny_sizes_on_the_cpu(tmp_path):
    prefix = tmp_path / "page"
    command = ["benchmarks/gpu.py", "--tiny", "--parts", "chunks", "memory", "hellaswag", "--output", str(prefix)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, timeout=PATIENCE, stdout=subprocess.DEVNULL)
    parts = json.loads(prefix.with_suffix(".json").read_text())["parts"]
    assert [part["state"] for part in parts] == ["done", "done", "skipped"]
    page = prefix.with_suffix(".md").read_text()
    assert "| trainer | " in page and "| 32 | " in page
    planned, measured = re.search(r"\| 2 x 256, 4,096, 64 x 64, float32 \| (\d+) \| (\d+) \|", page).groups()
    assert int(planned) == pytest.approx(int(measured), rel=0.15)


@pytest.mark.slow
def test_a_part_that_fails_or_takes_too_long_is_a_row(gpu, run):
    failed = run("print('half a table'); raise SystemExit(3)")
    assert (failed.state, failed.output) == ("failed", "half a table\n")
    late = run("import time; print('| so far |', flush=True); time.sleep(600)", limit=1.0)
    assert (late.state, late.output) == ("timed out", "| so far |\n")
    machine = {"device": "GPU", "date": "today", "versions": {}}
    page = gpu.page(machine, [failed, late])
    assert "| Part | failed | 0 |" in page and "```\nhalf a table\n```" in page
    assert "| Part | timed out | 1 |" in page


def test_a_part_without_its_script_or_time_is_skipped(gpu, tmp_path, monkeypatch):
    args = argparse.Namespace(tiny=False, hellaswag_data=None)
    absent = gpu.Part("Part", 1, ["absent.py"], None)
    assert gpu.run_part("step", absent, args, 60).output == "there is no absent.py in this checkout"
    assert gpu.run_part("step", gpu.PARTS["step"], args, -1).state == "cut"


def test_the_page_keeps_tables_and_what_introduces_them(gpu):
    lines = ["Loading: 100%", "a warning", "MFU against 989", "", "| a |", "| --- |", "| 1 |", "bye", "3 passed in 2s"]
    assert gpu.page_lines(lines) == ["MFU against 989", "", "| a |", "| --- |", "| 1 |", "3 passed in 2s"]


def test_mistakes_are_one_line_each(gpu, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        gpu.main(["--tiny", "--output", str(tmp_path / "file" / "page"), "--hellaswag_data", str(tmp_path)])
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"--output {tmp_path}/file/page: ")
    assert second == f"--hellaswag_data {tmp_path} is not a file; give hellaswag_val.jsonl"
