"""Optimizers by name: AdamW as the GPT-2 reproductions use it, and Muon for the matrices of the blocks.

To add one, write a function like `adamw` and give it a name, which the recipe's `optimizer` field then accepts:

    OPTIMIZERS["adamw_two_rates"] = adamw_two_rates

benchmarks/muon.py does this from outside the package. torch is imported where it is used, as a name that is not
registered is refused before that.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from gpt2repro.recipe import Recipe


if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


def build_optimizers(model: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """The optimizers that together update the model, at their peak learning rates.

    Args:
        model: a GPT2ReproForCausalLM, neither wrapped nor sharded.
    """
    return OPTIMIZERS[recipe.optimizer](model, recipe)


def adamw(model: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """One AdamW for all weights.

    Source: build-nanogpt train_gpt2.py, configure_optimizers; GPT-3 paper, appendix B.
    """
    return [adamw_for(model.parameters(), recipe)]


def muon(model: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, of which c_attn.weight is three: query, key and value. AdamW for the rest."""
    from gpt2repro.train.muon import Muon

    matrices = block_matrices(model)
    joint = {block.attn.c_attn.weight for block in model.transformer.h}
    lr_ratio = recipe.muon_learning_rate / recipe.learning_rate
    groups = [
        {"params": [p for p in matrices if p in joint], "n_matrices": 3, "lr_ratio": lr_ratio},
        {"params": [p for p in matrices if p not in joint], "n_matrices": 1, "lr_ratio": lr_ratio},
    ]
    in_muon = set(matrices)
    others = [p for p in model.parameters() if p not in in_muon]
    return [
        adamw_for(others, recipe),
        Muon(groups, recipe.muon_learning_rate, recipe.muon_momentum, recipe.muon_weight_decay),
    ]


OptimizerBuilder = Callable[["torch.nn.Module", Recipe], list["torch.optim.Optimizer"]]
OPTIMIZERS: dict[str, OptimizerBuilder] = {"adamw": adamw, "muon": muon}


def adamw_for(parameters: Iterable[torch.nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    """A fused AdamW that applies weight decay to tensors with 2 or more dimensions only: matrices and embeddings, not
    biases and LayerNorms."""
    import torch

    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (recipe.adam_beta1, recipe.adam_beta2)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=betas, eps=recipe.adam_epsilon, fused=True)


def block_matrices(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The trained two-dimensional weights of the transformer blocks."""
    return [p for p in model.transformer.h.parameters() if p.requires_grad and p.dim() == 2]


def set_lr(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> float:
    """Set the scheduled learning rate. A parameter group with an `lr_ratio`, such as Muon's, gets that multiple of it.

    Returns:
        lr, for logging.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
    return lr


# ---- checks ----


def optimizer_problems(recipe: Recipe) -> list[str]:
    """One line if the recipe's optimizer is not registered."""
    if recipe.optimizer in OPTIMIZERS:
        return []
    problem = f"optimizer={recipe.optimizer} is not one of {', '.join(OPTIMIZERS)}"
    nearest = difflib.get_close_matches(recipe.optimizer, OPTIMIZERS, n=1)
    return [f"{problem}; did you mean {nearest[0]}?" if nearest else problem]


def launch_problems(recipe: Recipe, accelerator: Accelerator, n_optimizers: int) -> list[str]:
    """What in the recipe is incompatible with the launch's precision or distribution.

    Args:
        n_optimizers: how many `build_optimizers` returned.
    """
    from accelerate import DistributedType

    uses_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    problems = []
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        problems.append("mixed_precision=fp16 would run in float32 on the CPU; use bf16 or no")
    if n_optimizers > 1 and accelerator.mixed_precision == "fp16":
        # accelerate steps and updates its one GradScaler for each optimizer in turn: the second optimizer's gradients
        # are unscaled twice, and an overflow that only one of them sees skips only that one's step.
        problems.append(
            f"optimizer={recipe.optimizer} is {n_optimizers} optimizers, which accelerate scales wrongly in fp16; use "
            "bf16 or adamw"
        )
    fp8 = accelerator.ao_recipe_handler
    if fp8 is not None and fp8.config.enable_fsdp_float8_all_gather:
        # torchao then replaces the matrices by new parameters, but the optimizer would update the old ones.
        problems.append(
            "mixed_precision=fp8 with enable_fsdp_float8_all_gather, accelerate's default, trains no matrix; use "
            "accelerate_configs/single_gpu_fp8.yaml, which turns it off"
        )
    if n_optimizers > 1 and uses_deepspeed:
        problems.append(
            f"optimizer={recipe.optimizer} is {n_optimizers} optimizers, but DeepSpeed takes only one; use FSDP2 or "
            "adamw"
        )
    if recipe.lora_rank and uses_deepspeed:
        problems.append(
            f"lora_rank={recipe.lora_rank}: DeepSpeed would save the frozen weights with every checkpoint; use DDP or "
            "FSDP2"
        )
    if recipe.batch_ramp_start and uses_deepspeed:
        problems.append(
            f"batch_ramp_start={recipe.batch_ramp_start} varies the accumulation, which DeepSpeed cannot; use FSDP2"
        )
    return problems
