"""Rows of tokens through a causal model: its positions, the ranks' shares, padding, and the logits that are needed."""

import inspect
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch

from gpt2repro.errors import UserError


T = TypeVar("T")


class UnsuitableTokenizer(UserError):
    """A tokenizer that cannot write a text, so that its model's losses would be those of a shorter one."""


def share_of_rank(items: list[T], rank: int, world_size: int) -> list[T]:
    """What a rank scores: every world_size-th, so that all ranks have the same work.

    All ranks get equally many, for which a few items are scored twice: a sharded model hangs if one rank runs more
    forward passes than the others.
    """
    per_rank = math.ceil(len(items) / world_size)
    return [items[(rank + world_size * k) % len(items)] for k in range(per_rank)]


def padded(rows: Sequence[Sequence[int] | np.ndarray], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens as one batch, right-padded with token 0.

    Padding needs no attention mask: attention is causal, so no token sees what is to its right, and the logits at
    padding positions are never read.

    Returns:
        tokens: (R, T) int64; T = length of the longest row.
        is_token: (R, T) bool, False on padding.
    """
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    is_token = torch.zeros_like(tokens, dtype=torch.bool)
    for r, row in enumerate(rows):
        tokens[r, : len(row)] = torch.tensor(row)
        is_token[r, : len(row)] = True
    return tokens.to(device), is_token.to(device)


def last_logits(model, tokens: torch.Tensor, count: int, **arguments: torch.Tensor) -> torch.Tensor:
    """(R, count, V): the logits at the last `count` positions of a forward pass without a cache.

    Args:
        tokens: (R, T) int64.
        arguments: more of the model's forward pass.
    """
    has_logits_to_keep = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    kept = {"logits_to_keep": count} if has_logits_to_keep else {}
    return model(input_ids=tokens, use_cache=False, **arguments, **kept).logits[:, -count:]


def positions(model) -> int | None:
    """How many tokens the model takes; None means no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)  # an alias of n_positions
