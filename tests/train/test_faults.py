"""What happens to a run when something goes wrong: each fault is caused for real, in processes of their own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from fork_server import ENVIRONMENT, ForkServer
from safetensors.torch import load_file

import prepare_data
from gpt2repro.train.metrics import CLOCK_KEYS, read_metrics
from gpt2repro.train.stopping import EXIT_CODE


ROOT = Path(__file__).resolve().parents[2]
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
# The trainer with a fault: `hook` is Python that runs before main, with all of the trainer in scope.
SCRIPT = """
import os, signal, sys, time
import torch
import train_accelerate
from gpt2repro import files
from gpt2repro.data import batches
from gpt2repro.errors import run_script
from gpt2repro.evaluation import validation
from gpt2repro.train import checkpoint, guard, telemetry
{hook}
if __name__ == "__main__":
    run_script(train_accelerate.main)
"""


@pytest.fixture(scope="module", autouse=True)
def server(trainer_server):
    Training.server = trainer_server


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, python_docs):
    root = tmp_path_factory.mktemp("docs")
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in python_docs[:300]))
    source = ["files", "--source", str(root / "text.jsonl"), "--tokenizer", "bpe:400", "--val_fraction", "0.1"]
    prepare_data.main([*source, "--output_dir", str(root / "data")])
    return root / "data"


class Training:
    """A run of the recipe in `folder`, with a fault or none; several processes are `launched` by accelerate, or forked.

    Attributes:
        pids: of its processes, or of the launcher alone.
    """

    server: ForkServer

    def __init__(
        self, folder: Path, data_dir: Path, *flags, hook: str = "", processes: int = 1, launched: bool = False
    ):
        self.output_dir, self.log = folder / "run", folder / "log"
        folder.mkdir(exist_ok=True)
        self.log.write_text("")
        (folder / "recipe.yaml").write_text(RECIPE)
        (folder / "script.py").write_text(SCRIPT.format(hook=hook))
        command = [folder / "script.py", "--config", folder / "recipe.yaml", "--data_dir", data_dir]
        command += ["--output_dir", self.output_dir, *flags]
        self.launcher = None
        if launched:
            config = ROOT / "accelerate_configs" / "multi_cpu.yaml"
            launch = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", processes]
            self.launcher = subprocess.Popen(
                list(map(str, [sys.executable, *launch, *command])),
                stdout=self.log.open("w"),
                stderr=subprocess.STDOUT,
                env=os.environ | ENVIRONMENT,
                start_new_session=True,
            )
            self.pids = [self.launcher.pid]
        else:
            self.pids = self.server.start_processes(processes, command, self.log, self.log)

    def wait(self) -> int:
        """The exit code, that of all processes; what takes more than two minutes is killed."""

        def end() -> None:
            for pid in self.pids:
                os.killpg(pid, signal.SIGKILL)

        watch = threading.Timer(120, end)
        watch.start()
        try:
            codes = [self.launcher.wait()] if self.launcher else list(map(self.server.wait, self.pids))
        finally:
            watch.cancel()
        assert len(set(codes)) == 1, self.printed
        return codes[0]

    def until(self, pattern: str) -> None:
        """Wait until the run has printed it."""
        end = time.monotonic() + 60
        while not re.search(pattern, self.printed):
            assert time.monotonic() < end, self.printed
            time.sleep(0.01)

    @property
    def printed(self) -> str:
        return self.log.read_text()

    def result(self) -> tuple[dict, list[dict]]:
        """Final weights, and the metrics but for the clock."""
        lines = (self.output_dir / "metrics.jsonl").read_text().splitlines()
        rows = [{k: v for k, v in json.loads(line).items() if k not in CLOCK_KEYS} for line in lines]
        return load_file(self.output_dir / "model" / "model.safetensors"), rows

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.output_dir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def undisturbed(data_dir, tmp_path_factory):
    run = Training(tmp_path_factory.mktemp("undisturbed"), data_dir)
    assert run.wait() == 0, run.printed
    return run.result()


def assert_same(result, undisturbed) -> None:
    assert result[0].keys() == undisturbed[0].keys()
    assert all(torch.equal(tensor, undisturbed[0][name]) for name, tensor in result[0].items())
    assert result[1] == undisturbed[1]


# ---- told to stop ----

SIGNAL_AT = """
made = telemetry.Telemetry.log_step
def log_step(self, step, *args):
    made(self, step, *args)
    if step == {step} and os.environ.get("RANK", "0") == "{rank}":
        os.kill(os.getpid(), signal.{name})
