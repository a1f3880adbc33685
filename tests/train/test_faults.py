"""What happens to a run when something goes wrong. Each fault is caused for real, in processes of its own: see
trainer_faults.py."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import trainer_faults as faults
from filelock import FileLock
from fork_server import ENVIRONMENT, ForkServer
from safetensors.torch import load_file
from support import PATIENCE, ROOT, metric_rows, prepare, wait_until, write_jsonl

from gpt2repro.data.manifest import shard_state
from gpt2repro.run_folder import RunFolder
from gpt2repro.train.metrics import without_clock
from gpt2repro.train.stopping import EXIT_CODE, FORWARDING_SECONDS


RECIPE = """
max_steps: 24
warmup_steps: 2
global_batch_tokens: 512
micro_batch_size: 4
sequence_length: 32
learning_rate: 3e-3
validate_every: 12
validation_tokens: 512
sample_every: 0
sample_tokens: 4
checkpoint_every: 4
num_workers: 1
model: {n_positions: 32, n_layer: 2, n_head: 2, n_embd: 32, resid_pdrop: 0.1}
"""
Faults = Sequence[Callable[[], object]]


@pytest.fixture(scope="module", autouse=True)
def server(trainer_server):
    Training.server = trainer_server


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, topics):
    root = tmp_path_factory.mktemp("topics")
    source = write_jsonl(root / "topics.jsonl", topics)
    prepare("files", "--source", source, "--tokenizer", "bpe:400", "--val_fraction", 0.1, "--output_dir", root / "data")
    return root / "data"


class Training:
    """A run of the recipe in `folder`, forked as one process per rank.

    Attributes:
        output_dir: of the run.
        pids: of its processes.
    """

    server: ForkServer

    def __init__(self, folder: Path, data_dir: Path, *flags, faults: Faults = (), processes: int = 1):
        self.output_dir, self.log = folder / "run", folder / "log"
        folder.mkdir(exist_ok=True)
        self.log.write_text("")
        (folder / "recipe.yaml").write_text(RECIPE)
        self.flags = ["--config", folder / "recipe.yaml", "--data_dir", data_dir, "--output_dir", self.output_dir]
        self.flags += flags
        self.start(faults, processes)

    def start(self, faults: Faults, processes: int) -> None:
        command = ["train_accelerate.py", *self.flags]
        self.pids = self.server.start_processes(processes, command, self.log, self.log, before=faults)

    def wait(self) -> int:
        """The exit code of all processes; those that do not end are killed."""
        try:
            codes = [self.server.wait(pid) for pid in self.pids]
        except AssertionError:
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            pytest.fail(f"the run did not end: {self.printed}")
        assert len(set(codes)) == 1, self.printed
        return codes[0]

    def until(self, pattern: str) -> None:
        """Wait until the run has printed it."""
        wait_until(lambda: re.search(pattern, self.printed), lambda: self.printed)

    @property
    def printed(self) -> str:
        return self.log.read_text()

    def result(self) -> tuple[dict, list[dict]]:
        """The exported weights, and the metrics without those of the clock."""
        lines = (self.output_dir / "metrics.jsonl").read_text().splitlines()
        rows = [without_clock(json.loads(line)) for line in lines]
        return load_file(self.output_dir / "model" / "model.safetensors"), rows

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in RunFolder(self.output_dir).checkpoints.iterdir())


class Launched(Training):
    """The same under `accelerate launch`, with one fault or none; `pids` holds the launcher."""

    def start(self, faults: Faults, processes: int) -> None:
        script = [ROOT / "train_accelerate.py"]
        if faults:
            (fault,) = faults
            script = [ROOT / "tests" / "trainer_faults.py", fault.func.__name__, json.dumps(fault.keywords)]
        config = ROOT / "accelerate_configs" / "multi_cpu.yaml"
        launch = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", processes]
        self.launcher = subprocess.Popen(
            list(map(str, [sys.executable, *launch, *script, *self.flags])),
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT,
            start_new_session=True,
        )
        self.pids = [self.launcher.pid]

    def wait(self) -> int:
        """The exit code of the launcher."""
        try:
            return self.launcher.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self.launcher.pid, signal.SIGKILL)
            pytest.fail(f"the run did not end: {self.printed}")


@pytest.fixture(scope="module")
def undisturbed(data_dir, tmp_path_factory):
    run = Training(tmp_path_factory.mktemp("undisturbed"), data_dir)
    assert run.wait() == 0, run.printed
    return run.result()


def assert_same(result, undisturbed) -> None:
    assert result[0].keys() == undisturbed[0].keys()
    assert all(torch.equal(tensor, undisturbed[0][name]) for name, tensor in result[0].items())
    assert result[1] == undisturbed[1]


# ---- too little memory ----

AUTO = ("--micro_batch_size", "auto", "--global_batch_tokens", 512 * 32, "--lr_schedule", "constant")
CHOSEN = r"micro_batch_size=auto: (\d+) sequences x (\d+) \(accumulation\), "


def chosen(run: Training, reason: str) -> tuple[int, int]:
    """Micro-batch and accumulation that the run says it has chosen, for a reason."""
    found = re.search(CHOSEN + reason, run.printed)
    assert found, run.printed
    return int(found[1]), int(found[2])


def test_the_micro_batch_is_halved_until_it_fits_and_a_resumed_run_keeps_it(data_dir, tmp_path):
    """And the run, with dropout, is the one with that number given by hand."""
    limited = (partial(faults.limit_memory_of_trial, mib=60),)
    run = Training(tmp_path / "auto", data_dir, *AUTO, "--max_steps", 3, "--checkpoint_every", 2, faults=limited)
    assert run.wait() == 0, run.printed
    size, accumulation = chosen(run, "the most that ran: 512 were planned, and ran out of memory")
    assert size < 512 and size * accumulation == 512
    assert RunFolder(run.output_dir).read_record()["micro_batch_size"] == size
    resumed = Training(tmp_path / "auto", data_dir, *AUTO, "--max_steps", 4)
    assert resumed.wait() == 0, resumed.printed
    assert chosen(resumed, "as this run has had before") == (size, accumulation)

    by_hand = Training(tmp_path / "by_hand", data_dir, *AUTO, "--max_steps", 4, "--micro_batch_size", size)
    assert by_hand.wait() == 0 and "auto" not in by_hand.printed
    assert_same((resumed.result()[0], training_losses(resumed)), (by_hand.result()[0], training_losses(by_hand)))


def training_losses(run: Training) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in metric_rows(run.output_dir, "loss")]


def test_all_ranks_take_the_micro_batch_of_the_one_with_the_least_memory(data_dir, tmp_path):
    limited = (partial(faults.limit_memory_of_trial, mib=30, only_rank=1),)
    run = Training(tmp_path, data_dir, *AUTO, "--max_steps", 3, faults=limited, processes=2)
    assert run.wait() == 0, run.printed
    size, accumulation = chosen(run, "the most that ran: 256 were planned, and ran out of memory")
    assert size < 256 and 2 * size * accumulation == 512


# ---- told to stop ----


@pytest.mark.parametrize("name, step", [("SIGTERM", 1), ("SIGINT", 10), ("SIGHUP", 11)])
def test_a_signal_finishes_the_step_saves_and_exits_with_the_documented_code(
    data_dir, undisturbed, tmp_path, name, step
):
    """Between two steps, the next one is still taken."""
    run = Training(tmp_path, data_dir, faults=(partial(faults.signal_after_step, step=step, name=name),))
    assert run.wait() == EXIT_CODE == 75, run.printed
    assert f"{name}: stopped and saved after step {step + 1};" in run.printed
    assert run.checkpoints()[-1] == f"step_{step + 1:08d}"
    resumed = Training(tmp_path, data_dir)
    assert resumed.wait() == 0, resumed.printed
    assert f"resuming after step {step + 1} of 24" in resumed.printed
    assert_same(resumed.result(), undisturbed)


def test_a_signal_to_every_process_of_the_run_stops_it_as_well(data_dir, undisturbed, tmp_path):
    """As Slurm sends it: the worker that reads batches dies of it while the main process is busy."""
    run = Training(tmp_path, data_dir, faults=(partial(faults.sigterm_to_all_processes_after_step, step=5),))
    assert run.wait() == EXIT_CODE, run.printed
    assert "SIGTERM: stopped and saved after step 6;" in run.printed
    resumed = Training(tmp_path, data_dir)
    assert resumed.wait() == 0, resumed.printed
    assert_same(resumed.result(), undisturbed)


def test_a_signal_during_validation_and_while_saving(data_dir, undisturbed, tmp_path):
    fault = partial(faults.sigterm_while_validating_and_saving, step=4)
    first = Training(tmp_path, data_dir, faults=(fault,))
    assert first.wait() == EXIT_CODE, first.printed
    assert first.checkpoints()[0] == "step_00000004"  # complete, although the signal came while it was written
    second = Training(tmp_path, data_dir, faults=(fault,))
    assert second.wait() == EXIT_CODE, second.printed
    assert second.checkpoints()[-1] == "step_00000013"  # the validation after step 12 was completed
    third = Training(tmp_path, data_dir)
    assert third.wait() == 0, third.printed
    assert_same(third.result(), undisturbed)


def test_a_second_signal_kills_at_once(data_dir, tmp_path):
    run = Training(tmp_path, data_dir, faults=(faults.endless_step,))
    run.until("in the step")
    os.kill(run.pids[0], signal.SIGTERM)
    os.kill(run.pids[0], signal.SIGTERM)  # forwarded by a launcher
    time.sleep(FORWARDING_SECONDS + 0.2)
    os.kill(run.pids[0], 0)  # it is alive
    os.kill(run.pids[0], signal.SIGTERM)
    assert run.wait() == -signal.SIGTERM


def test_the_time_limit_stops_a_run_like_a_signal(data_dir, undisturbed, tmp_path):
    run = Training(tmp_path, data_dir, "--max_hours", 1e-6)
    assert run.wait() == EXIT_CODE and "max_hours: stopped and saved after step 1;" in run.printed
    resumed = Training(tmp_path, data_dir)
    assert resumed.wait() == 0
    assert_same(resumed.result(), undisturbed)


@pytest.mark.parametrize("same_recipe", [True, False])
def test_what_another_run_did_before_the_lock_was_free_counts(data_dir, undisturbed, stopped, tmp_path, same_recipe):
    """Two starts in an empty directory: the second has checked it before the first one wrote its recipe."""
    first, folder = stopped.parents[1], tmp_path / "both" / "run"
    folder.mkdir(parents=True)
    flags = () if same_recipe else ("--learning_rate", 1e-4)
    with FileLock(folder / ".lock"):
        second = Training(tmp_path / "both", data_dir, *flags, faults=(faults.say_before_locking,))
        second.until("at the lock")
        shutil.copytree(first, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
    code = second.wait()
    if same_recipe:
        assert code == 0, second.printed
        assert_same(second.result(), undisturbed)
    else:
        assert code == 2 and "holds a run of another recipe (learning_rate" in second.printed
        assert (folder / "recipe.yaml").read_text() == (first / "recipe.yaml").read_text()


def test_one_rank_that_is_told_to_stop_stops_all(data_dir, tmp_path):
    """And the other rank does not exit before the main process has saved."""
    fault = partial(faults.signal_after_step, step=5, name="SIGUSR1", only_rank=1)
    run = Training(tmp_path, data_dir, faults=(fault,), processes=2)
    assert run.wait() == EXIT_CODE
    assert "another process was told to stop: stopped and saved after step 6;" in run.printed
    assert run.checkpoints()[-1] == "step_00000006"


def test_a_run_whose_launcher_is_killed_saves_and_ends(data_dir, tmp_path):
    run = Launched(tmp_path, data_dir, "--max_steps", 100_000, "--validate_every", 0, processes=2)
    wait_until((run.output_dir / "metrics.jsonl").exists, lambda: run.printed)
    children = psutil.Process(run.launcher.pid).children()
    run.launcher.kill()
    run.launcher.wait()
    wait_until(lambda: not any(child.is_running() for child in children), lambda: run.printed)
    assert "the launcher has ended: stopped and saved after step" in run.printed


@pytest.mark.parametrize(
    ("processes", "seconds", "number"),
    [(1, 0, signal.SIGKILL), (1, 2, signal.SIGTERM), (2, 0, signal.SIGTERM), (2, 2, signal.SIGKILL)],
)
def test_no_process_outlives_a_launcher_that_ends_while_the_run_starts(data_dir, tmp_path, processes, seconds, number):
    """At once, when its processes are interpreters that start, or later, when they import or wait for each other."""
    run = Launched(tmp_path, data_dir, "--max_steps", 100_000, "--validate_every", 0, processes=processes)
    launcher = psutil.Process(run.launcher.pid)
    children = wait_until(lambda: len(launcher.children()) == processes and launcher.children())
    time.sleep(seconds)
    run.launcher.send_signal(number)
    run.launcher.wait()
    try:
        wait_until(lambda: not any(child.is_running() for child in children), lambda: run.printed)
    finally:
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def test_processes_wait_minutes_for_each_other_and_an_hour_in_a_collective(data_dir, tmp_path):
    """The main process verifies the data for longer than the other one would wait for it to come."""
    slow = (
        partial(faults.short_meeting_time_after_the_meeting, seconds=2),
        partial(faults.slow_main_process, seconds=4),
    )
    run = Training(tmp_path, data_dir, "--max_steps", 3, faults=slow, processes=2)
    assert run.wait() == 0, run.printed


def test_no_ddp_outlives_its_process_group(data_dir, tmp_path):
    """It would end it with the GIL, for which gloo may wait: a stopped run then never ended, once in many."""
    stopped = partial(faults.signal_after_step, step=3, name="SIGTERM")
    run = Training(tmp_path, data_dir, faults=(faults.refuse_a_living_ddp, stopped), processes=2)
    assert run.wait() == EXIT_CODE, run.printed


def test_processes_of_two_runs_that_meet_at_one_port_are_refused(data_dir, tmp_path):
    other = (partial(faults.more_flags, flags=["--max_steps", "25"], only_rank=1),)
    run = Training(tmp_path, data_dir, faults=other, processes=2)
    assert run.wait() == 2, run.printed
    assert "error: rank 1 was started with max_steps=25, rank 0 with max_steps=24; start all" in run.printed
    assert not run.output_dir.exists()


def test_a_second_run_in_the_same_folder_is_refused(data_dir, stopped, tmp_path):
    """While the lock is held for longer than a run that is ending may need it."""
    with FileLock(tmp_path / "run" / ".lock"):
        second = Training(tmp_path, data_dir, faults=(faults.impatient_lock,))
        assert second.wait() == 2 and "another run is writing to" in second.printed
    assert stopped.exists()


# ---- killed and damaged ----


def test_a_killed_rank_ends_the_launch_and_the_same_command_resumes(data_dir, tmp_path):
    fault = partial(faults.signal_after_step, step=9, name="SIGKILL", only_rank=1)
    run = Launched(tmp_path / "killed", data_dir, faults=(fault,), processes=2)
    assert run.wait() != 0
    resumed = Training(tmp_path / "killed", data_dir, processes=2)
    assert resumed.wait() == 0, resumed.printed
    assert "resuming after step 8 of 24" in resumed.printed
    assert [row["step"] for row in resumed.result()[1] if "loss" in row] == [*range(1, 25)]


@pytest.fixture
def stopped(data_dir, tmp_path):
    """The newest checkpoint of a run that was stopped after step 10; the one before is of step 8."""
    run = Training(tmp_path, data_dir, faults=(partial(faults.signal_after_step, step=9, name="SIGTERM"),))
    assert run.wait() == EXIT_CODE
    assert run.checkpoints() == ["step_00000008", "step_00000010"]
    return run.output_dir / "checkpoints" / "step_00000010"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda newest: flip(newest / "model.safetensors"), "model.safetensors is damaged"),
        (lambda newest: flip(newest / "trainer_state.json"), "trainer_state.json is damaged"),
        (lambda newest: (newest / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
        (lambda newest: os.truncate(newest / "optimizer.safetensors", 1000), "optimizer.safetensors is damaged"),
        (lambda newest: (newest / "hashes.json").unlink(), "hashes.json cannot be read"),
        (lambda newest: (newest / "hashes.json").write_text("{}"), "hashes.json is damaged"),
    ],
    ids=["flipped", "edited", "missing", "truncated", "unlisted", "emptied"],
)
def test_a_damaged_checkpoint_is_named_and_the_run_resumes_from_the_one_before(
    data_dir, undisturbed, stopped, tmp_path, damage, words
):
    damage(stopped)
    resumed = Training(tmp_path, data_dir)
    assert resumed.wait() == 0, resumed.printed
    assert words in resumed.printed and "resuming after step 8 of 24" in resumed.printed
    assert "damaged_step_00000010" in resumed.checkpoints()
    assert_same(resumed.result(), undisturbed)


def test_stray_folders_and_damaged_caches_do_not_matter(data_dir, undisturbed, stopped, tmp_path):
    shutil.copytree(stopped, stopped.with_name("step_00000023.bak"))
    (stopped.parent / "step_best").mkdir()
    (tmp_path / "run" / ".verified.json").write_text("[")
    resumed = Training(tmp_path, data_dir)
    assert resumed.wait() == 0 and "resuming after step 10 of 24" in resumed.printed
    assert_same(resumed.result(), undisturbed)


def test_a_damaged_recipe_yaml_is_one_line(data_dir, stopped, tmp_path):
    (tmp_path / "run" / "recipe.yaml").write_text("")
    resumed = Training(tmp_path, data_dir)
    assert resumed.wait() == 2 and "Traceback" not in resumed.printed
    assert re.search("error: .*recipe.yaml is damaged", resumed.printed)


def test_a_signal_kills_an_evaluation_at_once(data_dir, stopped, tmp_path):
    fault = faults.sigterm_in_eval_only
    run = Training(tmp_path, data_dir, "--eval_only", "--init_from", stopped, faults=(fault,))
    assert run.wait() == -signal.SIGTERM


def test_no_intact_checkpoint_is_an_error_that_deletes_nothing(data_dir, stopped, tmp_path):
    for path in stopped.parent.glob("step_*"):
        flip(path / "model.safetensors")
    resumed = Training(tmp_path, data_dir)
    assert resumed.wait() == 2
    assert "error: no checkpoint in" in resumed.printed and "Traceback" not in resumed.printed
    assert len(list(stopped.parent.rglob("model.safetensors"))) == 2


def test_a_metrics_file_truncated_in_mid_line(data_dir, undisturbed, stopped, tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    shutil.rmtree(stopped)  # so that the lost row is logged again
    resumed = Training(tmp_path, data_dir)
    assert resumed.wait() == 0, resumed.printed
    assert_same(resumed.result(), undisturbed)


def test_a_shard_that_changed_is_refused(data_dir, stopped, tmp_path):
    changed = tmp_path / "data"
    shutil.copytree(data_dir, changed)
    tokens = np.load(changed / "train_00000.npy")
    tokens[1000] += 1
    np.save(changed / "train_00000.npy", tokens)
    resumed = Training(tmp_path, changed)
    assert resumed.wait() == 2 and "train_00000.npy is damaged: its sha256 differs" in resumed.printed


def test_all_shards_are_hashed_on_request(data_dir, stopped, tmp_path):
    """A byte outside the sample rots, and leaves no trace in the file system."""
    rotten = tmp_path / "data"
    shutil.copytree(data_dir, rotten)
    shard, record = rotten / "train_00000.npy", tmp_path / "run" / ".verified.json"
    with shard.open("r+b") as file:
        file.seek(5000)
        file.write(b"xx")
    record.write_text(json.dumps({str(shard): shard_state(shard)}))
    resumed = Training(tmp_path, rotten, "--verify_data")
    assert resumed.wait() == 2 and "train_00000.npy is damaged: its sha256 differs" in resumed.printed


def test_a_full_disk_costs_a_checkpoint_not_the_run(data_dir, undisturbed, tmp_path):
    """Files may not grow beyond 60 kB while steps 8 and 12 are saved."""
    fault = partial(faults.file_size_limit_while_saving, steps=[8, 12], max_bytes=60_000)
    run = Training(tmp_path, data_dir, faults=(fault,))
    assert run.wait() == 0, run.printed
    assert len(re.findall("could not be written .*; training continues", run.printed)) == 2
    assert run.checkpoints() == ["step_00000020", "step_00000024"]
    assert_same(run.result(), undisturbed)


def test_a_full_file_system_loses_no_row_of_the_metrics(data_dir, undisturbed, small_disk, tmp_path):
    """Full from step 6 to step 15: the checkpoints of steps 8 and 12 fail, and the rows of ten steps must wait."""
    (tmp_path / "run").symlink_to(small_disk(2**23))
    run = Training(tmp_path, data_dir, faults=(partial(faults.full_disk, from_step=6, to_step=15),))
    assert run.wait() == 0, run.printed
    assert len(re.findall(r"No space left.*; training continues", run.printed)) == 2
    assert "metrics.jsonl could not be written ([Errno 28] No space left on device); its rows are queued" in run.printed
    assert run.checkpoints() == ["step_00000020", "step_00000024"]
    assert_same(run.result(), undisturbed)


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "free some space and repeat the command"), (errno.EACCES, "make it writable")]
)
def test_a_last_checkpoint_that_cannot_be_written_is_an_error(data_dir, tmp_path, number, remedy):
    fault = partial(faults.unwritable_checkpoints, number=number)
    run = Training(tmp_path, data_dir, "--max_steps", 4, faults=(fault,))
    assert run.wait() == 2
    assert f"error: the checkpoint at step 4 could not be written ([Errno {number}]" in run.printed
    assert remedy in run.printed and run.checkpoints() == []


def test_a_killed_loader_worker_is_replaced(data_dir, undisturbed, tmp_path):
    fault = partial(faults.killed_loader_worker, step=7, micro=1, flag=str(tmp_path / "killed"))
    run = Training(tmp_path, data_dir, faults=(fault,))
    assert run.wait() == 0, run.printed
    assert "; started again" in run.printed and (tmp_path / "killed").exists()
    assert_same(run.result(), undisturbed)


# ---- the order of a step ----


def test_the_learning_rate_of_a_step_is_set_before_its_backward_passes(data_dir, tmp_path):
    """DeepSpeed updates in the last backward pass; the later calls do nothing there."""
    run = Training(tmp_path, data_dir, "--max_steps", 3, faults=(faults.print_order_of_a_step,))
    assert run.wait() == 0, run.printed
    assert re.findall("<lr>|<backward>", run.printed) == ["<lr>", *["<backward>"] * 4] * 3


# ---- bad steps ----


def test_a_non_finite_gradient_on_one_rank_makes_all_ranks_skip_the_update(data_dir, tmp_path):
    fault = partial(faults.nan_gradients, calls=[5], only_rank=1)
    run = Training(tmp_path, data_dir, "--max_steps", 8, faults=(fault,), processes=2)
    assert run.wait() == 0, run.printed
    assert "step 5: loss" in run.printed and "gradient norm nan: update skipped" in run.printed
    weights, rows = run.result()
    steps = [row for row in rows if "loss" in row]
    assert [row["bad_steps"] for row in steps] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert steps[4]["grad_norm"] is None and all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_batches_that_break_steps_are_skipped_after_a_rollback(data_dir, tmp_path):
    """Three bad steps in a row, at batches 9 to 11: back to step 8, and on with batch 8, 12, 13, ..."""
    log = tmp_path / "batches"
    both = (partial(faults.nan_gradients, calls=[10, 11, 12]), partial(faults.record_batches, path=str(log)))
    run = Training(tmp_path, data_dir, "--max_bad_steps", 3, "--num_workers", 0, faults=both)
    assert run.wait() == 0, run.printed
    assert "at batches [9, 10, 11]: rolled back to step 8, skipping them" in run.printed
    assert list(map(int, log.read_text().split())) == [*range(12), 8, *range(12, 27)]
    state = json.loads((run.output_dir / "checkpoints" / "step_00000024" / "trainer_state.json").read_text())
    assert state["guard"]["left_out"] == [9, 10, 11] and state["guard"]["rollbacks"] == 1
    assert state["guard"]["bad_steps"] == 3
    rows = metric_rows(run.output_dir, "loss")
    assert [row["step"] for row in rows] == [*range(1, 25)] and all(row["grad_norm"] for row in rows)


def test_nothing_is_saved_between_bad_steps_and_a_rollback_goes_before_them(data_dir, tmp_path):
    """Checkpoints are due at 10 and 11, in the middle of three bad steps; only two are kept."""
    fault = partial(faults.nan_gradients, calls=[10, 11, 12])
    flags = ("--max_bad_steps", 3, "--checkpoint_every", 1, "--keep_last", 2, "--max_steps", 14)
    run = Training(tmp_path, data_dir, *flags, faults=(fault,))
    assert run.wait() == 0, run.printed
    assert "at batches [9, 10, 11]: rolled back to step 9, skipping them" in run.printed


def test_a_run_that_is_stopped_between_bad_steps_resumes_from_before_them(data_dir, tmp_path):
    bad = partial(faults.nan_gradients, calls=[*range(6, 100)])
    stop = partial(faults.signal_after_step, step=6, name="SIGTERM")
    run = Training(tmp_path, data_dir, faults=(bad, stop))
    assert run.wait() == EXIT_CODE
    assert "SIGTERM: stopped between bad steps, which are not saved, after step 7" in run.printed
    assert run.checkpoints() == ["step_00000004"]
    resumed = Training(tmp_path, data_dir)
    assert resumed.wait() == 0 and "resuming after step 4 of 24" in resumed.printed


def test_weights_that_are_not_finite_are_never_written(data_dir, tmp_path):
    run = Training(tmp_path, data_dir, "--max_steps", 10, faults=(partial(faults.broken_weights, after_step=6),))
    run.wait()
    assert "no checkpoint at step 8: transformer.wte.weight is not finite; older ones stay" in run.printed
    assert run.checkpoints() == ["step_00000004"]


def test_a_run_whose_last_step_is_not_finite_still_exports_a_model(data_dir, tmp_path):
    run = Training(tmp_path, data_dir, "--max_steps", 4, faults=(faults.nan_losses,))
    assert run.wait() == 0, run.printed
    assert "training loss" not in (run.output_dir / "model" / "README.md").read_text()
    assert (run.output_dir / "loss.png").stat().st_size > 10_000


# ---- early stopping ----


def test_early_stopping_exports_the_model_of_the_best_validation_and_prints_its_loss(data_dir, tmp_path):
    """The learning rate grows until it breaks the model."""
    flags = ("--patience", 2, "--validate_every", 2, "--max_steps", 60, "--warmup_steps", 40, "--learning_rate", 2)
    run = Training(tmp_path, data_dir, *flags)
    assert run.wait() == 0, run.printed
    losses = {row["step"]: row["val_loss"] for row in metric_rows(run.output_dir, "val_loss")}
    best = min(losses, key=losses.get)
    assert list(losses) == [*range(2, best + 5, 2)] and best + 4 < 60
    assert f"validation loss {losses[best]:.4f} nats per token" in run.printed and f", at step {best}\n" in run.printed
    assert f"| {losses[best]:.4f} |" in (run.output_dir / "model" / "README.md").read_text()
    best_weights = load_file(run.output_dir / "checkpoints" / f"step_{best:08d}" / "model.safetensors")
    weights, _ = run.result()
    for name, tensor in weights.items():
        assert torch.equal(tensor, best_weights[name][: len(tensor)])  # checkpoints keep the padding rows
    why = f"stopped early after step {best + 4}: 2 validations without improvement; exporting step {best}, which"
    assert why in run.printed
    again = Training(tmp_path, data_dir, *flags)  # there is nothing left to do
    assert again.wait() == 0 and f", at step {best}\n" in again.printed
    longer = Training(tmp_path, data_dir, *flags, "--max_steps", 80, "--extend")
    assert longer.wait() == 0 and "patience=2 counts anew from here" in longer.printed
    steps = [row["step"] for row in metric_rows(run.output_dir, "val_loss")]
    assert steps[: len(losses) + 2] == [*losses, best + 6, best + 8]
