"""Tokenization on Ray and under a real Slurm: the bytes of one process, wherever it is interrupted; failures."""

import importlib.util
import os
import subprocess
from functools import partial

import preparer_faults as faults
import pytest
from preparer import Preparer
from slurm_cluster import slurm_cluster
from support import contents, prepare, refusal, write_jsonl

from gpt2repro.errors import UserError
from gpt2repro.prepare import executors
from gpt2repro.prepare.executors import SLURM_JOBS, check_executor, wait_for_jobs
from gpt2repro.prepare.request import Execution


SMALL_PARTS = partial(faults.small_parts, 10_000)
SMALL = ["--tokenizer", "gpt2", "--val_fraction", 0.5]
RAY = ["--executor", "ray", "--num_workers", 2]
SLURM = ["--executor", "slurm", "--slurm_partition", "cpu", "--slurm_time", 10, "--num_workers", 2]
installed = {name: importlib.util.find_spec(name) is not None for name in ("ray", "datatrove", "orjson")}
needs_ray = pytest.mark.skipif(not installed["ray"], reason='needs pip install "gpt2repro[cluster]"')
needs_datatrove = pytest.mark.skipif(
    not (installed["datatrove"] and installed["orjson"]), reason='needs pip install "gpt2repro[cluster]"'
)


@pytest.fixture(scope="module")
def source(texts, tmp_path_factory):
    """A folder of real documents; it makes half a dozen parts."""
    folder = tmp_path_factory.mktemp("source")
    write_jsonl(folder / "a.jsonl", texts[:120])
    write_jsonl(folder / "b.jsonl", texts[120:])
    return folder


@pytest.fixture(scope="module")
def command(source, tmp_path_factory):
    """With --val_tokens the parts of a first round are made under guesses, of which one is wrong."""
    folder = tmp_path_factory.mktemp("bpe")
    prepare("files", "--source", source, "--output_dir", folder, "--tokenizer", "bpe:400", "--val_fraction", 0.1)
    return ["files", "--source", source, "--tokenizer", folder / "tokenizer", "--val_tokens", 6_000]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


@pytest.fixture(scope="module")
def preparer(tmp_path_factory):
    with Preparer(tmp_path_factory.mktemp("printed")) as preparer:
        yield preparer


@pytest.fixture(scope="module")
def slurm_preparer(cluster, tmp_path_factory):
    with Preparer(tmp_path_factory.mktemp("printed"), cluster) as preparer:
        yield preparer


@pytest.fixture(scope="module")
def on_one_process(preparer, command, tmp_path_factory):
    directory = tmp_path_factory.mktemp("one")
    run = preparer.run(*command, "--output_dir", directory, before=[SMALL_PARTS])
    assert run.status == 0, run.lines
    return contents(directory)


def first_part(directory):
    return next((directory / "parts").glob("part_*.json"), None)


@needs_ray
@pytest.mark.slow
def test_ray_makes_the_same_bytes_although_it_is_killed(preparer, command, on_one_process, tmp_path):
    flags = [*command, *RAY, "--output_dir", tmp_path / "out"]
    killed = preparer.start(*flags, before=[SMALL_PARTS])
    killed.wait_until(lambda: first_part(tmp_path / "out"))
    killed.kill()
    killed.wait()
    assert first_part(tmp_path / "out")  # not finished
    resumed = preparer.run(*flags, before=[SMALL_PARTS])
    assert resumed.status == 0, resumed.lines
    assert contents(tmp_path / "out") == on_one_process


@needs_ray
@pytest.mark.slow
def test_what_fails_on_ray_is_told_in_one_line(preparer, source, tmp_path):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", ["a document"])
    (tmp_path / "in" / "b.jsonl").write_text("no json\n" * 50)
    flags = ["files", "--source", tmp_path / "in", "--output_dir", tmp_path / "out", *SMALL, *RAY]
    run = preparer.run(*flags, before=[faults.one_part_per_file])
    assert run.status == 2
    (line,) = run.messages
    assert line.startswith(f"error: {tmp_path}/in/b.jsonl: 50 lines are not JSON") and "fix the file" in line


