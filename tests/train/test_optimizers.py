"""Optimizers compared with reference steps written out here; saving and restoring their state."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from support import ROOT
from tiny_models import tiny_model
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from gpt2repro.errors import UserError
from gpt2repro.recipe import Recipe
from gpt2repro.train.optimizers import OPTIMIZERS, build_optimizers, launch_problems, optimizer_problems, set_lr
from gpt2repro.train.preflight import resolve_and_check


MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MUON = Recipe(optimizer="muon", learning_rate=1e-3, muon_learning_rate=0.02, muon_momentum=0.9, muon_weight_decay=0.5)


@pytest.fixture
def model():
    return tiny_model(n_positions=8)


def train(model, optimizers, steps, first=0):
    for number in range(first, first + steps):
        tokens = torch.randint(0, 60, (4, 9), generator=torch.Generator().manual_seed(number))
        model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:], use_cache=False).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def names_of(optimizer, model):
    names = {p: name for name, p in model.named_parameters()}
    return {names[p] for group in optimizer.param_groups for p in group["params"]}


def orthogonalized(matrix):
    """Muon's quintic applied five times to the singular values of a matrix, in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / matrix.double().norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ v


def test_muon_updates_the_block_matrices_and_adamw_the_rest(model):
    adamw, muon = build_optimizers(model, MUON)
    assert names_of(muon, model) == {f"transformer.h.{i}.{name}" for i in (0, 1) for name in MATRICES}
    assert names_of(adamw, model) | names_of(muon, model) == dict(model.named_parameters()).keys()
    assert not names_of(adamw, model) & names_of(muon, model)
    decayed = {p.dim() for group in adamw.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {2} and adamw.param_groups[1]["weight_decay"] == 0


def test_muon_steps_as_written_out(model):
    """Nesterov momentum, five Newton-Schulz iterations of query, key and value each and of every other matrix, the
    aspect ratio's square root, decoupled decay; two steps."""
    _, muon = build_optimizers(model, MUON)
    weights = {name: p for name, p in model.named_parameters() if name.endswith(MATRICES) and ".h." in name}
    expected = {name: p.detach().double() for name, p in weights.items()}
    momenta = dict.fromkeys(weights, 0.0)
    for _ in range(2):
        for name, p in weights.items():
            p.grad = torch.randn_like(p)
            momenta[name] = 0.9 * momenta[name] + 0.1 * p.grad.double()
            nesterov = 0.1 * p.grad.double() + 0.9 * momenta[name]
            matrices = nesterov.chunk(3 if name.endswith("c_attn.weight") else 1)
            aspect = matrices[0].shape[0] / matrices[0].shape[1]
            update = torch.cat([orthogonalized(matrix) for matrix in matrices]) * math.sqrt(max(1, aspect))
            expected[name] = expected[name] * (1 - 0.02 * 0.5) - 0.02 * update
        before = {name: p.detach().double() for name, p in weights.items()}
        muon.step()
        for name, p in weights.items():
            moved = (p - before[name]).norm()
            assert (p - expected[name]).norm() < 0.03 * moved, name  # the iterations are in bfloat16
            expected[name] = p.detach().double()


def test_adamw_beside_muon_steps_as_adamw_alone(model):
    alone = copy.deepcopy(model)
    pairs = (model, build_optimizers(model, MUON)), (alone, build_optimizers(alone, Recipe(learning_rate=1e-3)))
    for which, optimizers in pairs:
        train(which, optimizers, 1)
    muons = names_of(build_optimizers(model, MUON)[1], model)
    ours, theirs = parameters(model), parameters(alone)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]) == (name not in muons), name


