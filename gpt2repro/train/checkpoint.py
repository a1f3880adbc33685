"""Checkpoints that are complete or absent, whole or refused, and of no particular number of processes.

checkpoints/step_00001000/ holds model.safetensors, optimizer.safetensors, trainer_state.json, the configuration of the
model and its tokenizer, so that it opens as a model folder does, and hashes.json with the sha256 of each file. Nothing
in it is pickled. The main process alone reads and writes; what it reads it hands to the others, whether
they hold the model whole (DistributedDataParallel) or in shards (FSDP2), on this machine or on another.
"""

import contextlib
import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from gpt2repro.data.shards import file_problem, file_sha256, flush
from gpt2repro.errors import MAKE_SPACE, UserError, first_line
from gpt2repro.processes import on_main
from gpt2repro.recipe import Recipe


MODEL, OPTIMIZER, STATE, HASHES = "model.safetensors", "optimizer.safetensors", "trainer_state.json", "hashes.json"


def complete(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    return sorted((Path(output_dir) / "checkpoints").glob("step_*"))


def latest(output_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    return next(reversed(complete(output_dir)), None)


def read_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / STATE).read_text())


def damage(checkpoint: Path, only: str | None = None) -> str | None:
    """What is wrong with a checkpoint, or with one file of it: missing, or not what was written; None: it is whole."""
    try:
        hashes = json.loads((checkpoint / HASHES).read_text())
    except (OSError, ValueError) as error:
        return f"{HASHES} cannot be read: {first_line(error)}"
    asked = hashes if only is None else {only: hashes.get(only)}
    problems = (file_problem(checkpoint / name, sha256, f"the one in {HASHES}") for name, sha256 in asked.items())
    return next(filter(None, problems), None)


