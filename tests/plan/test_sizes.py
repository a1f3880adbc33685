"""Parameters and FLOPs by formula, against the model itself and torch's counter."""

import pytest
import torch
from planned_models import TINY, build
from torch.utils.flop_counter import FlopCounterMode

from gpt2repro.evaluation.published import openai_models
from gpt2repro.plan.sizes import Sizes


@pytest.mark.parametrize("name", openai_models())
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_are_those_of_the_model(name, bias):
    openai = openai_models()[name]
    sizes = Sizes(50304, 1024, openai.width, openai.layers, openai.heads, 4 * openai.width, bias)
    assert sizes.parameters == build(sizes, "meta").num_parameters()


def test_flops_are_those_that_torch_counts():
    model, T = build(TINY), 64
    model.set_attn_implementation("eager")
    tokens = torch.zeros(3, T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model.train()(input_ids=tokens, shift_labels=tokens).loss.backward()
    counted = counter.get_total_flops() / tokens.numel()
    # the eager path multiplies the pairs that the mask hides as well: T keys a query instead of (T + 1) / 2
    hidden = 3 * TINY.n_layer * 2 * 2 * TINY.n_embd * (T - (T + 1) / 2)
    assert TINY.exact_flops_per_token(T) + hidden == counted
