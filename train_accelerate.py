"""Train GPT-2 on prepared token shards.

    accelerate launch train_accelerate.py                                         # recipes/demo.yaml, on a laptop
    accelerate launch --config_file accelerate_configs/ddp_8gpu.yaml train_accelerate.py \
        --config recipes/gpt2-124m-fineweb-edu.yaml [--field value ...]

The recipe says what to run, the accelerate config says how: device, processes, precision. The same command goes on
where a stopped run left off. gpt2repro/recipe.py lists the fields; output_dir gets recipe.yaml, metrics.jsonl,
loss.png, checkpoints/ and model/.
"""

import dataclasses
import json
import logging
import math
import re
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import torch
import yaml
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs, set_seed
from filelock import FileLock, Timeout
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.utils.logging import disable_progress_bar

from gpt2repro.data import shards
from gpt2repro.data.batches import MicroBatches
from gpt2repro.data.mixture import Mixture, data_record, each_source
from gpt2repro.data.order import stateless_seed
from gpt2repro.errors import SharedError, UserError, run_script, written
from gpt2repro.evaluation.hellaswag import ENDINGS, encode_item, evaluate_hellaswag, load_items
from gpt2repro.evaluation.validation import Best, validation_losses
from gpt2repro.hub.model_card import model_card
from gpt2repro.hub.upload import create_repository, upload
from gpt2repro.models.folder import find_model, save_model_folder
from gpt2repro.models.openai_weights import from_gpt2
from gpt2repro.models.sampling import generate
from gpt2repro.models.unwrap import full_tensor, unwrapped
from gpt2repro.processes import cpu_asked, device_name, on_main, use_all_cores, world_size
from gpt2repro.recipe import Recipe
from gpt2repro.train import checkpoint
from gpt2repro.train.checkpoint import Checkpoints
from gpt2repro.train.guard import Guard
from gpt2repro.train.optimizers import build_optimizers, launch_problems, set_lr
from gpt2repro.train.preflight import goes_on, settle
from gpt2repro.train.schedule import lr_at
from gpt2repro.train.stopping import EXIT_CODE, StopRequest
from gpt2repro.train.telemetry import Telemetry, plot_losses, provenance, read_metrics
from gpt2repro.train.tracker import start_tracker
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM


