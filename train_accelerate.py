"""Train GPT-2 on prepared token shards.

    accelerate launch train_accelerate.py                                         # recipes/demo.yaml, on a laptop
    accelerate launch --config_file accelerate_configs/ddp_8gpu.yaml train_accelerate.py \
        --config recipes/gpt2-124m-fineweb-edu.yaml [--field value ...]

The recipe says what to run; the accelerate config says how: device, processes, precision. The same command resumes a
run that was stopped. gpt2repro/recipe.py lists the recipe's fields, gpt2repro/run_folder.py the files in output_dir.
"""

import gpt2repro.launcher  # noqa: F401  watches the launcher while the rest is imported
from gpt2repro.errors import check_before_imports, refuse, report_write_errors, run_script
from gpt2repro.train.command_line import check_command_line


if __name__ == "__main__":
    check_before_imports(check_command_line)  # mistakes end here, before the seconds that the imports below take

# isort: split
import dataclasses
import functools
import logging
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from huggingface_hub import ModelCard
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from gpt2repro.data.batches import Batches, StepBatches
from gpt2repro.data.order import stateless_seed
from gpt2repro.evaluation.validation import validation_losses
from gpt2repro.files import write_bytes
from gpt2repro.hub.model_card import model_card
from gpt2repro.hub.upload import create_repository, upload
from gpt2repro.models.folder import rehearse_export, save_adapter_folder, save_model_folder
from gpt2repro.models.lora import add_lora, describe_lora, lora_of, merge_lora, new_lora
from gpt2repro.models.padding import without_padding
from gpt2repro.models.unwrap import full_tensor, unwrapped
from gpt2repro.processes import on_main
from gpt2repro.recipe import Recipe
from gpt2repro.run_folder import RunFolder
from gpt2repro.show.logged_run import LoggedRun
from gpt2repro.show.pictures import loss_picture
from gpt2repro.train.attention import TrainingAttention
from gpt2repro.train.checkpoint import Checkpoints
from gpt2repro.train.evaluations import Evaluations, load_hellaswag
from gpt2repro.train.launch import begin_run, build_accelerator, run_settings
from gpt2repro.train.metrics import read_metrics
from gpt2repro.train.micro_batch import fix_micro_batch_size
from gpt2repro.train.optimizers import build_optimizers, launch_problems, set_lr
from gpt2repro.train.preflight import Plan, resolve_and_check
from gpt2repro.train.report import baseline_loss, files_text, losses_text, write_report
from gpt2repro.train.run_state import RunState
from gpt2repro.train.schedule import lr_at
from gpt2repro.train.stopping import EXIT_CODE, StopRequest
from gpt2repro.train.telemetry import Telemetry
from modeling_gpt2repro import GPT2ReproForCausalLM


def main(argv: list[str]) -> None:
    plan = resolve_and_check(argv)
    accelerator = build_accelerator(plan.recipe)
    if plan.recipe.eval_only:
        return print_losses(plan, accelerator)

    # Build. Samples, checkpoints and the export use the raw model and optimizers, without accelerate's wrappers.
    hellaswag = load_hellaswag(plan)
    raw_model = build_model(plan)
    recipe = fix_micro_batch_size(plan.recipe, raw_model, accelerator)
    plan = dataclasses.replace(plan, recipe=recipe)
    raw_optimizers = build_optimizers(raw_model, recipe)
    model, optimizers = wrap(raw_model, raw_optimizers, recipe, accelerator)
    attention = TrainingAttention(recipe, plan.config, accelerator)
    stop_request = StopRequest(recipe.max_hours)
    check_hub_access(recipe)
    folder = begin_run(recipe, plan.data, accelerator)
    on_main(lambda: rehearse_export(raw_model, plan.tokenizer, card_maker(plan, folder)))

    # Restore.
    telemetry = Telemetry(recipe, accelerator, raw_model)
    run = RunState(recipe, telemetry)
    checkpoints = Checkpoints(recipe, accelerator, raw_model, raw_optimizers, plan.tokenizer, telemetry.say)
    batches = Batches(plan.data.train, recipe, accelerator, run.guard.batch)
    evaluations = Evaluations(plan, hellaswag, accelerator, model, raw_model, telemetry)
    if recipe.lora_rank:
        telemetry.say(describe_lora(raw_model))
    run.resume(checkpoints)
    evaluations.announce_reference()
    evaluations.before_first_step(run, checkpoints)
    model.train()
    while not run.finished:
        micro_batches = batches.of_step(run.step)
        lr = set_lr(optimizers, lr_at(run.step, recipe))
        with attention():
            loss, grad_norm = forward_backward(accelerator, model, micro_batches, recipe, run.step)
        loss, grad_norm, run.stopping = agree(accelerator, loss, grad_norm, stop_request)
        if run.guard.accepts(run.step, loss, grad_norm, accelerator.scaler):
            with telemetry.measuring_update(run.step):
                step_all(optimizers)
        zero_grad_all(optimizers)
        run.advance()
        telemetry.log_step(run.step, loss, lr, grad_norm, run.guard, batches.seconds_waited)
        if run.guard.gives_up:
            run.roll_back(checkpoints)
            continue
        with telemetry.paused():
            evaluations.run_due(run)
            if run.checkpoint_due:
                checkpoints.save(run.state_dict())

    # End.
    checkpoints.close()
    if run.stopping:
        stop_request.ignore_signals()  # a launcher ends the other ranks when one has exited; rank 0 reports first
    run.take_best(checkpoints)
    trained = unwrapped(raw_model)  # all ranks gather a sharded model
    # Free DDP while all ranks are still alive, and all that holds it: as the last owner of the process group it would
    # destroy it with the GIL, for which gloo may wait.
    del evaluations
    model, *optimizers = accelerator.free_memory(model, *optimizers)
    telemetry.close()
    if run.stopping:
        exit_resumable(run, accelerator)
    if accelerator.is_main_process:
        with report_write_errors(recipe.output_dir):
            finish(plan, folder, trained, run)
    folder.unlock()


