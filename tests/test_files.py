"""Files and folders that are complete or absent, whatever interrupts their writing."""

import hashlib
import json
import os

import numpy as np
import pytest
from filelock import FileLock, SoftFileLock
from support import DAMAGED_JSON

from gpt2repro import files
from gpt2repro.errors import UserError
from gpt2repro.files import (
    acquire_lock,
    delete_folder,
    delete_unfinished,
    file_sample,
    new_folder,
    scratch_folder,
    write_json,
    write_text,
)
from gpt2repro.run_folder import RunFolder, checkpoint_step
from gpt2repro.train.checkpoint_files import find_damage


class Crash(BaseException):
    """The end of the process: nothing that comes after it runs."""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write_version(folder, version):
    with new_folder(folder) as unfinished:
        (unfinished / "deep").mkdir()
        (unfinished / "deep" / "file").write_text(version)


def read_version(folder):
    return (folder / "deep" / "file").read_text()


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    write_text(path, "ünï")
    assert path.read_bytes() == "ünï".encode() and names(tmp_path) == ["file.json"]


def test_what_has_its_name_was_flushed_before(tmp_path, monkeypatch):
    """The order of system calls: every file, then its folder, then the rename, then the parent's names."""
    calls = []
    flush, rename = files.flush, os.rename
    monkeypatch.setattr(files, "flush", lambda path: (calls.append(f"flush {path.name}"), flush(path)))
    monkeypatch.setattr(os, "rename", lambda a, b, **k: (calls.append(f"rename {b.name}"), rename(a, b, **k)))
    write_version(tmp_path / "model", "1")
    assert calls == ["flush deep", "flush file", "flush writing_model", "rename model", f"flush {tmp_path.name}"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    write_version(tmp_path / "model", "old")
    with pytest.raises(OSError, match="full"), new_folder(tmp_path / "model") as unfinished:
        (unfinished / "half").write_text("")
        raise OSError("full")
    assert names(tmp_path) == ["model"] and read_version(tmp_path / "model") == "old"
    write_version(tmp_path / "model", "new")
    assert names(tmp_path) == ["model"] and read_version(tmp_path / "model") == "new"


@pytest.mark.parametrize("recover", [delete_unfinished, lambda parent: write_version(parent / "model", "newer")])
@pytest.mark.parametrize("crash_at", [1, 2, 3])
def test_a_replacement_that_is_cut_off_loses_no_folder(tmp_path, monkeypatch, crash_at, recover):
    """Crashes before the first rename, between the two, and before the old folder is deleted."""
    write_version(tmp_path / "model", "old")
    calls = iter(range(1, 99))
    with monkeypatch.context() as patch:
        rename, delete = os.rename, files.delete

        def counted(function):
            def call(*args, **kwargs):
                if next(calls) == crash_at:
                    raise Crash
                return function(*args, **kwargs)

            return call

        def delete_replaced(folder):
            (counted(delete) if folder.exists() and folder.name.startswith("replaced_") else delete)(folder)

        patch.setattr(os, "rename", counted(rename))
        patch.setattr(files, "delete", delete_replaced)
        with pytest.raises(Crash):
            write_version(tmp_path / "model", "new")
    recover(tmp_path)
    assert names(tmp_path) == ["model"]
    assert read_version(tmp_path / "model") in (("newer",) if recover is not delete_unfinished else ("old", "new"))


def test_scratch_folders_of_killed_processes_are_deleted_and_nothing_else(tmp_path):
    killed = "unfinished_gpt2repro_x"
    for name in ("unfinished_essay/a", f"{killed}/.lock", f"{killed}/model/weights", "out/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("")
    (tmp_path / "unfinished_gpt2repro_y").mkdir()  # killed before it had its lock
    with scratch_folder(tmp_path) as first, scratch_folder(tmp_path) as second:
        (first / "a").write_text("")
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"unfinished_essay", "out", first.name, second.name} and first != second
    assert {path.name for path in tmp_path.iterdir()} == {"unfinished_essay", "out"}


def test_a_folder_is_deleted_under_another_name(tmp_path, monkeypatch):
    write_version(tmp_path / "step_00000001", "1")
    monkeypatch.setattr(files, "delete", lambda folder: None)  # the process ends before
    delete_folder(tmp_path / "step_00000001")
    assert names(tmp_path) == ["removing_step_00000001"]
    monkeypatch.undo()
    delete_unfinished(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("size", [1, 4096, 100_000, 3_000_000])
def test_a_sample_is_of_blocks_spread_evenly_over_the_file(tmp_path, size):
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    sample = file_sample(path)
    for place in np.linspace(0, size - 1, 16, dtype=int).tolist():
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
            file.flush()
            assert file_sample(path) != sample, place
            file.seek(place)
            file.write(b"\0")
        assert file_sample(path) == sample


def test_a_sample_of_an_empty_file(tmp_path):
    (tmp_path / "file").touch()
    assert file_sample(tmp_path / "file") == hashlib.sha256().hexdigest()


def test_a_lock_that_another_holds_is_one_line(tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(UserError, match="^busy$"):
        acquire_lock(tmp_path / ".lock", "busy")
    acquire_lock(tmp_path / ".lock", "busy").release()


# ---- the layout of a run ----


def test_only_checkpoints_count_as_checkpoints(tmp_path):
    run = RunFolder(tmp_path)
    assert run.complete_checkpoints() == [] and run.latest_checkpoint() is None
    for name in ("step_00000020", "step_00000003", "step_best", "step_00000020.bak", "writing_step_00000040"):
        (run.checkpoints / name).mkdir(parents=True)
    (run.checkpoints / "step_00000030").touch()
    (run.checkpoints / "step_00000031").symlink_to("nowhere")
    assert [checkpoint_step(path) for path in run.complete_checkpoints()] == [3, 20]
    assert run.latest_checkpoint() == run.checkpoint(20)


def test_a_model_and_a_checkpoint_know_their_run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.checkpoint(5).mkdir(parents=True)
    run.model.mkdir()
    assert RunFolder.around(run.model) is None  # there is no record
    run.recipe.write_text("")
    run.metrics.write_text("")
    for folder in (run.model, run.checkpoint(5)):
        assert RunFolder.around(folder).path == run.path
    assert RunFolder.around(run.path) is None and RunFolder.around(tmp_path) is None


def test_an_interrupted_start_leaves_the_directory_untouched(tmp_path):
    run = RunFolder(tmp_path / "run")
    assert run.is_untouched()
    run.lock()
    (run.path / "recipe.yaml.tmp").write_text("seed")
    assert run.is_untouched()
    run.unlock()
    run.write_record({"seed": 1, "data": {}})
    run.write_verified({})
    assert run.is_untouched() and run.read_record() == {"seed": 1, "data": {}}
    run.metrics.write_text("")
    assert not run.is_untouched()


@pytest.mark.parametrize("kind", [FileLock, SoftFileLock])
def test_a_lock_that_a_killed_process_can_leave_behind_says_how_to_remove_it(tmp_path, monkeypatch, kind):
    """SoftFileLock is what filelock uses where the file system has no flock."""
    monkeypatch.setattr(files, "FileLock", kind)
    path = tmp_path / ".lock"
    with kind(path):
        owner = path.read_text().split()  # older releases of filelock do not say
        with pytest.raises(UserError) as error:
            acquire_lock(path, "busy")
    remedy = f"; if process {os.getpid()} on {owner[1]} has ended, delete {path}" if owner else ""
    assert str(error.value) == f"busy{remedy}"
    assert kind is SoftFileLock or not owner


@pytest.mark.parametrize("content", DAMAGED_JSON.values(), ids=DAMAGED_JSON)
def test_damaged_records_of_a_run(tmp_path, content):
    run = RunFolder(tmp_path)
    for path in (run.recipe, run.verified):
        path.write_bytes(content)
    assert run.read_verified() == {}  # everything is verified again
    with pytest.raises(UserError, match="recipe.yaml is damaged .*; restore it, or choose another --output_dir"):
        run.read_record()


@pytest.mark.parametrize("content", [*DAMAGED_JSON.values(), b"[]", b"{}", b'{"config.json": "0"}'])
def test_damaged_hashes_of_a_checkpoint(tmp_path, content):
    (tmp_path / "hashes.json").write_bytes(content)
    assert find_damage(tmp_path).startswith("hashes.json ")


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl", "loss.png", "report.html", ".lock", ".verified.json"])
def test_a_folder_where_a_file_of_the_run_belongs(tmp_path, name):
    run = RunFolder(tmp_path)
    assert run.layout_problem() is None
    (tmp_path / name).mkdir()
    assert run.layout_problem() == f"{tmp_path / name} is a folder"
    (tmp_path / name).rmdir()
    os.mkfifo(tmp_path / name)  # its reader would wait for ever
    assert run.layout_problem() == f"{tmp_path / name} is a pipe or device"


def test_a_file_where_the_checkpoints_belong(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    assert RunFolder(tmp_path).layout_problem() == f"{tmp_path / 'checkpoints'} is a file"