@needs_datatrove
@pytest.mark.slow
def test_slurm_makes_the_same_bytes_although_the_command_is_killed(slurm_preparer, command, on_one_process, tmp_path):
    before = [SMALL_PARTS, faults.frequent_looks_at_the_queue]
    flags = [*command, *SLURM, "--output_dir", tmp_path / "out"]
    killed = slurm_preparer.start(*flags, before=before)
    killed.wait_until(lambda: (tmp_path / "out" / "parts" / "logs" / SLURM_JOBS).exists())
    killed.kill()
    killed.wait()
    # The jobs go on, so that what they make is fixed, whether or not they have made it.
    assert "prepared with other settings (shard_tokens)" in refusal(*flags, "--shard_tokens", 5000)
    resumed = slurm_preparer.run(*flags, before=before)
    assert resumed.status == 0, resumed.lines
    assert contents(tmp_path / "out") == on_one_process
    assert sum("waiting for the Slurm jobs tokenization_" in line for line in resumed.lines) == 2  # rounds


@needs_datatrove
@pytest.mark.slow
def test_a_limit_on_slurm_falls_on_the_same_document(slurm_preparer, command, tmp_path):
    limited = [*command, "--max_tokens", 12_000, "--output_dir"]
    before = [SMALL_PARTS, faults.frequent_looks_at_the_queue]
    assert slurm_preparer.run(*limited, tmp_path / "one", before=before).status == 0
    assert slurm_preparer.run(*limited, tmp_path / "slurm", *SLURM, before=before).status == 0
    assert contents(tmp_path / "slurm") == contents(tmp_path / "one")


@needs_datatrove
@pytest.mark.slow
def test_what_fails_under_slurm_is_told_in_one_line(slurm_preparer, cluster, tmp_path):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", ["a document"])
    (tmp_path / "in" / "b.jsonl").write_text("no json\n" * 50)
    out = tmp_path / "out"
    flags = ["files", "--source", tmp_path / "in", "--output_dir", out, *SMALL, *SLURM]
    before = [faults.one_part_per_file, faults.frequent_looks_at_the_queue]

    def slurm(*command):
        return subprocess.run(command, env=os.environ | cluster, check=True, capture_output=True, text=True).stdout

    refused = slurm_preparer.run(*flags, "--slurm_partition", "gpu", before=before)
    assert refused.status == 2
    assert "error: Slurm refused a job (sbatch: error: " in refused.lines[-1] and "partition" in refused.lines[-1]

    cancelled = slurm_preparer.start(*flags, before=before)
    cancelled.wait_until(lambda: "tokenization" in slurm("squeue", "--noheader", "--format=%j"))
    slurm("scancel", "--name", (out / "parts" / "logs" / SLURM_JOBS).read_text())
    assert cancelled.wait() == 2
    assert "of 2 Slurm tasks failed: a job was cancelled, killed or out of time or memory; see" in cancelled.lines[-1]

    broken = slurm_preparer.run(*flags, before=before)
    assert broken.status == 2
    assert f"tasks failed: {tmp_path}/in/b.jsonl: 50 lines are not JSON" in broken.lines[-1]
    assert broken.lines[-1].endswith("finished parts are kept: repeat the command")


def test_jobs_are_not_forgotten_where_slurm_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / SLURM_JOBS).write_text("tokenization_1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=f"Slurm jobs may be working here; .* or delete {tmp_path}/{SLURM_JOBS}"):
        wait_for_jobs(tmp_path)


def test_what_an_executor_lacks_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(executors.importlib.util, "find_spec", lambda name: None)
    install = 'pip install "gpt2repro[cluster]"'
    assert refusal("python-docs", "--output_dir", tmp_path / "out", *SLURM[:2], "--shard_tokens", 0).splitlines() == [
        "--shard_tokens 0 must be at least 1",
        f"--executor slurm needs datatrove and orjson; {install}",
        "--executor slurm needs --slurm_partition NAME; `sinfo` lists them",
        "--executor slurm: sbatch and squeue not found; start it where Slurm's commands are installed",
    ]
    with pytest.raises(UserError, match="--executor ray needs ray; pip install"):
        check_executor(Execution(executor="ray"))
    check_executor(Execution())