# ---- one step ----


def forward_backward(
    accelerator: Accelerator,
    model: torch.nn.Module,
    micro_batches: StepBatches | list[torch.Tensor],
    recipe: Recipe,
    step: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute and clip the gradient of one global batch.

    Args:
        micro_batches: of this rank, (micro_batch_size, T + 1) int64 each; their number is the gradient accumulation.
        step: counted from 0.
    Returns:
        This rank's mean loss, () float32, nats per token; and the global gradient norm before clipping, ().
    """
    accelerator.gradient_accumulation_steps = len(micro_batches)
    accelerator.step = 0  # accelerate counts micro-batches to recognize the last one of a step
    losses = []
    for micro, tokens in enumerate(micro_batches):
        tokens = tokens.to(accelerator.device, non_blocking=True)
        # Dropout is a function of step, micro-batch and rank, so a resumed run drops what an uninterrupted one would.
        torch.manual_seed(stateless_seed(recipe.seed, step, micro, accelerator.process_index))
        with accelerator.accumulate(model):
            with accelerator.autocast():  # accelerator.prepare adds it to the model, except with FSDP2
                loss = model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:], use_cache=False).loss
            accelerator.backward(loss)  # divides by the accumulation
        losses.append(loss.detach())
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
    return torch.stack(losses).mean().float(), torch.as_tensor(full_tensor(grad_norm))


def agree(
    accelerator: Accelerator, loss: torch.Tensor, grad_norm: torch.Tensor, stop_request: StopRequest
) -> tuple[float, float, str | None]:
    """What all ranks must agree on. The only place of a step that waits for the device.

    Args:
        loss, grad_norm: (), as `forward_backward` returns them.
    Returns:
        The loss averaged over ranks, not finite if any rank's is not; the gradient norm, the same on every rank; and
        why to stop, if any rank must, else None.
    """
    must_stop = torch.full_like(loss, stop_request.reason is not None)
    shared = torch.stack([loss, grad_norm.to(loss), must_stop])
    mean_loss, mean_norm, share_of_stops = accelerator.reduce(shared, "mean").tolist()
    reason = stop_request.reason or "another process was told to stop"
    return mean_loss, mean_norm, reason if share_of_stops else None


def step_all(optimizers: list[AcceleratedOptimizer]) -> None:
    for optimizer in optimizers:
        optimizer.step()


def zero_grad_all(optimizers: list[AcceleratedOptimizer]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()


# ---- before the loop ----


def silence_libraries() -> None:
    """Hide warnings and progress bars that say nothing about this run."""
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)  # "Removed shared tensor": the head is tied
    disable_progress_bar()  # transformers' own, for reading and writing weights
    warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated")  # 5.17 has no other name


def build_model(plan: Plan) -> GPT2ReproForCausalLM:
    """The model to train, in float32, identical on all ranks. A resumed run loads its checkpoint's weights later, with
    lora_rank those of the adapter."""
    set_seed(plan.recipe.seed)
    if plan.pretrained is not None:
        model = plan.pretrained.build(plan.config, dtype=torch.float32)
    else:
        model = GPT2ReproForCausalLM(plan.config)
    if plan.recipe.lora_rank and plan.pretrained is not None:
        add_lora(model, new_lora(plan.recipe.lora_rank, plan.pretrained.source))
    if plan.recipe.attention == "eager":
        model.set_attn_implementation("eager")
    if plan.recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def check_hub_access(recipe: Recipe) -> None:
    """With push_to_hub, create the repository now, so that a missing permission ends the run before training."""
    if recipe.push_to_hub:
        on_main(lambda: create_repository(recipe.hub_model_id))


def wrap(
    raw_model: PreTrainedModel, raw_optimizers: list[torch.optim.Optimizer], recipe: Recipe, accelerator: Accelerator
) -> tuple[torch.nn.Module, list[AcceleratedOptimizer]]:
    """What accelerate makes of model and optimizers: distributed, compiled, in mixed precision.

    Raises:
        SharedError: the launch cannot run this recipe.
    """
    on_main(lambda: refuse(launch_problems(recipe, accelerator, len(raw_optimizers))))  # all ranks have them
    model, *optimizers = accelerator.prepare(raw_model, *raw_optimizers)
    return model, optimizers


def print_losses(plan: Plan, accelerator: Accelerator) -> None:
    """--eval_only: print the losses of init_from on equally many tokens of the training and validation splits."""
    data = plan.data
    if plan.recipe.verify_data:
        on_main(lambda: data.verify_changed({}))
    tokens = plan.recipe.validation_tokens or max(len(stream) for stream in data.val.streams)
    recipe = dataclasses.replace(plan.recipe, validation_tokens=tokens)
    raw_model = build_model(plan)
    recipe = fix_micro_batch_size(recipe, raw_model, accelerator)
    model, _ = wrap(raw_model, build_optimizers(raw_model, recipe), recipe, accelerator)  # FSDP2 requires both
    for split, mixture in (("train", data.train), ("val", data.val)):
        for name, loss in validation_losses(model, mixture, recipe, accelerator).items():
            accelerator.print(f"{split + name.removeprefix('val')} {loss:.4f}")


# ---- after the loop ----


def card_maker(plan: Plan, folder: RunFolder) -> Callable[..., ModelCard]:
    """`model_card` of this run's models; it is called before the first step too, to rehearse the export."""
    return functools.partial(model_card, name=folder.name, repo_id=plan.recipe.hub_model_id, run=folder)


def exit_resumable(run: RunState, accelerator: Accelerator) -> NoReturn:
    """Say why the run has stopped before its end, and exit with the code that asks for the same command."""
    done = "stopped and saved" if run.is_savable else "stopped between bad steps, which are not saved,"
    accelerator.print(f"{run.stopping}: {done} after step {run.step:,}; the same command resumes")
    sys.exit(EXIT_CODE)


def finish(plan: Plan, folder: RunFolder, model: PreTrainedModel, run: RunState) -> None:
    """Draw the losses, save the model folder, push it if asked to, and print verdict, results and where they are; with
    a report of it all.

    Args:
        model: unwrapped, with the weights to export; an adapter is saved beside, and merged into it.
        run: at their step: the last, or with `patience` the one with the best validation loss.
    """
    recipe, data, step = plan.recipe, plan.data, run.step
    assert run.val_loss is not None, "a run ends with a validation"
    logged = LoggedRun(folder.name, run_settings(recipe, data), read_metrics(folder.metrics))
    write_bytes(folder.picture, loss_picture([logged], exported=step if recipe.patience else None))
    samples = [row["samples"] for row in logged.rows if "samples" in row and row["step"] <= step]

    if lora_of(model) is not None:
        save_adapter_folder(folder.adapter, model, plan.tokenizer)
        merge_lora(model)
    model = without_padding(model)
    card = card_maker(plan, folder)(model, last_step=step)
    save_model_folder(folder.model, model, plan.tokenizer, card, folder.picture)
    report = write_report(folder, LoggedRun(folder.name, folder.read_record(), logged.rows))

    at_step = f", at step {step:,}" if recipe.patience else ""
    if logged.verdict.headline:
        print(f"\n{logged.verdict.headline}")
    print(f"\n{losses_text(run.val_loss, baseline_loss(data), data, at_step)}")
    for number, sample in enumerate(samples[-1] if samples else [], start=1):
        print(f"\n--- sample {number} ---\n{sample}")
    print(f"\n{files_text(folder, report)}")
    if recipe.push_to_hub:
        print(f"pushed to {upload(folder.model, recipe.hub_model_id)}")


if __name__ == "__main__":
    silence_libraries()
    what_fits = "`python -m gpt2repro.planner RECIPE --gpu NAME` says what fits"
    save_memory = "lower --micro_batch_size, set it to auto, or pass --gradient_checkpointing true"
    run_script(main, save_memory=f"{save_memory}; {what_fits}")