def main(argv: list[str]) -> None:
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)  # "Removed shared tensor": the head is tied
    disable_progress_bar()  # of reading and writing weights; the training bar stays
    recipe, manifest, config, tokenizer = settle(argv)
    accelerator = build_accelerator(recipe)
    with accelerator.main_process_first():  # the others find in the cache what the first has downloaded
        hellaswag = load_hellaswag(recipe, tokenizer, config)
    train_data = Mixture.open(recipe.sources, "train")
    val_data = Mixture.open(recipe.sources, "val")
    raw_model = build_model(recipe, config)  # neither wrapped nor compiled: for HellaSwag, samples and saving
    raw_optimizers = build_optimizers(raw_model, recipe)
    model, *optimizers = accelerator.prepare(raw_model, *raw_optimizers)
    if recipe.eval_only:
        return print_losses(recipe, model, train_data, val_data, accelerator)

    stop = StopRequest(recipe.max_hours)
    lock = begin_run(recipe, manifest, accelerator)
    batches = MicroBatches(train_data, recipe, accelerator.process_index, accelerator.num_processes)
    pin_memory = accelerator.device.type == "cuda"
    telemetry, guard, best = Telemetry(recipe, accelerator, raw_model), Guard(recipe), Best(recipe.patience)
    checkpoints = Checkpoints(recipe, accelerator, raw_model, raw_optimizers, tokenizer, telemetry.say)
    step = 0
    if state := checkpoints.restore():
        step = state["step"]
        guard.load_state_dict(state["guard"])
        best.load_state_dict(state["best"])
        telemetry.say(f"resuming after step {step:,} of {recipe.max_steps:,}")
    telemetry.start(step, state and state["telemetry"])
    stream = batches.iterate(step, pin_memory, guard.batch)
    hellaswag_batch = max(1, recipe.micro_batch_size // ENDINGS)  # items; each is as many rows as it has endings
    stopping = None

    def due(every: int) -> bool:
        return step == recipe.max_steps or best.is_old or (every > 0 and step % every == 0)

    model.train()
    while step < recipe.max_steps and not stopping and not best.is_old:
        lr = lr_at(step, recipe)
        loss, grad_norm, stopping = train_step(
            accelerator, model, optimizers, stream, recipe, step, lr, guard, stop, telemetry
        )
        step += 1
        telemetry.log_step(step, loss, lr, grad_norm, guard)
        if guard.gives_up:
            step = roll_back(recipe, checkpoints, guard, best, telemetry)
            stream = batches.iterate(step, pin_memory, guard.batch)
            continue

        with telemetry.paused():
            val_loss = None
            if due(recipe.validate_every):
                losses = validation_losses(model, val_data, recipe, accelerator)
                val_loss = losses["val_loss"]
                best.note(step, val_loss)
                telemetry.log(step, **losses)
                telemetry.say(f"step {step:,}: validation loss {val_loss:.4f}")
            if hellaswag and due(recipe.hellaswag_every):
                scores, _ = evaluate_hellaswag(raw_model, hellaswag, accelerator, hellaswag_batch)
                telemetry.log(step, **scores)
                telemetry.say(f"step {step:,}: HellaSwag acc_norm {scores['hellaswag_acc_norm']:.4f}")
            if due(recipe.sample_every):  # all processes draw the same: a sharded model needs them all
                with accelerator.autocast():
                    samples = draw_samples(raw_model, tokenizer, recipe)
                telemetry.log(step, samples=samples)
            if due(recipe.checkpoint_every) or stopping or (recipe.patience and best.step == step):
                states = {"guard": guard.state_dict(), "best": best.state_dict(), "telemetry": telemetry.state_dict()}
                checkpoints.save({"step": step, "val_loss": val_loss} | states)
    checkpoints.close()
    if recipe.patience and not stopping and (state := checkpoints.restore(best=True)):
        step = state["step"]
    raw_model = unwrapped(raw_model)  # where it is sharded, all processes gather
    # DDP goes before the processes part: it frees their group while it holds Python's lock, for which gloo may wait.
    model, *optimizers = accelerator.free_memory(model, *optimizers)
    telemetry.close()
    if stopping:
        accelerator.print(f"{stopping}: stopped and saved after step {step:,}; the same command goes on")
        sys.exit(EXIT_CODE)
    if accelerator.is_main_process:
        with written(recipe.output_dir):
            finish(recipe, manifest, raw_model, tokenizer, train_data, step)
    lock.release()


def train_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizers: list[AcceleratedOptimizer],
    stream: Iterator[torch.Tensor],
    recipe: Recipe,
    step: int,
    lr: float,
    guard: Guard,
    stop: StopRequest,
    telemetry: Telemetry,
) -> tuple[float, float, str | None]:
    """Step `step`, counted from 0: the gradient of a global batch, and the update, if it may be made.

    Returns:
        The mean loss of all processes in nats per token, the gradient's norm before clipping, and why the run is to
        stop, if it is. They are the same on all processes.
    """
    set_lr(optimizers, lr)  # first of all, as DeepSpeed makes its update with the last backward pass
    micro_losses = []
    accelerator.gradient_accumulation_steps = recipe.accumulation(accelerator.num_processes, guard.batch(step))
    accelerator.step = 0  # its count of micro-batches, by which it knows the last one of a step
    for micro in range(accelerator.gradient_accumulation_steps):
        tokens = telemetry.next_of(stream).to(accelerator.device, non_blocking=True)  # (micro_batch_size, T + 1)
        # Dropout is a function of where we are, so that a resumed run drops what the uninterrupted one would have.
        torch.manual_seed(stateless_seed(recipe.seed, step, micro, accelerator.process_index))
        with accelerator.accumulate(model):
            with accelerator.autocast():  # which prepare sees to but for FSDP2
                loss = model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:], use_cache=False).loss
            accelerator.backward(loss)  # divides by the accumulation
        micro_losses.append(loss.detach())
    grad_norm = full_tensor(accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm))

    mean_loss, stopping = agree(accelerator, torch.stack(micro_losses).mean(), stop)
    if guard.accepts(step, mean_loss, float(grad_norm), accelerator.scaler):
        with telemetry.update(step):
            for optimizer in optimizers:
                optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()
    return mean_loss, float(grad_norm), stopping


def agree(accelerator: Accelerator, loss: torch.Tensor, stop: StopRequest) -> tuple[float, str | None]:
    """The mean loss of all processes, not finite if one is not; and why the run is to stop, if one process has to."""
    reason = stop.reason
    both = torch.stack([loss.float(), torch.full_like(loss, float(reason is not None), dtype=torch.float32)])
    mean_loss, asked = accelerator.reduce(both, "mean").tolist()
    return mean_loss, (reason or "another process was told to stop") if asked else None


