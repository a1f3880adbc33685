"""Trains a tiny model with Muon in this process alone, or as one of two ranks with DDP or FSDP2, and saves its weights
and momenta: python tests/muon_on_two_ranks.py FOLDER KIND RANK."""

import sys
from pathlib import Path

import torch
from tiny_models import tiny_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpt2repro.models.unwrap import full_tensor
from gpt2repro.recipe import Recipe
from gpt2repro.train import muon
from gpt2repro.train.optimizers import build_optimizers


N_RANKS = 2


def train(kind: str, rank: int) -> dict[str, torch.Tensor]:
    """Weights, and momenta as NAME.momentum, after three steps on two rows a rank; "alone" on all four."""
    model = tiny_model(n_positions=8)
    model.transformer.h[0].attn.c_proj.weight.requires_grad_(False)  # an odd number of matrices for the two ranks
    trained = model
    if kind == "ddp":
        trained = DistributedDataParallel(model)
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (N_RANKS,))
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard([model.transformer.wte, model.transformer.ln_f, model.lm_head], mesh=mesh)
        trained = fully_shard(model, mesh=mesh)
    optimizers = build_optimizers(model, Recipe(optimizer="muon", learning_rate=1e-2))
    mine = slice(None) if kind == "alone" else slice(rank, None, N_RANKS)
    for step in range(3):
        tokens = torch.randint(0, 60, (4, 9), generator=torch.Generator().manual_seed(step))[mine]
        trained(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:], use_cache=False).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    momenta = optimizers[1].state
    found = {name: full_tensor(p.detach()) for name, p in model.named_parameters()}
    found |= {
        f"{name}.momentum": full_tensor(momenta[p]["momentum_buffer"])
        for name, p in model.named_parameters()
        if p in momenta
    }
    return found


if __name__ == "__main__":
    folder, rank = sys.argv[1], int(sys.argv[2])
    muon.iteration_dtype = lambda device: torch.float32  # bfloat16 would enlarge the rounding of sums over ranks
    torch.set_num_threads(1)
    if rank == 0:
        torch.save(train("alone", rank), f"{folder}/alone_0")
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=N_RANKS)
    for kind in ("ddp", "fsdp2"):
        torch.save(train(kind, rank), f"{folder}/{kind}_{rank}")
    distributed.destroy_process_group()
