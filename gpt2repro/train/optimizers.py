"""Optimizers: AdamW as the GPT-2 reproductions use it, and Muon for the matrices of the blocks."""

import torch
from accelerate import Accelerator, DistributedType

from gpt2repro.recipe import Recipe


def build_optimizers(model: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """The optimizers that together update the model, with their peak learning rates.

    `adamw`: one fused AdamW, which decays only tensors with two or more dimensions, i.e. matrices and embeddings, not
    biases and LayerNorms. Source: build-nanogpt train_gpt2.py, configure_optimizers; GPT-3 paper, appendix B.

    `muon`: the matrices of the blocks have Muon, whose step is the momentum, made nearly orthogonal; embeddings, biases
    and LayerNorms have AdamW as above. Source: https://kellerjordan.github.io/posts/muon/; torch.optim.Muon.

    Args:
        model: a GPT2ReproForCausalLM, neither wrapped nor sharded.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = []
    if recipe.optimizer == "muon":
        matrices = [p for p in model.transformer.h.parameters() if p.requires_grad and p.dim() == 2]
    of_muon = set(matrices)
    others = [p for p in parameters if p not in of_muon]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (recipe.adam_beta1, recipe.adam_beta2)
    adamw = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=betas, eps=recipe.adam_epsilon, fused=True)
    if not matrices:
        return [adamw]
    muon = torch.optim.Muon(
        [{"params": matrices, "lr_ratio": recipe.muon_learning_rate / recipe.learning_rate}],
        lr=recipe.muon_learning_rate,
        momentum=recipe.muon_momentum,
        weight_decay=recipe.muon_weight_decay,
    )
    return [adamw, muon]


def launch_problems(recipe: Recipe, accelerator: Accelerator) -> list[str]:
    """What of the recipe cannot be right with the precision and the distribution of the launch."""
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    problems = []
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        problems.append("mixed_precision=fp16 would be float32 on the CPU; use bf16 or no")
    if recipe.optimizer == "muon" and accelerator.mixed_precision == "fp16":
        # accelerate steps and updates the one GradScaler for each optimizer in turn: the second one's gradients are
        # divided by the scale twice, and an overflow that only one of them has stops only that one.
        problems.append("optimizer=muon is two optimizers, which accelerate scales wrongly in fp16; use bf16 or adamw")
    if recipe.optimizer == "muon" and deepspeed:
        problems.append("optimizer=muon is two optimizers, of which DeepSpeed takes one; use FSDP2 or adamw")
    if recipe.batch_ramp_start and deepspeed:
        problems.append(
            f"batch_ramp_start={recipe.batch_ramp_start} changes the accumulation, as DeepSpeed cannot; use FSDP2"
        )
    return problems


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate to `lr`, as the schedule has it for AdamW; Muon's stays in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