def roll_back(recipe: Recipe, checkpoints: Checkpoints, guard: Guard, best: Best, telemetry: Telemetry) -> int:
    """Go back to the newest checkpoint, after which the bad batches are left out; returns its step.

    Raises:
        SharedError: there is none, or it has been tried often enough.
    """
    seen = f"{recipe.max_bad_steps} steps in a row could not be taken, from batches {guard.bad_batches}"
    remedy = "start another run with a lower learning_rate or max_grad_norm, or in float32"
    if guard.rollbacks >= recipe.max_rollbacks:
        raise SharedError(f"{seen}, after {guard.rollbacks} rollbacks; {remedy}")
    if (state := checkpoints.restore()) is None:
        raise SharedError(f"{seen}, and there is no checkpoint to go back to; {remedy}")
    guard.roll_back(state["guard"])
    best.load_state_dict(state["best"])
    telemetry.roll_back(state["step"], state["telemetry"])
    telemetry.say(f"{seen}: back to step {state['step']:,}, without them")
    return state["step"]


def draw_samples(model, tokenizer, recipe: Recipe) -> list[str]:
    """A continuation of each of the recipe's prompts, the same at every step but for what the model has learnt."""
    return [
        generate(model, tokenizer, prompt, recipe.sample_tokens, recipe.seed, temperature=recipe.sample_temperature)
        for prompt in recipe.sample_prompts
    ]


# ---- before the loop ----


def build_accelerator(recipe: Recipe) -> Accelerator:
    """The processes, their device and precision, as the launcher and its configuration have them."""
    accelerator = Accelerator(
        cpu=cpu_asked(),
        # While the main process hashes the data or writes a large checkpoint, the others wait, with NCCL 10 minutes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=1))],
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=recipe.accumulation(world_size(), step=0), sync_with_dataloader=False
        ),
        dynamo_backend="inductor" if recipe.compile else None,
        log_with=None if recipe.report_to == "none" else recipe.report_to,
        project_dir=recipe.output_dir,
    )
    if accelerator.num_processes != world_size():
        raise UserError(
            f"WORLD_SIZE is {world_size()}, but accelerate runs {accelerator.num_processes} process(es); "
            "start the processes with `accelerate launch` or torchrun"
        )
    if problems := launch_problems(recipe, accelerator):
        raise UserError("\n".join(problems))
    if accelerator.device.type == "cpu":
        use_all_cores()
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if accelerator.is_fsdp2:  # float32 weights and autocast, as DDP; Accelerate's policy has even the loss in 16 bits
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # which accumulates and clips by itself
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": recipe.micro_batch_size,
            "gradient_accumulation_steps": recipe.accumulation(world_size(), step=0),
            "gradient_clipping": recipe.max_grad_norm,
        }
    return accelerator


def begin_run(recipe: Recipe, manifest: dict, accelerator: Accelerator) -> FileLock:
    """Record what runs, and make sure that the data, the Hub repository and the tracker are there.

    Returns:
        The lock that keeps other runs out of the output directory; the main process has it.
    Raises:
        SharedError: what record_run or start_tracker refuses.
    """
    accelerator.wait_for_everyone()  # all have checked the directory before one writes to it
    lock = FileLock(Path(recipe.output_dir) / ".lock")
    hardware = f"{accelerator.num_processes} x {device_name(accelerator.device)}"
    run_id = on_main(lambda: record_run(recipe, manifest, hardware, lock))
    on_main(lambda: start_tracker(recipe, run_id, accelerator))
    return lock


def record_run(recipe: Recipe, manifest: dict, hardware: str, lock: FileLock) -> str:
    """Write recipe.yaml at the first start; returns the run's id. At every start the data is what was prepared.

    Raises:
        UserError: a shard was changed, the Hub repository cannot be made, or another run has the directory.
    """
    output_dir = Path(recipe.output_dir)
    if recipe.push_to_hub:
        create_repository(recipe.hub_model_id)
    path, verified = output_dir / "recipe.yaml", output_dir / ".verified.json"
    seen = json.loads(verified.read_text()) if verified.exists() else {}
    seen = {name: status for d in recipe.sources for name, status in shards.verify_once(d, seen).items()}
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=60)  # seconds, in which a run whose launcher was killed saves and ends
    except Timeout as error:
        raise UserError(
            f"another run is writing to {output_dir}; wait for it, or choose another --output_dir"
        ) from error
    if not path.exists():
        for directory, source in each_source(recipe.sources, manifest):
            if not source["tokenizer"]["sha256"]:
                print(f"{directory} brings no tokenizer along; GPT-2's is assumed", flush=True)
        local = recipe.init_from == "scratch" or Path(recipe.init_from).exists()
        record = (
            dataclasses.asdict(recipe)
            | {
                "base_model": None if local else recipe.init_from,  # a Hub id
                "data": data_record(manifest),
                "hardware": hardware,
                "versions": provenance(),
                "run_id": re.sub(r"[^\w.-]", "-", output_dir.name) + "-" + uuid4().hex[:8],
            }
        )
        temporary = path.with_suffix(".yaml.tmp")
        temporary.write_text(yaml.safe_dump(record, sort_keys=False))
        temporary.rename(path)
    shards.write_json(verified, seen)
    return yaml.safe_load(path.read_text()).get("run_id")