class Checkpoints:
    """Saves and restores a run; all processes call it alike.

    Args:
        model: the bare model whose parameters are trained, sharded or not.
        optimizers: bare too, i.e. not accelerate's wrappers.
        tokenizer: saved along.
        say: prints a line.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizers: list[torch.optim.Optimizer],
        tokenizer,
        say: Callable[[str], None],
    ):
        self.recipe, self.accelerator, self.say = recipe, accelerator, say
        self.model, self.optimizers, self.tokenizer = model, optimizers, tokenizer
        self.names = [name for name, _ in model.named_parameters()]  # a tied head has no name of its own
        self.root = Path(recipe.output_dir) / "checkpoints"
        self.writer: Thread | None = None
        self.failure: str | None = None  # why the last save failed

    # ---- saving ----

    def save(self, state: dict) -> None:
        """Save model, optimizers and `state` as checkpoints/step_{state["step"]}.

        Returns as soon as they are copied; a thread of the main process writes the copy under another name, flushes it
        and renames it. Only then are older ones removed, so a crash at any moment leaves at least as many good
        checkpoints as before. If it cannot be written, e.g. as the disk is full, that is said and training goes on.
        """
        self.wait()
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return self._save_with_deepspeed(state)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)  # whole tensors, to the main process
        weights = get_model_state_dict(self.model, options=options)
        optimizer_state: dict = {"state": {}}
        if all(optimizer.state for optimizer in self.optimizers):  # else torch would make a step to have some
            optimizer_state = get_optimizer_state_dict(self.model, self.optimizers, options=options)
        if not self.accelerator.is_main_process:
            return
        weights = {name: weights[name] for name in self.names}
        of_each = optimizer_state["state"].items()
        moments = {f"{name}.{key}": value for name, of_one in of_each for key, value in of_one.items()}
        if self.accelerator.device.type == "cpu":  # they are still the tensors that training changes
            weights, moments = ({k: v.clone() for k, v in tensors.items()} for tensors in (weights, moments))
        if self.accelerator.scaler is not None:
            state = state | {"scaler": self.accelerator.scaler.state_dict()}
        self.writer = Thread(target=self._write, args=(weights, moments, copy.deepcopy(state)))
        self.writer.start()

    def wait(self) -> None:
        """Until what is being saved is on disk."""
        if self.writer is not None:
            self.writer.join()
            self.writer = None

    def close(self) -> None:
        """Until the main process has written; then any process may end.

        Raises:
            SharedError: the last save failed.
        """
        self.wait()

        def complain() -> None:
            if self.failure:
                raise UserError(f"{self.failure}; {MAKE_SPACE}")

        on_main(complain)

    def _write(self, weights: dict, moments: dict, state: dict) -> None:
        temporary = self._temporary(state)
        try:
            self._begin(temporary)
            save_file(weights, temporary / MODEL, metadata={"format": "pt"})
            save_file(moments, temporary / OPTIMIZER)
            self._complete(temporary, state)
            self.failure = None
        except Exception as error:  # an OSError, a SafetensorError, or what tokenizers raises: a plain Exception
            self.failure = f"the checkpoint at step {state['step']:,} could not be written ({first_line(error)})"
            self.say(f"{self.failure}; training goes on")
            shutil.rmtree(temporary, ignore_errors=True)

    def _save_with_deepspeed(self, state: dict) -> None:
        """DeepSpeed has its own shards of the optimizer: they are written as they are, by all, and only as many
        processes can go on with them."""
        temporary = self._temporary(state)
        if self.accelerator.is_main_process:
            self._begin(temporary)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._complete(temporary, state)

    def _temporary(self, state: dict) -> Path:
        return self.root / f"writing_step_{state['step']:08d}"

    def _begin(self, temporary: Path) -> None:
        for unfinished in (*self.root.glob("writing_*"), *self.root.glob("removing_*")):
            shutil.rmtree(unfinished, ignore_errors=True)  # NFS keeps what somebody has open
        temporary.mkdir(parents=True)

    def _complete(self, temporary: Path, state: dict) -> None:
        (temporary / STATE).write_text(json.dumps(state) + "\n")
        self.model.config.save_pretrained(temporary)
        self.tokenizer.save_pretrained(temporary)
        files = [path for path in temporary.rglob("*") if path.is_file()]
        hashes = {path.relative_to(temporary).as_posix(): file_sha256(path) for path in files}
        (temporary / HASHES).write_text(json.dumps(hashes, indent=2) + "\n")
        for path in (*temporary.rglob("*"), temporary):
            flush(path)
        temporary.rename(self.root / temporary.name.removeprefix("writing_"))
        flush(self.root)
        self._remove_old()

    def _remove_old(self) -> None:
        """All but the last keep_last, every keep_every-th step, and the one with the best validation loss."""
        found = complete(self.recipe.output_dir)
        kept = set(found[-self.recipe.keep_last :])
        if every := self.recipe.keep_every:
            kept |= {checkpoint for checkpoint in found if int(checkpoint.name.removeprefix("step_")) % every == 0}
        for old in set(found) - kept - {*self._best_first()[:1]}:
            shutil.rmtree(old.rename(old.with_name(f"removing_{old.name}")), ignore_errors=True)

    # ---- restoring ----

    def restore(self, best: bool = False) -> dict | None:
        """Load the newest whole checkpoint, or the one with the best validation loss, into model and optimizers.

        One that is damaged is named and set aside as damaged_step_...; the next is taken.

        Returns:
            The `state` that was saved with it; None where there is none.
        Raises:
            SharedError: all are damaged, of which none is then set aside; or it is of another model.
        """
        self.wait()
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        weights: dict = {}  # of the main process, which hands them out
        moments: dict = {}

        def find() -> tuple[Path, dict, bool] | None:
            candidates = self._best_first() if best else complete(self.recipe.output_dir)[::-1]
            if not (checkpoint := self._first_whole(candidates)):
                return None
            if not deepspeed:
                read_weights, read_moments = self._read(checkpoint)
                weights.update(read_weights)
                moments.update(read_moments)
            return checkpoint, read_state(checkpoint), bool(moments)

        if (found := on_main(find)) is None:
            return None
        checkpoint, state, has_moments = found
        if deepspeed:
            self.accelerator.load_state(str(checkpoint))
            self.accelerator.step = 0  # the count of micro-batches: a checkpoint lies between two steps
            return state
        several = self.accelerator.num_processes > 1
        # Not strict: a tied head is in the model, and not in the file.
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several, strict=False)
        set_model_state_dict(self.model, weights, options=options)
        for optimizer in self.optimizers:
            optimizer.state.clear()
        if has_moments:
            # What is not a tensor, e.g. the learning rate, is the recipe's.
            groups = get_optimizer_state_dict(self.model, self.optimizers)["param_groups"]
            moments = {"state": moments, "param_groups": groups} if self.accelerator.is_main_process else {}
            set_optimizer_state_dict(self.model, self.optimizers, moments, options=options)
        if "scaler" in state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return state

    def _first_whole(self, candidates: list[Path]) -> Path | None:
        """The first that is whole; if there is one, those before it are set aside."""
        problems = {}
        for checkpoint in candidates:
            if (problem := damage(checkpoint)) is None:
                break
            problems[checkpoint] = problem
        else:
            if problems:
                raise UserError(
                    f"no checkpoint in {self.root} is whole ({next(iter(problems.values()))}); to start again, delete "
                    f"{self.recipe.output_dir}"
                )
            return None
        for damaged, problem in problems.items():
            aside = damaged.with_name(f"damaged_{damaged.name}")
            shutil.rmtree(aside, ignore_errors=True)
            damaged.rename(aside)
            self.say(f"{damaged} is not whole ({problem}); it is now {aside.name}, and {checkpoint.name} is taken")
        return checkpoint

    def _best_first(self) -> list[Path]:
        """The checkpoints that were validated, the lowest loss first."""
        losses = {}
        for checkpoint in complete(self.recipe.output_dir):
            with contextlib.suppress(OSError, ValueError):  # of a damaged one
                if (loss := read_state(checkpoint)["val_loss"]) is not None:
                    losses[checkpoint] = loss
        return sorted(losses, key=losses.__getitem__)

    def _read(self, checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
        """The weights, and the optimizers' state of each; of the latter nothing where no step was taken yet."""
        weights, flat = load_file(checkpoint / MODEL), load_file(checkpoint / OPTIMIZER)
        moments: dict[str, dict] = {}
        for name, value in flat.items():
            parameter, _, key = name.rpartition(".")
            moments.setdefault(parameter, {})[key] = value
        shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        same_moments = not moments or moments.keys() == shapes.keys()
        if {name: value.shape for name, value in weights.items()} != shapes or not same_moments:
            raise UserError(f"{checkpoint} holds another model; choose another --output_dir")
        return weights, moments
