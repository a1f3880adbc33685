"""Optimizers: AdamW as the GPT-2 reproductions use it."""

import torch

from gpt2repro.recipe import Recipe


def build_optimizers(model: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Fused AdamW that decays only tensors with two or more dimensions, i.e. matrices and embeddings, not biases and
    LayerNorms. Source: build-nanogpt train_gpt2.py, configure_optimizers; GPT-3 paper, appendix B.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (recipe.adam_beta1, recipe.adam_beta2)
    return [torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=betas, eps=recipe.adam_epsilon, fused=True)]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