telemetry.Telemetry.log_step = log_step
"""


@pytest.mark.parametrize("name, step", [("SIGTERM", 1), ("SIGINT", 10), ("SIGUSR1", 11)])
def test_a_signal_ends_the_step_saves_and_exits_with_the_stated_code(data_dir, undisturbed, tmp_path, name, step):
    """Just after a step it is the next one that is finished."""
    run = Training(tmp_path, data_dir, hook=SIGNAL_AT.format(step=step, name=name, rank=0))
    assert run.wait() == EXIT_CODE == 75, run.printed
    assert f"{name}: stopped and saved after step {step + 1};" in run.printed
    assert run.checkpoints()[-1] == f"step_{step + 1:08d}"
    again = Training(tmp_path, data_dir)
    assert again.wait() == 0, again.printed
    assert f"resuming after step {step + 1} of 24" in again.printed
    assert_same(again.result(), undisturbed)


def test_a_signal_to_all_its_processes_is_as_one_to_itself(data_dir, undisturbed, tmp_path):
    """As Slurm's: the process that reads batches dies of it, here while the main one is busy."""
    to_all = "os.system('kill -TERM 0'); time.sleep(0.5)"  # torch forgives it to a parent
    hook = SIGNAL_AT.format(step=5, name="SIGTERM", rank=0).replace("os.kill(os.getpid(), signal.SIGTERM)", to_all)
    run = Training(tmp_path, data_dir, hook=hook)
    assert run.wait() == EXIT_CODE, run.printed
    assert "SIGTERM: stopped and saved after step 6;" in run.printed
    again = Training(tmp_path, data_dir)
    assert again.wait() == 0, again.printed
    assert_same(again.result(), undisturbed)


def test_a_signal_during_validation_and_while_saving(data_dir, undisturbed, tmp_path):
    hook = """
validate, write = validation.validation_loss, checkpoint.Checkpoints._write
def validation_loss(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    return validate(*args)
def _write(self, weights, moments, state):
    if state["step"] == 4:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)  # training goes on meanwhile
    write(self, weights, moments, state)
checkpoint.Checkpoints._write = _write
validation.validation_loss = validation_loss
"""
    first = Training(tmp_path, data_dir, hook=hook)
    assert first.wait() == EXIT_CODE, first.printed
    assert first.checkpoints()[0] == "step_00000004"  # finished, although the signal came while it was written
    second = Training(tmp_path, data_dir, hook=hook)
    assert second.wait() == EXIT_CODE, second.printed
    assert second.checkpoints()[-1] == "step_00000013"  # the validation after step 12 was finished
    third = Training(tmp_path, data_dir)
    assert third.wait() == 0, third.printed
    assert_same(third.result(), undisturbed)


def test_a_second_signal_ends_it_at_once(data_dir, tmp_path):
    hook = """
forward_backward = train_accelerate.forward_backward
def slow(*args):
    print("in the step", flush=True)
    for _ in range(600):
        time.sleep(0.1)
    return forward_backward(*args)
train_accelerate.forward_backward = slow
"""
    run = Training(tmp_path, data_dir, hook=hook)
    run.until("in the step")
    os.kill(run.pids[0], signal.SIGTERM)
    os.kill(run.pids[0], signal.SIGTERM)  # passed on by a launcher
    time.sleep(2.2)
    os.kill(run.pids[0], 0)  # it is there
    os.kill(run.pids[0], signal.SIGTERM)
    assert run.wait() == -signal.SIGTERM


