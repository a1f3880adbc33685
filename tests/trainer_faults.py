"""Faults of a training run, one function each: called in the trainer's process before main, it arranges that the fault
happens for real at the stated moment.

Forked runs are given these functions by fork_server.py. `accelerate launch` starts this file as a script:
    trainer_faults.py FAULT ARGUMENTS_AS_JSON [flags of train_accelerate.py]
"""

import contextlib
import json
import os
import resource
import signal
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from filelock import FileLock
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import get_worker_info

import train_accelerate
from gpt2repro.data.batches import MicroBatches
from gpt2repro.data.mixture import RunData
from gpt2repro.errors import run_script
from gpt2repro.evaluation import validation
from gpt2repro.run_folder import RunFolder
from gpt2repro.train import checkpoint, rendezvous
from gpt2repro.train.checkpoint import Checkpoints
from gpt2repro.train.telemetry import Telemetry


def rank() -> int:
    return int(os.environ.get("RANK", 0))


# ---- memory ----


def limit_memory_of_trial(mib: int, only_rank: int | None = None) -> None:
    """While the micro-batch is chosen, the process, or that of one rank, gets `mib` more address space than it has.
    Afterwards it may have more again, as threads need some even where memory is left."""
    fix_micro_batch_size = train_accelerate.fix_micro_batch_size

    def fix_within_limit(*args):
        unlimited = resource.getrlimit(resource.RLIMIT_AS)
        held = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (held + mib * 2**20, unlimited[1]))
        try:
            return fix_micro_batch_size(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, unlimited)

    if only_rank in (None, rank()):
        train_accelerate.fix_micro_batch_size = fix_within_limit


# ---- signals ----


def after_step(step: int, action: Callable[[], object]) -> None:
    """Call `action` right after step `step` (counted from 1) was logged, before the next one begins."""
    log_step = Telemetry.log_step

    def log_step_and_act(self, completed, *args):
        log_step(self, completed, *args)
        if completed == step:
            action()

    Telemetry.log_step = log_step_and_act


def signal_after_step(step: int, name: str, only_rank: int = 0) -> None:
    """One rank gets a signal between two steps."""
    if rank() == only_rank:
        after_step(step, lambda: os.kill(os.getpid(), signal.Signals[name]))


def sigterm_to_all_processes_after_step(step: int) -> None:
    """Every process of the run gets SIGTERM, the one that reads batches too, while the main process is busy.

    The main process sleeps, so that the worker is dead before the next batch is asked for. torch raises in a parent
    whose worker died, unless the parent has been signalled as well.
    """

    def signal_all() -> None:
        os.system("kill -TERM 0")
        time.sleep(0.5)

    after_step(step, signal_all)


def sigterm_while_validating_and_saving(step: int) -> None:
    """SIGTERM at each validation, and while a thread writes the checkpoint of `step` and training continues."""
    validation_loss, write = validation.validation_loss, Checkpoints._write

    def signal_and_validate(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return validation_loss(*args)

    def signal_and_write(self, weights, moments, state):
        if state["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # training continues meanwhile
        write(self, weights, moments, state)

    validation.validation_loss, Checkpoints._write = signal_and_validate, signal_and_write


def sigterm_in_eval_only() -> None:
    """SIGTERM when --eval_only would compute its losses."""
    train_accelerate.validation_losses = lambda *args: os.kill(os.getpid(), signal.SIGTERM) or {}


def endless_step() -> None:
    """The first step prints "in the step" and takes minutes, in short sleeps that signal handlers interrupt."""
    forward_backward = train_accelerate.forward_backward

    def slow_forward_backward(*args):
        print("in the step", flush=True)
        for _ in range(6000):
            time.sleep(0.1)
        return forward_backward(*args)

    train_accelerate.forward_backward = slow_forward_backward


# ---- disks and files ----


def short_meeting_time_after_the_meeting(seconds: float) -> None:
    """As if the processes of a run waited only so long for each other, but found each other in time."""
    meet = rendezvous.meet

    def meet_and_shorten(recipe):
        store = meet(recipe)
        rendezvous.MEETING_TIME = timedelta(seconds=seconds)
        return store

    rendezvous.meet = meet_and_shorten


def slow_main_process(seconds: float) -> None:
    """The main process verifies the data for so long; the others wait for it in a collective."""
    verify_changed = RunData.verify_changed

    def verify_slowly(*args, **options):
        time.sleep(seconds)
        return verify_changed(*args, **options)

    RunData.verify_changed = verify_slowly


def refuse_a_living_ddp() -> None:
    """No fault: fail if DDP lives on where the process group ends."""
    init, close = DistributedDataParallel.__init__, Telemetry.close
    made: list[weakref.ref] = []

    def init_known(self, *args, **kwargs) -> None:
        made.append(weakref.ref(self))
        init(self, *args, **kwargs)

    def close_without_ddp(self) -> None:
        assert made, "there was no DDP"
        assert not any(ddp() for ddp in made), "DDP outlives the process group"
        close(self)

    DistributedDataParallel.__init__ = init_known
    Telemetry.close = close_without_ddp


def more_flags(flags: Sequence[str], only_rank: int) -> None:
    """One rank is started with other flags."""
    if rank() == only_rank:
        sys.argv += flags


def impatient_lock() -> None:
    """Wait for the lock of the run's folder for a tenth of a second only."""
    acquire = FileLock.acquire
    FileLock.acquire = lambda self, timeout: acquire(self, timeout=0.1)


def say_before_locking() -> None:
    """No fault: print "at the lock" before waiting for it."""
    lock = RunFolder.lock

    def say_and_lock(self):
        print("at the lock", flush=True)
        lock(self)

    RunFolder.lock = say_and_lock


def file_size_limit_while_saving(steps: Sequence[int], max_bytes: int) -> None:
    """The checkpoints of these steps meet EFBIG: no file may grow beyond max_bytes while they are written."""
    write = Checkpoints._write
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limited_write(self, weights, moments, state):
        if state["step"] in steps:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, resource.RLIM_INFINITY))
        write(self, weights, moments, state)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    Checkpoints._write = limited_write


