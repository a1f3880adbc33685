"""`micro_batch_size: auto`: the largest micro-batch that the planner's formula fits into the memory that is free, tried
before the first step.

The trial takes the raw model forward and backward, in the run's precision, beside as many bytes as the formula has for
what the run adds: optimizer state and communication buffers. It does not compile, which takes minutes for each size;
the formula takes the memory of a compiled step to be the same. A model that FSDP2 shards is not tried: a rank alone
would hold it whole, and one that runs out of memory amid the others' collectives would leave them waiting.
"""

import dataclasses

import psutil
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import PreTrainedModel

from gpt2repro.errors import SharedError
from gpt2repro.plan.memory import (
    CPU_SHARE,
    Setup,
    capacity,
    communication_bytes,
    optimizer_bytes,
    peak_memory,
)
from gpt2repro.plan.sizes import Sizes
from gpt2repro.processes import local_world_size, on_main
from gpt2repro.recipe import Recipe, divisors
from gpt2repro.run_folder import RunFolder
from gpt2repro.train.checkpoint_files import read_intact_state


MIB, GIB = 2**20, 2**30


def fix_micro_batch_size(recipe: Recipe, model: PreTrainedModel, accelerator: Accelerator) -> Recipe:
    """The recipe with a number in place of `auto`, the same on all ranks, which is printed with its reason. A run that
    is resumed keeps its number, as long as that divides the batch.

    Weights, gradients and random numbers are left as they were: the run is the one with that number given by hand.

    Args:
        model: as `build_model` returns it; a trial moves it to the device.
    Raises:
        SharedError: not even one sequence fits; or DeepSpeed trains, of whose memory the planner knows nothing.
    """
    if recipe.micro_batch_size != "auto":
        return recipe
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise SharedError("micro_batch_size=auto does not know what DeepSpeed holds; give a number, or use FSDP2")
    unit = recipe.sequence_length * accelerator.num_processes
    sequences = recipe.global_batch_tokens // unit  # of a rank and step
    candidates = divisors((recipe.batch_ramp_start or recipe.global_batch_tokens) // unit)
    size, why = on_main(lambda: used_before(recipe)), "as this run has had before"
    if size not in candidates:
        size, why = choose(candidates, sequences, recipe, model, accelerator)
    accelerator.print(
        f"micro_batch_size=auto: {size} sequences x {sequences // size} (accumulation), {why}", flush=True
    )
    return dataclasses.replace(recipe, micro_batch_size=size)


def used_before(recipe: Recipe) -> int | None:
    """The micro-batch size that the newest checkpoint was trained with or, without one, that recipe.yaml records; None:
    there is no run to resume."""
    folder = RunFolder(recipe.output_dir)
    if recipe.eval_only or folder.is_untouched():
        return None
    newest = folder.latest_checkpoint()
    state = read_intact_state(newest) if newest else {"recipe": folder.read_record()}
    return (state or {}).get("recipe", {}).get("micro_batch_size")  # a version before did not record it


def choose(
    candidates: list[int], sequences: int, recipe: Recipe, model: PreTrainedModel, accelerator: Accelerator
) -> tuple[int, str]:
    """The largest candidate that fits on every rank, and why it was taken.

    Args:
        sequences: of a rank and step, by all its micro-batches.
    Raises:
        SharedError: none fits.
    """
    accelerator.wait_for_everyone()  # every rank has built its model: on a CPU they share the memory
    sizes, setup = Sizes.of(model.config.to_dict()), setup_of(recipe, accelerator)
    room = free_for_tensors(accelerator.device)

    def peak(size: int) -> float:
        accumulated = dataclasses.replace(setup, micro_batch_size=size, accumulation=sequences // size)
        return peak_memory(sizes, accumulated).total

    planned = [size for size in candidates if peak(size) <= room]
    size = largest = max(planned, default=0)
    if not setup.is_sharded:
        to_come = optimizer_bytes(sizes, setup) + communication_bytes(sizes, setup)
        size = largest_that_runs(planned, sequences, recipe.sequence_length, int(to_come), model, accelerator)
    size, largest, room = min(gather_object([(size, largest, room)]))  # of the rank that has the least
    if size == 0:
        tried = f"; {largest} were planned, and ran out of memory down to 1" if largest else ""
        raise SharedError(
            f"micro_batch_size=auto: one sequence of {recipe.sequence_length} tokens needs {peak(1) / GIB:.2f} GiB by "
            f"the planner's formula, and {room / GIB:.2f} GiB are free{tried}; {remedy(recipe)}"
        )
    if size < largest:
        return size, f"the most that ran: {largest} were planned, and ran out of memory"
    tried = "not tried, as FSDP2 shards the model" if setup.is_sharded else "which a trial has confirmed"
    return size, f"planned to take {peak(size) / GIB:.2f} of {room / GIB:.2f} GiB, {tried}"


def remedy(recipe: Recipe) -> str:
    """What takes less memory than one sequence of this recipe in training, with which --eval_only is measured, too."""
    if recipe.eval_only:
        return "give a number, as losses alone take less than a training step"
    recompute = "" if recipe.gradient_checkpointing else "pass --gradient_checkpointing true, "
    return f"{recompute}shorten --sequence_length, train a smaller model, or shard it with FSDP2"


def setup_of(recipe: Recipe, accelerator: Accelerator) -> Setup:
    """What the planner has to know of this launch; the micro-batch is still open."""
    mesh, processes = accelerator.parallelism_config, accelerator.num_processes
    is_sharded = accelerator.distributed_type == DistributedType.FSDP
    shards = processes if mesh is None else mesh.dp_shard_size
    return Setup.of(
        recipe,
        micro_batch_size=1,
        strategy="fsdp2" if is_sharded else "ddp",
        num_gpus=processes,
        shards=shards if is_sharded else 1,
        half=accelerator.mixed_precision != "no",
        device="cpu" if accelerator.device.type == "cpu" else "cuda",
    )


def free_for_tensors(device: torch.device) -> float:
    """Bytes of the device's free memory that this process's tensors can fill."""
    if device.type == "cpu":
        return CPU_SHARE * psutil.virtual_memory().available / local_world_size()
    if device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    else:
        free, _ = torch.get_device_module(device).mem_get_info(device)
    return capacity(free // MIB)


# ---- the trial ----


def largest_that_runs(
    planned: list[int],
    sequences: int,
    sequence_length: int,
    bytes_to_come: int,
    model: PreTrainedModel,
    accelerator: Accelerator,
) -> int:
    """The largest of the planned sizes with which this rank gets through a step; 0: none, or none is planned.

    Args:
        bytes_to_come: what the run will hold beside the trial's weights, activations and gradients.
    """
    device, was_training = accelerator.device, model.training
    model.to(device).train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for size in reversed(planned):
            n_micro_batches = min(2, sequences // size)  # from the second on, the gradients are there from the start
            if runs(size, n_micro_batches, sequence_length, bytes_to_come, model, accelerator):
                break
            forget(model)
        else:
            size = 0
    forget(model)
    model.train(was_training)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # what the run logs is its own
    return size


def runs(
    size: int,
    n_micro_batches: int,
    sequence_length: int,
    bytes_to_come: int,
    model: PreTrainedModel,
    accelerator: Accelerator,
) -> bool:
    """Whether the memory suffices for the gradients of this many micro-batches of `size` sequences."""
    device = accelerator.device
    try:
        to_come = torch.empty(bytes_to_come, dtype=torch.uint8, device=device)
        tokens = torch.arange(size * sequence_length, device=device).view(size, -1) % model.config.unpadded_vocab_size
        for _ in range(n_micro_batches):
            with accelerator.autocast():
                loss = model(input_ids=tokens, shift_labels=tokens, use_cache=False).loss
            loss.backward()
        del to_come
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        return False
    return True


def forget(model: PreTrainedModel) -> None:
    """Free what a trial leaves behind."""
    model.zero_grad()
    clear_device_cache(garbage_collection=True)
