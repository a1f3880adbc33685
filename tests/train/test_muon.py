"""Muon against torch.optim.Muon, and on several ranks against one process."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support import PATIENCE, ROOT

from gpt2repro.recipe import Recipe
from gpt2repro.train import muon
from gpt2repro.train.muon import Muon, orthogonalize
from gpt2repro.train.run_state import JOINT_MOMENTUM, RunState


SETTINGS = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}


def step_beside(optimizers, weights, steps=3):
    """Steps with the same gradients: `weights` is a list of equally many tensors for each optimizer."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for tensors in zip(*weights):
            gradient = torch.randn(tensors[0].shape, generator=generator)
            for tensor in tensors:
                tensor.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()


def parameter(*shape, seed=0):
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def moved_apart(ours, theirs, start):
    """The distance of two results, relative to how far the steps moved them."""
    return ((ours - theirs).norm() / (theirs - start).norm()).item()


@pytest.mark.parametrize("shape", [(64, 64), (128, 32), (32, 128), (1, 7)])
def test_a_matrix_is_updated_as_by_torch(shape, monkeypatch):
    """Both iterate in bfloat16, so a batch of one may differ in the last of its digits."""
    monkeypatch.setattr(muon, "iteration_dtype", lambda device: torch.bfloat16)
    ours, theirs = parameter(*shape), parameter(*shape)
    optimizers = Muon([{"params": [ours]}], **SETTINGS), torch.optim.Muon([theirs], **SETTINGS)
    step_beside(optimizers, [[ours], [theirs]])
    assert moved_apart(ours, theirs, parameter(*shape)) < 1e-2


def test_matrices_in_one_parameter_are_updated_as_three(monkeypatch):
    monkeypatch.setattr(muon, "iteration_dtype", lambda device: torch.bfloat16)
    joint = parameter(96, 32)
    parts = [torch.nn.Parameter(part.clone()) for part in joint.detach().chunk(3)]
    optimizers = Muon([{"params": [joint], "n_matrices": 3}], **SETTINGS), torch.optim.Muon(parts, **SETTINGS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        joint.grad = torch.randn(joint.shape, generator=generator)
        for part, gradient in zip(parts, joint.grad.chunk(3)):
            part.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert moved_apart(joint, torch.cat(parts), parameter(96, 32)) < 1e-2
    whole = parameter(96, 32)
    step_beside([Muon([{"params": [whole]}], **SETTINGS)], [[whole]])
    assert moved_apart(joint, whole, parameter(96, 32)) > 0.1  # as one matrix it is another optimizer


def test_matrices_of_one_shape_do_not_mix():
    """Wide, tall and square ones, with and without a gradient, beside each other as each alone."""
    shapes = [(8, 24), (24, 8), (8, 24), (8, 8), (24, 8)]
    together = [parameter(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    alone = [parameter(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    optimizers = [Muon([{"params": together[:2]}, {"params": together[2:], "n_matrices": 1}], **SETTINGS)]
    optimizers += [Muon([{"params": [weight]}], **SETTINGS) for weight in alone[:-1]]
    step_beside(optimizers, [together[:-1], alone[:-1]])
    for seed, (weight, expected) in enumerate(zip(together, alone)):
        torch.testing.assert_close(weight, expected, atol=2e-3, rtol=0)
        assert torch.equal(weight, parameter(*shapes[seed], seed=seed)) == (seed == len(shapes) - 1)


def test_singular_values_end_near_one_and_vectors_stay():
    matrices = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalize(matrices)
    in_its_basis = u.mT @ found @ v.mT
    diagonal = in_its_basis.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.6 and diagonal.max() < 1.3
    torch.testing.assert_close(in_its_basis, diagonal.diag_embed(), atol=1e-4, rtol=0)
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 8)), torch.zeros(1, 4, 8))


def test_state_of_torch_s_muon_is_taken_over():
    """Checkpoints of before this class had torch's."""
    old, new = parameter(32, 16), parameter(32, 16)
    theirs, ours = torch.optim.Muon([old], **SETTINGS), Muon([{"params": [new]}], **SETTINGS)
    step_beside([theirs], [[old]])
    new.data.copy_(old)
    assert theirs.state[old].keys() == {"momentum_buffer"}
    ours.state[new] = {key: value.clone() for key, value in theirs.state[old].items()}
    start = old.detach().clone()
    step_beside([theirs, ours], [[old], [new]], steps=1)
    assert moved_apart(new, old, start) < 1e-2


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_learns(tmp_path):
    """DDP divides the iterations over the ranks, FSDP2 the weights too."""
    command = [sys.executable, "tests/muon_on_two_ranks.py", str(tmp_path)]
    processes = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
    alone = torch.load(tmp_path / "alone_0")
    assert sum(name.endswith(".momentum") for name in alone) == 7
    for kind in ("ddp", "fsdp2"):
        ranks = [torch.load(tmp_path / f"{kind}_{rank}") for rank in range(2)]
        for name, expected in alone.items():
            assert torch.equal(ranks[0][name], ranks[1][name]), (kind, name)
            torch.testing.assert_close(ranks[0][name], expected, atol=2e-5, rtol=0, msg=f"{kind} {name}")


@pytest.mark.parametrize("is_old", [False, True])
def test_a_run_with_an_older_versions_joint_momentum_says_that_it_goes_on_with_three(tmp_path, is_old):
    said = []
    telemetry = SimpleNamespace(
        say=said.append, start=lambda step: None, state_dict=dict, load_state_dict=lambda state: None
    )
    run = RunState(Recipe(optimizer="muon", output_dir=str(tmp_path)), telemetry)
    state = run.state_dict()
    if is_old:
        del state["recipe"]["attention"]
    run.resume(SimpleNamespace(restore=lambda: state))
    assert said.count(JOINT_MOMENTUM) == is_old and said[-1].startswith("resuming after step 0")