def test_the_time_limit_ends_it_like_a_signal(data_dir, undisturbed, tmp_path):
    run = Training(tmp_path, data_dir, "--max_hours", 1e-6)
    assert run.wait() == EXIT_CODE and "max_hours: stopped and saved after step 1;" in run.printed
    again = Training(tmp_path, data_dir)
    assert again.wait() == 0
    assert_same(again.result(), undisturbed)


@pytest.mark.slow
def test_one_process_that_is_told_to_stop_stops_all(data_dir, tmp_path):
    """And the one that was not told does not leave before the main process has saved."""
    run = Training(tmp_path, data_dir, hook=SIGNAL_AT.format(step=5, name="SIGUSR1", rank=1), processes=2)
    assert run.wait() == EXIT_CODE
    assert "another process was told to stop: stopped and saved after step 6;" in run.printed
    assert run.checkpoints()[-1] == "step_00000006"


@pytest.mark.slow
def test_a_run_whose_launcher_is_killed_saves_and_ends(data_dir, tmp_path):
    run = Training(tmp_path, data_dir, "--max_steps", 100_000, "--validate_every", 0, processes=2, launched=True)
    end = time.monotonic() + 60
    while not (run.output_dir / "metrics.jsonl").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(run.launcher.pid)], capture_output=True, text=True).stdout.split()
    run.launcher.kill()
    run.launcher.wait()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert "the launcher has ended: stopped and saved after step" in run.printed


def test_a_second_run_in_the_same_directory_is_refused(data_dir, stopped, tmp_path):
    """Here by a process that holds the directory for longer than a run that ends may take."""
    hook = """
take = files.FileLock.acquire
files.FileLock.acquire = lambda self, timeout: take(self, timeout=0.1)
"""
    with FileLock(tmp_path / "run" / ".lock"):
        again = Training(tmp_path, data_dir, hook=hook)
        assert again.wait() == 2 and "another run is writing to" in again.printed
    assert stopped.exists()


# ---- killed and damaged ----


@pytest.mark.slow
def test_a_killed_process_ends_the_launch_and_the_same_command_goes_on(data_dir, tmp_path):
    hook = SIGNAL_AT.format(step=9, name="SIGKILL", rank=1)
    run = Training(tmp_path / "killed", data_dir, hook=hook, processes=2, launched=True)
    assert run.wait() != 0
    again = Training(tmp_path / "killed", data_dir, processes=2)
    assert again.wait() == 0, again.printed
    assert "resuming after step 8 of 24" in again.printed
    assert [row["step"] for row in again.result()[1] if "loss" in row] == [*range(1, 25)]


@pytest.fixture
def stopped(data_dir, tmp_path):
    """A run that was stopped after step 10, with checkpoints at 8 and 10."""
    run = Training(tmp_path, data_dir, hook=SIGNAL_AT.format(step=9, name="SIGTERM", rank=0))
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
    ],
    ids=["flipped", "edited", "missing", "truncated", "unlisted"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    data_dir, undisturbed, stopped, tmp_path, damage, words
):
    damage(stopped)
    again = Training(tmp_path, data_dir)
    assert again.wait() == 0, again.printed
    assert words in again.printed and "resuming after step 8 of 24" in again.printed
    assert "damaged_step_00000010" in again.checkpoints()
    assert_same(again.result(), undisturbed)


def test_where_nothing_is_trained_a_signal_ends_it_at_once(data_dir, stopped, tmp_path):
    hook = "train_accelerate.validation_losses = lambda *args: os.kill(os.getpid(), signal.SIGTERM) or {}"
    assert Training(tmp_path, data_dir, "--eval_only", "--init_from", stopped, hook=hook).wait() == -signal.SIGTERM


def test_no_whole_checkpoint_is_an_error_that_deletes_nothing(data_dir, stopped, tmp_path):
    for path in stopped.parent.glob("step_*"):
        flip(path / "model.safetensors")
    again = Training(tmp_path, data_dir)
    assert again.wait() == 2
    assert "error: no checkpoint in" in again.printed and "Traceback" not in again.printed
    assert len(list(stopped.parent.rglob("model.safetensors"))) == 2


