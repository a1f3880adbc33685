"""Atomic, asynchronous checkpoints: complete or absent, verified on resume, independent of the world size.

checkpoints/step_00001000/ holds model.safetensors, optimizer.safetensors and trainer_state.json; the model's
configuration and tokenizer, so that it opens like a model folder; and hashes.json, the sha256 of each file. With LoRA
it holds the adapter alone, in PEFT's format, and opens together with its base model. Nothing is pickled. Training
pauses only while the tensors are copied; a thread of the main process writes them. Only the main process touches the
disk. On resume it broadcasts what it reads to all ranks, whether they hold the full model (DDP) or a shard of it
(FSDP2), on this machine or another.
"""

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

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
from transformers import GenerationConfig

from gpt2repro.data.tokenization import save_tokenizer
from gpt2repro.errors import UserError, first_line, write_remedy
from gpt2repro.files import delete, delete_folder, delete_unfinished, file_sha256, flush, new_folder
from gpt2repro.models.generation_defaults import load_generation_defaults
from gpt2repro.models.lora import lora_of, save_adapter, saved_name
from gpt2repro.processes import on_main
from gpt2repro.recipe import Recipe
from gpt2repro.run_folder import RunFolder, checkpoint_step
from gpt2repro.train.checkpoint_files import (
    HASHES,
    MODEL,
    OPTIMIZER,
    STATE,
    find_damage,
    read_intact_state,
    read_state,
    weights_file,
)
from gpt2repro.train.early_stopping import best_first


Tensors = dict[str, torch.Tensor]  # by the parameter's name


