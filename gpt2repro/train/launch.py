"""Starting a run: the Accelerator, and the lock and records of the output directory."""

import dataclasses
import re
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from gpt2repro.data.mixture import RunData
from gpt2repro.errors import UserError, refuse, report_write_errors
from gpt2repro.evaluation.score_cache import model_folder, model_sha256
from gpt2repro.models.find import find_model
from gpt2repro.processes import (
    cpu_asked,
    device_name,
    keep_freed_memory,
    note_missing_processes,
    on_main,
    use_all_cores,
    world_size,
)
from gpt2repro.recipe import Recipe
from gpt2repro.run_folder import RunFolder
from gpt2repro.train.attention import attention_problems
from gpt2repro.train.command_line import output_problems
from gpt2repro.train.recipe_change import RecipeChange
from gpt2repro.train.rendezvous import join
from gpt2repro.train.report import provenance
from gpt2repro.train.tracker import start_tracker


def build_accelerator(recipe: Recipe) -> Accelerator:
    """The Accelerator, with the world size, device and precision that the launcher and its config set.

    Raises:
        UserError: this launch cannot run the recipe, or its processes do not come together.
    """
    note_missing_processes()
    join(recipe)
    accumulation = 1 if recipe.micro_batch_size == "auto" else recipe.accumulation(world_size(), batch=0)
    accelerator = Accelerator(
        cpu=cpu_asked(),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False),
        dynamo_backend="inductor" if recipe.compile else None,
        log_with=None if recipe.report_to == "none" else recipe.report_to,
        project_dir=recipe.output_dir,
    )
    if accelerator.num_processes != world_size():
        raise UserError(
            f"WORLD_SIZE={world_size()}, but accelerate runs {accelerator.num_processes} process(es); "
            "start the run with `accelerate launch` or torchrun"
        )
    if not recipe.eval_only:  # which takes torch's default
        device_type, precision = accelerator.device.type, accelerator.mixed_precision
        on_main(lambda: refuse(attention_problems(recipe.attention, device_type, precision)))  # all ranks have them
    if accelerator.device.type == "cpu":
        use_all_cores()
        keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if accelerator.is_fsdp2:  # float32 weights and autocast, as with DDP; accelerate's policy gives a 16-bit loss
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # it accumulates and clips gradients itself
        accelerator.state.deepspeed_plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=recipe.micro_batch_size,
            gradient_accumulation_steps=accumulation,
            gradient_clipping=recipe.max_grad_norm,
        )
    return accelerator


def begin_run(recipe: Recipe, data: RunData, accelerator: Accelerator) -> RunFolder:
    """Verify the data, lock the output directory, write recipe.yaml at the first start or record there what has changed
    since, and start the tracker.

    Returns:
        The folder, locked by the main process.

    Raises:
        UserError: this rank has other data than the main process, or with verify_data a damaged shard.
        SharedError: a shard has changed, another run holds the directory or has begun there with another recipe, or
            the tracker does not start.
    """
    folder = RunFolder(recipe.output_dir)
    accelerator.wait_for_everyone()  # all ranks check the directory before the main process writes to it
    _refuse_other_data(data)
    hardware = f"{accelerator.num_processes} x {device_name(accelerator.device)}"

    is_copy_of_another_machine = accelerator.is_local_main_process and not accelerator.is_main_process
    if recipe.verify_data and is_copy_of_another_machine:
        data.verify_changed({})

    def begin() -> None:
        verified = {} if folder.is_untouched() else folder.read_verified()
        verified = data.verify_changed(verified, all_shards=recipe.verify_data)
        with report_write_errors(folder.path):
            folder.lock()
            refuse(output_problems(recipe, folder, data))  # again: another run may have begun here meanwhile
            if folder.is_untouched():
                _report_assumed_tokenizers(data)
                folder.write_record(run_record(recipe, data, hardware))
            else:
                refuse(base_problems(recipe, folder.read_record()))
                RecipeChange.between(folder.read_record(), recipe, folder).apply(folder)
            folder.write_verified(verified)
        start_tracker(recipe, folder.read_record().get("run_id"), accelerator)

    on_main(begin)
    return folder


def run_record(recipe: Recipe, data: RunData, hardware: str) -> dict:
    """The content of recipe.yaml: the resolved recipe, the data, hardware and software, and the run's id."""
    output_dir = Path(recipe.output_dir)
    is_local = recipe.init_from == "scratch" or Path(recipe.init_from).exists()
    plain_name = re.sub(r"[^\w.-]", "-", output_dir.name)
    return {
        **run_settings(recipe, data),
        "base_model": None if is_local else recipe.init_from,  # a Hub id
        **({"base_sha256": base_sha256(recipe)} if recipe.lora_rank else {}),
        "hardware": hardware,
        "versions": provenance(),
        "run_id": f"{plain_name}-{uuid4().hex[:8]}",
    }


def base_sha256(recipe: Recipe) -> str | None:
    """Hash of the model that LoRA adapts, which the run's checkpoints do not hold."""
    base = model_folder(find_model(recipe.init_from))
    return None if base is None else model_sha256(base)


def base_problems(recipe: Recipe, record: dict[str, Any]) -> list[str]:
    """One line if init_from is no longer the model that the run's adapter was begun with."""
    if not recipe.lora_rank or record.get("base_sha256") == base_sha256(recipe):
        return []
    return [
        f"init_from={recipe.init_from} has changed since this run began, whose adapter fits the old one only; restore "
        "it, or choose another --output_dir"
    ]


def run_settings(recipe: Recipe, data: RunData) -> dict[str, Any]:
    """The part of the record that follows from the command alone."""
    return {
        **dataclasses.asdict(recipe),
        "resume": True,  # these four are not settings but concern one start
        "extend": False,
        "override_recipe": False,
        "verify_data": False,
        "corpus": data.name,  # the recipe's may be another one's, if --data_dir was given
        "data": data.record(),
    }


def _refuse_other_data(data: RunData) -> None:
    """Machines without a shared file system may have different copies of the data."""
    expected = on_main(lambda: data.fingerprint)
    if data.fingerprint != expected:
        raise UserError(
            f"this rank's data has the fingerprint {data.fingerprint}, the main process's {expected}; copy the same "
            "prepared directory to every machine"
        )


def _report_assumed_tokenizers(data: RunData) -> None:
    for source in data.sources:
        if not source.manifest.tokenizer.sha256:
            print(f"{source.directory} has no tokenizer; GPT-2's is assumed", flush=True)