def test_a_metrics_file_cut_in_mid_line(data_dir, undisturbed, stopped, tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    shutil.rmtree(stopped)  # so that the lost row is made again
    again = Training(tmp_path, data_dir)
    assert again.wait() == 0, again.printed
    assert_same(again.result(), undisturbed)


def test_a_shard_that_changed_is_refused(data_dir, stopped, tmp_path):
    changed = tmp_path / "data"
    shutil.copytree(data_dir, changed)
    tokens = np.load(changed / "train_00000.npy")
    tokens[1000] += 1
    np.save(changed / "train_00000.npy", tokens)
    again = Training(tmp_path, changed)
    assert again.wait() == 2 and "train_00000.npy is damaged: its sha256 differs" in again.printed


def test_a_full_disk_costs_a_checkpoint_not_the_run(data_dir, undisturbed, tmp_path):
    """Files that may not grow beyond what is left, while steps 8 and 12 are saved."""
    hook = """
import resource
write = checkpoint.Checkpoints._write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def _write(self, weights, moments, state):
    if state["step"] in (8, 12):
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
    write(self, weights, moments, state)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoint.Checkpoints._write = _write
"""
    run = Training(tmp_path, data_dir, hook=hook)
    assert run.wait() == 0, run.printed
    assert len(re.findall("could not be written .*; training continues", run.printed)) == 2
    assert run.checkpoints() == ["step_00000020", "step_00000024"]
    assert_same(run.result(), undisturbed)


def test_a_file_system_without_space_costs_no_row_of_the_metrics(data_dir, undisturbed, small_disk, tmp_path):
    """It is full from step 6 to step 15; steps 8 and 12 are to be saved, and every step logs a row."""
    (tmp_path / "run").symlink_to(small_disk(2**23))
    hook = """
made = telemetry.Telemetry.log_step
def log_step(self, step, *args):
    full = os.path.join(self.recipe.output_dir, "checkpoints", "full")
    if step == 6:
        with open(full, "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
    if step == 15:
        os.remove(full)
    made(self, step, *args)
telemetry.Telemetry.log_step = log_step
"""
    run = Training(tmp_path, data_dir, hook=hook)
    assert run.wait() == 0, run.printed
    assert len(re.findall(r"No space left.*; training continues", run.printed)) == 2
    assert "metrics.jsonl could not be written ([Errno 28] No space left on device); its rows are queued" in run.printed
    assert run.checkpoints() == ["step_00000020", "step_00000024"]
    assert_same(run.result(), undisturbed)


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(data_dir, tmp_path):
    hook = """
import errno
def save_file(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")
checkpoint.save_file = save_file
"""
    run = Training(tmp_path, data_dir, "--max_steps", 4, hook=hook)
    assert run.wait() == 2
    assert "error: the checkpoint at step 4 could not be written ([Errno 28]" in run.printed
    assert "free some space and repeat the command" in run.printed and run.checkpoints() == []


def test_a_dead_loader_worker_is_replaced(data_dir, undisturbed, tmp_path):
    hook = """
item = batches.MicroBatches.__getitem__
def __getitem__(self, where):
    from torch.utils.data import get_worker_info
    if where == (7, 1) and get_worker_info() and not os.path.exists(os.environ["FLAG"]):
        open(os.environ["FLAG"], "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return item(self, where)
batches.MicroBatches.__getitem__ = __getitem__
os.environ["FLAG"] = {flag!r}
"""
    run = Training(tmp_path, data_dir, hook=hook.format(flag=str(tmp_path / "flag")))
    assert run.wait() == 0, run.printed
    assert "; started again" in run.printed
    assert_same(run.result(), undisturbed)


# ---- the order of a step ----


def test_the_learning_rate_of_a_step_is_set_before_its_backward_passes(data_dir, tmp_path):
    """DeepSpeed updates in the last backward pass; the later calls do nothing there."""
    hook = """
from accelerate import Accelerator
set_lr, backward = train_accelerate.set_lr, Accelerator.backward
def record_lr(optimizers, lr):
    print("<lr>", flush=True)
    return set_lr(optimizers, lr)
def record_backward(self, loss):
    print("<backward>", flush=True)
    backward(self, loss)
train_accelerate.set_lr, Accelerator.backward = record_lr, record_backward
"""
    run = Training(tmp_path, data_dir, "--max_steps", 3, hook=hook)
    assert run.wait() == 0, run.printed
    assert re.findall("<lr>|<backward>", run.printed) == ["<lr>", *["<backward>"] * 4] * 3


# ---- bad steps ----

NAN_AT = """
forward_backward = train_accelerate.forward_backward
def poisoned(accelerator, model, *args):
    count[0] += 1
    if count[0] not in {counts} or os.environ.get("RANK", "0") != "{rank}":
        return forward_backward(accelerator, model, *args)
    handle = next(model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    result = forward_backward(accelerator, model, *args)
    handle.remove()
    return result
count = [0]
train_accelerate.forward_backward = poisoned
"""


@pytest.mark.slow
def test_a_gradient_of_one_process_that_is_not_finite_costs_one_update(data_dir, tmp_path):
    run = Training(tmp_path, data_dir, "--max_steps", 8, hook=NAN_AT.format(counts=[5], rank=1), processes=2)
    assert run.wait() == 0, run.printed
    assert "step 5: loss" in run.printed and "gradient norm nan: update skipped" in run.printed
    weights, rows = run.result()
    steps = [row for row in rows if "loss" in row]
    assert [row["bad_steps"] for row in steps] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert steps[4]["grad_norm"] is None and all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_batches_that_break_steps_are_left_out_after_a_rollback(data_dir, tmp_path):
    """Three bad steps in a row, at batches 9 to 11: back to step 8, and on with batch 8, 12, 13, ..."""
    log = tmp_path / "batches"
    record = f"""
item = batches.MicroBatches.__getitem__
def __getitem__(self, where):
    if where[1] == 0:
        print(where[0], file=open({str(log)!r}, "a"))
    return item(self, where)
batches.MicroBatches.__getitem__ = __getitem__
"""
    hook = NAN_AT.format(counts=[10, 11, 12], rank=0) + record
    run = Training(tmp_path, data_dir, "--max_bad_steps", 3, "--num_workers", 0, hook=hook)
    assert run.wait() == 0, run.printed
    assert "at batches [9, 10, 11]: rolled back to step 8, skipping them" in run.printed
    read = [int(line) for line in log.read_text().split()]
    assert read == [*range(12), 8, *range(12, 27)]
    state = json.loads((run.output_dir / "checkpoints" / "step_00000024" / "trainer_state.json").read_text())
    assert state["guard"]["left_out"] == [9, 10, 11] and state["guard"]["rollbacks"] == 1
    assert state["guard"]["bad_steps"] == 3
    rows = [row for row in read_metrics(run.output_dir / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [*range(1, 25)] and all(row["grad_norm"] for row in rows)


def test_a_last_step_that_is_not_finite_still_ends_in_a_model(data_dir, tmp_path):
    hook = """
agree = train_accelerate.agree
def poisoned(*args):
    loss, stopping = agree(*args)
    return float("nan"), stopping
train_accelerate.agree = poisoned
"""
    run = Training(tmp_path, data_dir, "--max_steps", 4, hook=hook)
    assert run.wait() == 0, run.printed
    assert "training loss" not in (run.output_dir / "model" / "README.md").read_text()
    assert (run.output_dir / "loss.png").stat().st_size > 10_000


# ---- early stopping ----


def test_early_stopping_exports_the_best_validated_model_and_says_its_loss(data_dir, tmp_path):
    """A learning rate that grows until it breaks the model."""
    flags = ("--patience", 2, "--validate_every", 2, "--max_steps", 60, "--warmup_steps", 40, "--learning_rate", 2)
    run = Training(tmp_path, data_dir, *flags)
    assert run.wait() == 0, run.printed
    losses = {r["step"]: r["val_loss"] for r in read_metrics(run.output_dir / "metrics.jsonl") if "val_loss" in r}
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