class Checkpoints:
    """Saves and restores a run. All ranks make the same calls.

    Args:
        model: the raw model whose parameters are trained, sharded or not.
        optimizers: the raw ones, without accelerate's wrappers.
        tokenizer: saved with the model.
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
        self.lora = lora_of(model)
        # What is trained; a tied head has no name of its own.
        self.shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
        self.folder = RunFolder(recipe.output_dir)
        self.uses_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.writer: Thread | None = None
        self.failure: str | None = None  # why the last save failed, and what to do about it

    # ---- saving ----

    def save(self, state: dict[str, Any]) -> None:
        """Save model, optimizers and `state` as the checkpoint of step state["step"], asynchronously.

        Returns as soon as the tensors are copied. A thread of the main process writes the copy under a temporary name,
        flushes it and renames it; only then are older checkpoints deleted, so a crash at any moment leaves at least as
        many good checkpoints as before. A failure to write, e.g. a full disk, is reported, and training continues.
        """
        self.wait()
        if self.uses_deepspeed:
            self._save_with_deepspeed(state)
            return
        weights, moments = self._full_tensors()
        if not self.accelerator.is_main_process:
            return
        weights = {name: self._copy(tensor) for name, tensor in weights.items()}
        moments = {name: self._copy(tensor) for name, tensor in moments.items()}
        state = copy.deepcopy(state)
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        self.writer = Thread(target=self._write, args=(weights, moments, state))
        self.writer.start()

    def _full_tensors(self) -> tuple[Tensors, Tensors]:
        """Gather the weights, and the optimizers' tensors as PARAMETER.KEY, on the main process. All ranks call it."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.model, options=options)
        optimizer_state: dict[str, Any] = {"state": {}}
        if all(optimizer.state for optimizer in self.optimizers):  # torch would run a step to fill an empty state
            optimizer_state = get_optimizer_state_dict(self.model, self.optimizers, options=options)
        if not self.accelerator.is_main_process:
            return {}, {}
        moments = {
            f"{name}.{key}": tensor
            for name, of_parameter in optimizer_state["state"].items()
            for key, tensor in of_parameter.items()
        }
        return {name: weights[name] for name in self.shapes}, moments

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that training no longer changes. On the CPU the "offloaded" ones are the live ones; so are, beside a
        GPU, the step counts of an optimizer that keeps them on the CPU."""
        is_live = self.accelerator.device.type == "cpu" or tensor.dim() == 0
        return tensor.clone() if is_live else tensor

    def wait(self) -> None:
        """Block until the checkpoint that is being written is on disk."""
        if self.writer is not None:
            self.writer.join()
            self.writer = None

    def close(self) -> None:
        """Block on all ranks until the main process has written its last checkpoint. After that any rank may exit.

        Raises:
            SharedError: the last save failed.
        """
        self.wait()

        def raise_failure() -> None:
            if self.failure:
                raise UserError(self.failure)

        on_main(raise_failure)

    def _write(self, weights: Tensors, moments: Tensors, state: dict[str, Any]) -> None:
        broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
        if broken:
            self.say(f"no checkpoint at step {state['step']:,}: {', '.join(broken[:3])} is not finite; older ones stay")
            return
        try:
            delete_unfinished(self.folder.checkpoints)
            if self.folder.metrics.exists():
                flush(self.folder.metrics)  # a resumed run will not log the rows before this checkpoint again
            with new_folder(self.folder.checkpoint(state["step"])) as folder:
                if self.lora is not None:
                    save_adapter(folder, self.lora, weights)
                else:
                    save_file(weights, folder / MODEL, metadata={"format": "pt"})
                save_file(moments, folder / OPTIMIZER)
                self._write_metadata(folder, state)
            self.failure = None
        except Exception as error:  # an OSError, a SafetensorError, or tokenizers' plain Exception
            failure = f"the checkpoint at step {state['step']:,} could not be written ({first_line(error)})"
            self.say(f"{failure}; training continues")
            self.failure = f"{failure}; {write_remedy(error)}"
            return
        try:
            self._rotate()
        except OSError as error:
            self.say(f"older checkpoints could not be deleted ({first_line(error)}); training continues")

    def _save_with_deepspeed(self, state: dict[str, Any]) -> None:
        """DeepSpeed writes its own optimizer shards, from every rank; only the same world size can resume from them."""
        main = self.accelerator.is_main_process
        if main:
            delete_unfinished(self.folder.checkpoints)
        with contextlib.ExitStack() as stack:
            target = self.folder.checkpoint(state["step"])
            if main:
                stack.enter_context(new_folder(target))
            self.accelerator.wait_for_everyone()
            folder = target.with_name(f"writing_{target.name}")
            self.accelerator.save_state(str(folder))
            self.accelerator.wait_for_everyone()
            if main:
                self._write_metadata(folder, state)
        if main:
            self._rotate()

    def _write_metadata(self, folder: Path, state: dict[str, Any]) -> None:
        """Write everything but the tensors; last, the hashes of all files."""
        (folder / STATE).write_text(json.dumps(state) + "\n")
        self.model.config.save_pretrained(folder)
        self.model.generation_config.save_pretrained(folder)
        save_tokenizer(folder, self.tokenizer)
        files = [path for path in folder.rglob("*") if path.is_file()]
        hashes = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
        (folder / HASHES).write_text(json.dumps(hashes, indent=2) + "\n")

    def _rotate(self) -> None:
        """Delete all checkpoints but the newest keep_last, every keep_every-th step, the best validated one, and with
        lr_schedule=wsd the newest before the decay, from which the run can be extended."""
        found = self.folder.complete_checkpoints()
        kept = set(found[-self.recipe.keep_last :])
        kept.update(self._best_first()[:1])
        if self.recipe.lr_schedule == "wsd":
            before_decay = [path for path in found if checkpoint_step(path) <= self.recipe.wsd_decay_start]
            kept.update(before_decay[-1:])
        if self.recipe.keep_every:
            kept.update(path for path in found if checkpoint_step(path) % self.recipe.keep_every == 0)
        for checkpoint in found:
            if checkpoint not in kept:
                delete_folder(checkpoint)

    # ---- restoring ----

    def restore(self, best: bool = False) -> dict[str, Any] | None:
        """Load the newest intact checkpoint, or the one with the best validation loss, into model and optimizers.

        Damaged checkpoints are reported and renamed to damaged_step_..., and the next one is tried.

        Returns:
            The `state` that was saved with it; None if there is no checkpoint.
        Raises:
            SharedError: all are damaged, in which case none is renamed; or the checkpoint is another model's.
        """
        self.wait()
        weights: Tensors = {}  # filled on the main process, which broadcasts them
        moments: dict[str, Tensors] = {}

        def read() -> tuple[Path, dict[str, Any], bool, GenerationConfig] | None:
            candidates = self._best_first() if best else self.folder.complete_checkpoints()[::-1]
            checkpoint = self._first_intact(candidates)
            if checkpoint is None:
                return None
            if not self.uses_deepspeed:
                read_weights, read_moments = self._read(checkpoint)
                weights.update(read_weights)
                moments.update(read_moments)
            generation_config = load_generation_defaults(checkpoint, self.model.config)
            return checkpoint, read_state(checkpoint), bool(moments), generation_config

        found = on_main(read)
        if found is None:
            return None
        checkpoint, state, has_moments, self.model.generation_config = found
        if self.uses_deepspeed:
            self.accelerator.load_state(str(checkpoint))
            self.accelerator.step = 0  # accelerate counts micro-batches; no checkpoint lies inside a step
            return state
        self._load(weights, moments, has_moments)
        if "scaler" in state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return state

    def _load(self, weights: Tensors, moments: dict[str, Tensors], has_moments: bool) -> None:
        """Broadcast the main process's tensors into model and optimizers. All ranks call it."""
        several = self.accelerator.num_processes > 1
        # Not strict, because a tied head, and what LoRA has frozen, are in the model but not in the file.
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several, strict=False)
        set_model_state_dict(self.model, weights, options=options)
        for optimizer in self.optimizers:
            optimizer.state.clear()
        if has_moments:
            # Everything that is not a tensor, e.g. the learning rate, comes from the recipe.
            groups = get_optimizer_state_dict(self.model, self.optimizers)["param_groups"]
            state = {"state": moments, "param_groups": groups} if self.accelerator.is_main_process else {}
            set_optimizer_state_dict(self.model, self.optimizers, state, options=options)

    def _first_intact(self, candidates: list[Path]) -> Path | None:
        """The first intact candidate. If there is one, the damaged ones before it are renamed."""
        problems: dict[Path, str] = {}
        for checkpoint in candidates:
            problem = find_damage(checkpoint)
            if problem is None:
                self._set_aside(problems, taken=checkpoint)
                return checkpoint
            problems[checkpoint] = problem
        if problems:
            first_problem = next(iter(problems.values()))
            raise UserError(
                f"no checkpoint in {self.folder.checkpoints} is intact ({first_problem}); to start over, delete "
                f"{self.recipe.output_dir}"
            )
        return None

    def _set_aside(self, problems: dict[Path, str], taken: Path) -> None:
        for damaged, problem in problems.items():
            aside = damaged.with_name(f"damaged_{damaged.name}")
            delete(aside)
            damaged.rename(aside)
            self.say(f"{damaged} is damaged ({problem}); renamed to {aside.name}, using {taken.name} instead")

    def _best_first(self) -> list[Path]:
        """The checkpoints with a validation loss, best first."""
        val_losses: dict[int, float] = {}
        for checkpoint in self.folder.complete_checkpoints():
            state = read_intact_state(checkpoint)
            if state is not None and state["val_loss"] is not None:
                val_losses[checkpoint_step(checkpoint)] = state["val_loss"]
        return [self.folder.checkpoint(step) for step in best_first(val_losses)]

    def _read(self, checkpoint: Path) -> tuple[Tensors, dict[str, Tensors]]:
        """The weights, and the optimizer tensors of each parameter, which are empty before the first update."""
        weights = load_file(weights_file(checkpoint))
        if self.lora is not None:
            weights = {name: weights[saved_name(name)] for name in self.shapes if saved_name(name) in weights}
        moments: dict[str, Tensors] = {}
        for name, tensor in load_file(checkpoint / OPTIMIZER).items():
            parameter, _, key = name.rpartition(".")
            moments.setdefault(parameter, {})[key] = tensor
        found = {name: tensor.shape for name, tensor in weights.items()}
        has_same_moments = not moments or moments.keys() == self.shapes.keys()
        if found != self.shapes or not has_same_moments:
            raise UserError(f"{checkpoint} holds another model; choose another --output_dir")
        return weights, moments
