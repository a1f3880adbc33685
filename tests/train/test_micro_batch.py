"""`micro_batch_size: auto` in one process. test_faults.py has real shortages of memory, test_fsdp2.py has FSDP2."""

import dataclasses
import gc

import pytest
import torch
from accelerate import Accelerator
from support import write_state
from tiny_models import tiny_model

from gpt2repro.errors import UserError
from gpt2repro.plan.memory import peak_memory
from gpt2repro.plan.sizes import Sizes
from gpt2repro.recipe import Recipe
from gpt2repro.train import micro_batch
from gpt2repro.train.micro_batch import fix_micro_batch_size, setup_of
from gpt2repro.train.optimizers import build_optimizers


RECIPE = Recipe(micro_batch_size="auto", sequence_length=16, global_batch_tokens=48 * 16, output_dir="none/such")


@pytest.fixture(scope="module", autouse=True)
def only_new_garbage():
    """As in a run: what is imported is not searched after each trial."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def model():
    return tiny_model(resid_pdrop=0.1)


def room_for(monkeypatch, recipe, model, size: int) -> None:
    """The planner's memory of this micro-batch, to the byte, is what is free."""
    sequences = recipe.global_batch_tokens // recipe.sequence_length
    setup = dataclasses.replace(
        setup_of(recipe, Accelerator(cpu=True)), micro_batch_size=size, accumulation=sequences // size
    )
    room = peak_memory(Sizes.of(model.config.to_dict()), setup).total
    monkeypatch.setattr(micro_batch, "free_for_tensors", lambda device: room)


def out_of_memory_above(model, size: int) -> list[int]:
    """Let the forward pass fail as on a GPU; the sizes that were tried are appended to the list."""
    tried = []

    def check(module, args, kwargs):
        tried.append(len(kwargs["input_ids"]))
        if tried[-1] > size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.register_forward_pre_hook(check, with_kwargs=True)
    return tried


@pytest.mark.parametrize("size", [48, 24, 2])
def test_it_is_the_largest_divisor_that_the_plan_fits_and_two_micro_batches_of_it_are_tried(
    monkeypatch, capsys, model, size
):
    room_for(monkeypatch, RECIPE, model, size)
    tried = out_of_memory_above(model, 48)
    fixed = fix_micro_batch_size(RECIPE, model, Accelerator(cpu=True))
    assert fixed == dataclasses.replace(RECIPE, micro_batch_size=size)
    assert tried == [size] * min(2, 48 // size)  # the second finds the gradients of the first
    assert capsys.readouterr().out.startswith(f"micro_batch_size=auto: {size} sequences x {48 // size} (accumulation)")


def test_out_of_memory_leads_to_the_next_divisor(monkeypatch, capsys, model):
    room_for(monkeypatch, RECIPE, model, 24)
    tried = out_of_memory_above(model, 8)
    assert fix_micro_batch_size(RECIPE, model, Accelerator(cpu=True)).micro_batch_size == 8
    assert tried == [24, 16, 12, 8, 8]
    assert "the most that ran: 24 were planned" in capsys.readouterr().out


def test_the_trial_holds_what_the_run_adds(monkeypatch, model):
    """The optimizer's state, which the first step allocates."""
    held = []
    monkeypatch.setattr(micro_batch.torch, "empty", lambda size, **options: held.append(size))
    fix_micro_batch_size(RECIPE, model, Accelerator(cpu=True))
    (optimizer,) = build_optimizers(model, RECIPE)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [value for values in optimizer.state.values() for name, value in values.items() if name != "step"]
    assert held == [sum(tensor.nbytes for tensor in state)]


def test_nothing_but_the_number_is_left_behind(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.eval()
    random = torch.get_rng_state()
    fix_micro_batch_size(RECIPE, model, Accelerator(cpu=True))
    assert torch.equal(torch.get_rng_state(), random) and not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_ramp_starts_with_whole_micro_batches(monkeypatch, model):
    recipe = dataclasses.replace(RECIPE, batch_ramp_start=6 * 16, batch_ramp_tokens=500)
    assert fix_micro_batch_size(recipe, model, Accelerator(cpu=True)).micro_batch_size == 6
    assert not dataclasses.replace(recipe, micro_batch_size=6, data_dir="", max_steps=2000).problems(1)


@pytest.mark.parametrize("recompute", [False, True])
def test_one_line_says_what_would_fit_if_nothing_does(monkeypatch, model, recompute):
    recipe = dataclasses.replace(RECIPE, gradient_checkpointing=recompute)
    monkeypatch.setattr(micro_batch, "free_for_tensors", lambda device: 1000.0)
    with pytest.raises(UserError) as error:
        fix_micro_batch_size(recipe, model, Accelerator(cpu=True))
    (line,) = str(error.value).splitlines()
    assert "one sequence of 16 tokens needs" in line and "shorten --sequence_length" in line
    assert ("--gradient_checkpointing true" in line) is not recompute
    with pytest.raises(UserError, match="; give a number, as losses alone take less"):
        fix_micro_batch_size(dataclasses.replace(recipe, eval_only=True), model, Accelerator(cpu=True))


def test_a_trial_that_fails_down_to_one_sequence_says_so(model):
    out_of_memory_above(model, 0)
    with pytest.raises(UserError, match="48 were planned, and ran out of memory down to 1"):
        fix_micro_batch_size(RECIPE, model, Accelerator(cpu=True))


def test_another_error_is_none_of_memory(model):
    def fail(module, args):
        raise RuntimeError("a fault")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a fault"):
        fix_micro_batch_size(RECIPE, model, Accelerator(cpu=True))


@pytest.mark.parametrize("number, kept", [(12, 12), (7, 48)])
def test_the_newest_checkpoints_number_goes_before_the_record_if_it_divides(tmp_path, model, number, kept):
    """A run may have been resumed with another number, or another number of processes."""
    (tmp_path / "recipe.yaml").write_text("micro_batch_size: 4\ndata: {}\n")
    (tmp_path / "metrics.jsonl").write_text("{}\n")  # it has begun
    recipe = dataclasses.replace(RECIPE, output_dir=str(tmp_path))
    assert fix_micro_batch_size(recipe, model, Accelerator(cpu=True)).micro_batch_size == 4
    checkpoint = tmp_path / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    write_state(checkpoint, {"recipe": {"micro_batch_size": number}})
    assert fix_micro_batch_size(recipe, model, Accelerator(cpu=True)).micro_batch_size == kept


def test_a_number_stays_untried(model):
    tried = out_of_memory_above(model, 0)
    recipe = dataclasses.replace(RECIPE, micro_batch_size=48)
    assert fix_micro_batch_size(recipe, model, Accelerator(cpu=True)) is recipe and not tried