def build_model(recipe: Recipe, config: GPT2ReproConfig) -> GPT2ReproForCausalLM:
    """The model to train, in float32, the same on every process."""
    set_seed(recipe.seed)
    if recipe.init_from == "scratch" or goes_on(recipe):
        model = GPT2ReproForCausalLM(config)
    else:
        model = from_gpt2(find_model(recipe.init_from), config, dtype=torch.float32)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def load_hellaswag(recipe: Recipe, tokenizer, config: GPT2ReproConfig) -> list:
    """The encoded HellaSwag items, or none where the recipe does not ask for them."""
    if not recipe.hellaswag_every:
        return []
    return [encode_item(item, tokenizer, config.n_positions) for item in load_items(recipe.hellaswag_data)]


def print_losses(recipe: Recipe, model, train_data: Mixture, val_data: Mixture, accelerator: Accelerator) -> None:
    """What a model has learnt of the data, trained on it or not: the loss on as much of either split."""
    tokens = recipe.validation_tokens or max(map(len, val_data.streams))
    recipe = dataclasses.replace(recipe, validation_tokens=tokens)
    for split, data in (("train", train_data), ("val", val_data)):
        for name, loss in validation_losses(model, data, recipe, accelerator).items():
            accelerator.print(f"{name.replace('val', split, 1)} {loss:.4f}")


# ---- after the loop ----


def finish(recipe: Recipe, manifest: dict, model, tokenizer, train_data: Mixture, step: int) -> None:
    """Draw the curve, save the model folder, push it where asked, and say what came out and where it lies.

    Args:
        step: that the model is of, the last or with `patience` the best.
    """
    output_dir = Path(recipe.output_dir)
    metrics = read_metrics(output_dir / "metrics.jsonl")
    val = manifest["splits"]["val"]
    (val_loss,) = [row["val_loss"] for row in metrics if "val_loss" in row and row["step"] == step]
    bits = f" = {val_loss / math.log(2) * val['tokens'] / val['bytes']:.4f} bits per byte" if val["bytes"] else ""
    baseline = shards.unigram_entropy(train_data.frequencies(manifest["tokenizer"]["vocab_size"]))
    samples = [row["samples"] for row in metrics if "samples" in row and row["step"] <= step]
    title = f"{output_dir.name}: GPT-2, {model.num_parameters() / 1e6:.1f}M parameters, {manifest['corpus']['name']}"
    plot_losses(metrics, {"unigram entropy": baseline} | recipe.reference_losses, output_dir / "loss.png", title)

    card = model_card(model, output_dir.name, recipe.hub_model_id, output_dir, step)
    save_model_folder(output_dir / "model", model, tokenizer, card, output_dir / "loss.png")

    at_step = f", at step {step:,}" if recipe.patience else ""
    print(f"\nvalidation loss {val_loss:.4f} nats per token{bits}{at_step}")
    print(f"a model that knows only how frequent each token is: {baseline:.4f} nats per token (unigram entropy)")
    for number, sample in enumerate(samples[-1] if samples else [], start=1):
        print(f"\n--- sample {number} ---\n{sample}")
    print(f"\nmetrics     {output_dir / 'metrics.jsonl'}\npicture     {output_dir / 'loss.png'}")
    print(f"checkpoint  {checkpoint.latest(output_dir)}\nmodel       {output_dir / 'model'}\n")
    print("from transformers import AutoModelForCausalLM, AutoTokenizer")
    print(f'model = AutoModelForCausalLM.from_pretrained("{output_dir / "model"}", trust_remote_code=True)')
    print(f'tokenizer = AutoTokenizer.from_pretrained("{output_dir / "model"}", trust_remote_code=True)')
    if recipe.push_to_hub:
        print(f"pushed to {upload(output_dir / 'model', recipe.hub_model_id)}")


if __name__ == "__main__":
    run_script(main)
