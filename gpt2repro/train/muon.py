"""Muon: the update of a matrix is its momentum, approximately orthogonalized by Newton-Schulz iterations.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. Unlike torch.optim.Muon, it takes a parameter
that is several matrices on top of each other, as GPT-2's joint query, key and value projection is three; it iterates
all matrices of one shape at once, divided over the ranks; and it takes FSDP2's sharded parameters.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import distributed
from torch.distributed.tensor import DTensor, distribute_tensor

from gpt2repro.models.unwrap import full_tensor


# The singular values go this often through a*s + b*s^3 + c*s^5, whose coefficients the source chose for a steep rise at
# 0: they end near 1, not at it.
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPSILON = 1e-7  # keeps a gradient of zeros at zeros

Member = tuple[torch.nn.Parameter, dict[str, Any]]  # a parameter and its group


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized; decoupled weight decay.

    A matrix with more rows than columns is updated with sqrt(rows / columns) times the learning rate. The state of a
    parameter is `momentum_buffer`, of its shape, as in torch.optim.Muon.

    All ranks call `step` together, with equal gradients (DDP) or with shards of them (FSDP2). Each orthogonalizes its
    share of the matrices; beside it, a rank holds all updates of one shape at a time.

    Args:
        groups: of two-dimensional parameters, each of shape (n_matrices * rows, columns). `n_matrices` is a key of the
            group, 1 if it is not given.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, momentum: float, weight_decay: float):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "n_matrices": 1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        of_shape: dict[tuple[int, ...], list[Member]] = defaultdict(list)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shape = matrix_shape(parameter, group)
                    of_shape[tuple(sorted(shape))].append((parameter, group))
        for members in of_shape.values():
            self._update(members)

    def _update(self, members: list[Member]) -> None:
        """Update parameters whose matrices have one shape, up to transposition."""
        momenta = [self._wide_matrices(parameter, group) for parameter, group in members]
        updates = orthogonalize_in_shares(torch.cat(momenta))
        of_each = updates.split([len(momentum) for momentum in momenta])
        for (parameter, group), update in zip(members, of_each):
            rows, columns = matrix_shape(parameter, group)
            if rows > columns:
                update = update.mT
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            rate = group["lr"] * math.sqrt(max(1, rows / columns))
            parameter.add_(sharded_like(parameter, update.reshape(parameter.shape)), alpha=-rate)

    def _wide_matrices(self, parameter: torch.nn.Parameter, group: dict[str, Any]) -> torch.Tensor:
        """Add a parameter's gradient to its momentum.

        Returns:
            (n_matrices, short, long): the whole parameter's Nesterov momentum, in the dtype of the iterations.
        """
        gradient, state = parameter.grad, self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        nesterov = gradient.lerp(momentum, group["momentum"])
        matrices = full_tensor(nesterov.to(iteration_dtype(gradient.device))).unflatten(0, (group["n_matrices"], -1))
        rows, columns = matrices.shape[1:]
        return matrices.mT if rows > columns else matrices


def matrix_shape(parameter: torch.nn.Parameter, group: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of each of the matrices that a parameter consists of."""
    return parameter.shape[0] // group["n_matrices"], parameter.shape[1]


def iteration_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, which the iterations tolerate, unless the device is a CPU whose products are slower in it."""
    if device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    return torch.bfloat16


def orthogonalize_in_shares(matrices: torch.Tensor) -> torch.Tensor:
    """`orthogonalize`, each rank for its share of the matrices. All ranks call it with the same and get the same."""
    n_ranks = distributed.get_world_size() if distributed.is_initialized() else 1
    if n_ranks == 1:
        return orthogonalize(matrices)
    per_rank = math.ceil(len(matrices) / n_ranks)
    padding = matrices.new_zeros(n_ranks * per_rank - len(matrices), *matrices.shape[1:])
    shares = torch.cat([matrices, padding]).chunk(n_ranks)
    mine = orthogonalize(shares[distributed.get_rank()])
    gathered = torch.empty_like(torch.cat(shares))
    distributed.all_gather_into_tensor(gathered, mine)
    return gathered[: len(matrices)]


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """For each matrix U S V^T approximately U V^T.

    Args:
        matrices: (N, short, long), float32 or bfloat16; computed in this dtype.
    Source: https://kellerjordan.github.io/posts/muon/, newtonschulz5.
    """
    a, b, c = QUINTIC
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def sharded_like(parameter: torch.nn.Parameter, tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that all ranks hold, if the parameter is sharded."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