def test_adamw_is_one_optimizer_that_steps_as_torch_does(model):
    twin = copy.deepcopy(model)
    optimizers = build_optimizers(model, Recipe())
    assert len(optimizers) == 1
    train(model, optimizers, 3)
    groups = [
        {"params": [p for p in twin.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in twin.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    train(twin, [torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), eps=1e-8, fused=True)], 3)
    for name, value in parameters(model).items():
        assert torch.equal(value, parameters(twin)[name]), name


def test_both_learning_rates_follow_one_schedule(model):
    adamw, muon = build_optimizers(model, MUON)
    for lr, of_muon in ((1e-3, 0.02), (2.5e-4, 0.005), (0.0, 0.0)):
        assert set_lr([adamw, muon], lr) == lr
        assert {group["lr"] for group in adamw.param_groups} == {lr}
        assert [group["lr"] for group in muon.param_groups] == [pytest.approx(of_muon)] * 2


def test_a_registered_optimizer_is_built_by_its_name(model, monkeypatch):
    def sgd(model, recipe):
        return [torch.optim.SGD(model.parameters(), lr=recipe.learning_rate)]

    recipe = Recipe(optimizer="sgd", learning_rate=0.5)
    assert optimizer_problems(recipe) == ["optimizer=sgd is not one of adamw, muon"]
    monkeypatch.setitem(OPTIMIZERS, "sgd", sgd)
    assert optimizer_problems(recipe) == []
    (built,) = build_optimizers(model, recipe)
    assert isinstance(built, torch.optim.SGD) and built.param_groups[0]["lr"] == 0.5


def test_a_misspelled_optimizer_is_named_with_the_nearest():
    (problem,) = optimizer_problems(Recipe(optimizer="adamW"))
    assert problem == "optimizer=adamW is not one of adamw, muon; did you mean adamw?"


def test_an_unknown_optimizer_is_reported_with_the_other_mistakes(tmp_path):
    recipe = str(ROOT / "recipes" / "demo.yaml")
    argv = ["--config", recipe, "--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(UserError) as error:
        resolve_and_check([*argv, "--optimizer", "muno", "--max_step", "3", "--log_every", "0"])
    for part in ("did you mean --max_steps?", "log_every=0 must be", "did you mean muon?", "prepare_data.py"):
        assert part in str(error.value)


@pytest.mark.parametrize("distributed", [False, True])
def test_a_resumed_run_matches_an_uninterrupted_one(model, distributed):
    """Through state_dict, and through torch.distributed.checkpoint, which identifies state by the weights' names."""
    optimizers = build_optimizers(model, MUON)
    train(model, optimizers, 3)
    other = copy.deepcopy(model)
    restored = build_optimizers(other, MUON)
    if distributed:
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizers))
        assert "transformer.h.0.mlp.c_fc.weight" in saved["state"]
        set_optimizer_state_dict(other, restored, saved)
    else:
        for optimizer, new in zip(optimizers, restored):
            new.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for which, its in ((model, optimizers), (other, restored)):
        set_lr(its, 5e-4)
        train(which, its, 2, first=3)
    assert [g["lr"] for o in restored for g in o.param_groups] == [5e-4, 5e-4, *[pytest.approx(0.01)] * 2]
    for name, value in parameters(model).items():
        assert torch.equal(value, parameters(other)[name]), name


def launch_of(precision, device, distribution, fp8=None):
    """What launch_problems looks at of an Accelerator."""
    return SimpleNamespace(
        mixed_precision=precision,
        device=torch.device(device),
        distributed_type=distribution,
        ao_recipe_handler=fp8
        and SimpleNamespace(config=SimpleNamespace(enable_fsdp_float8_all_gather=fp8 == "gather")),
    )


@pytest.mark.parametrize(
    ("recipe", "precision", "device", "distribution", "problems"),
    [
        (MUON, "no", "cpu", DistributedType.MULTI_CPU, 0),
        (Recipe(), "fp16", "cpu", DistributedType.NO, 1),
        (MUON, "bf16", "cuda", DistributedType.FSDP, 0),
        (MUON, "fp16", "cuda", DistributedType.NO, 1),
        (MUON, "fp16", "cuda", DistributedType.DEEPSPEED, 2),
        (Recipe(), "fp16", "cuda", DistributedType.DEEPSPEED, 0),
        (Recipe(batch_ramp_start=32_768, batch_ramp_tokens=10**9), "fp16", "cuda", DistributedType.MULTI_GPU, 0),
        (Recipe(batch_ramp_start=32_768, batch_ramp_tokens=10**9), "bf16", "cuda", DistributedType.DEEPSPEED, 1),
    ],
)
def test_incompatible_launches_are_refused(recipe, precision, device, distribution, problems):
    launch = launch_of(precision, device, distribution)
    n_optimizers = {"adamw": 1, "muon": 2}[recipe.optimizer]
    assert len(launch_problems(recipe, launch, n_optimizers)) == problems


@pytest.mark.parametrize("distribution", [DistributedType.NO, DistributedType.MULTI_GPU])
def test_fp8_that_replaces_the_parameters_is_refused(distribution):
    """tests/test_accelerate_configs.py shows that the config which the message names keeps them."""
    assert launch_problems(Recipe(), launch_of("fp8", "cuda", distribution, fp8="plain"), 1) == []
    (problem,) = launch_problems(Recipe(), launch_of("fp8", "cuda", distribution, fp8="gather"), 1)
    assert "trains no matrix; use accelerate_configs/single_gpu_fp8.yaml" in problem


def test_one_gradient_scaler_cannot_serve_two_optimizers():
    """Why fp16 is refused: accelerate unscales all gradients, then steps and updates the scaler per optimizer."""
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight], lr=1.0) for weight in weights]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(sum(weights)).backward()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    for optimizer in optimizers:
        scaler.step(optimizer)
        scaler.update()
    assert [1 - weight.item() for weight in weights] == [1.0, 1 / 1024]