def full_disk(from_step: int, to_step: int) -> None:
    """The run's file system is full from one step to another: a file takes all of its space."""
    log_step = Telemetry.log_step

    def fill(path: Path) -> None:
        with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass

    def log_step_on_a_full_disk(self, step, *args):
        ballast = RunFolder(self.recipe.output_dir).checkpoints / "ballast"
        if step == from_step:
            fill(ballast)
        if step == to_step:
            ballast.unlink()
        log_step(self, step, *args)

    Telemetry.log_step = log_step_on_a_full_disk


def unwritable_checkpoints(number: int) -> None:
    """Writing a checkpoint's tensors fails with this errno."""

    def save_file(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    checkpoint.save_file = save_file


# ---- batches ----


def read_batches(wrap: Callable[[Callable], Callable]) -> None:
    """Replace MicroBatches.__getitem__ by wrap(MicroBatches.__getitem__)."""
    MicroBatches.__getitem__ = wrap(MicroBatches.__getitem__)


def killed_loader_worker(step: int, micro: int, flag: str) -> None:
    """The worker process that reads this micro-batch gets SIGKILL, once: the file `flag` says that it has happened."""

    def wrap(read):
        def read_or_die(self, where):
            if where == (step, micro) and get_worker_info() and not Path(flag).exists():
                Path(flag).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return read(self, where)

        return read_or_die

    read_batches(wrap)


def record_batches(path: str) -> None:
    """No fault: append the number of each batch that is read to a file."""

    def wrap(read):
        def read_and_record(self, where):
            batch, micro = where
            if micro == 0:
                with open(path, "a") as file:
                    print(batch, file=file)
            return read(self, where)

        return read_and_record

    read_batches(wrap)


# ---- steps ----


def nan_gradients(calls: Sequence[int], only_rank: int = 0) -> None:
    """One rank's gradient is NaN in these calls of forward_backward, counted from 1."""
    if rank() != only_rank:
        return
    forward_backward, count = train_accelerate.forward_backward, 0

    def poisoned_forward_backward(accelerator, model, *args):
        nonlocal count
        count += 1
        if count not in calls:
            return forward_backward(accelerator, model, *args)
        handle = next(model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
        result = forward_backward(accelerator, model, *args)
        handle.remove()
        return result

    train_accelerate.forward_backward = poisoned_forward_backward


def broken_weights(after_step: int) -> None:
    """An element of the embeddings becomes infinite after this step, behind the guard's back."""
    save = Checkpoints.save

    def break_and_save(self, state):
        if state["step"] > after_step:
            with torch.no_grad():
                self.model.transformer.wte.weight[0, 0] = float("inf")
        save(self, state)

    Checkpoints.save = break_and_save


def nan_losses() -> None:
    """The loss of every step is NaN."""
    agree = train_accelerate.agree

    def agree_on_nan(*args):
        _, grad_norm, stopping = agree(*args)
        return float("nan"), grad_norm, stopping

    train_accelerate.agree = agree_on_nan


def loss_scale(scale: float) -> None:
    """fp16 begins with this loss scale; a large one overflows."""
    build_accelerator = train_accelerate.build_accelerator

    def build_and_scale(recipe):
        accelerator = build_accelerator(recipe)
        accelerator.scaler.load_state_dict(accelerator.scaler.state_dict() | {"scale": scale})
        return accelerator

    train_accelerate.build_accelerator = build_and_scale


def print_order_of_a_step() -> None:
    """No fault: print <lr> when the learning rate is set, <backward> when a backward pass begins."""
    set_lr, backward = train_accelerate.set_lr, Accelerator.backward

    def print_and_set_lr(optimizers, lr):
        print("<lr>", flush=True)
        return set_lr(optimizers, lr)

    def print_and_backward(self, loss: torch.Tensor):
        print("<backward>", flush=True)
        backward(self, loss)

    train_accelerate.set_lr, Accelerator.backward = print_and_set_lr, print_and_backward


if __name__ == "__main__":
    _, fault, arguments, *flags = sys.argv
    globals()[fault](**json.loads(arguments))
    sys.argv = ["train_accelerate.py", *flags]
    run_script(train_accelerate.main)
