"""Packed weights: the same products, the same greedy text as generate() with plain weights."""

import copy

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gpt2repro.errors import UserError
from gpt2repro.models.packed_weights import Int8Linear, PackedLinear, pack_weights


GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
# Widths that are multiples of no vector's length are among them.
SHAPES = [(1, 32, 96), (1, 48, 50), (3, 50, 33), (8, 128, 64), (70, 20, 7)]


def lively(model):
    """With weights so large that greedy text does not repeat one token."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return model.eval()


def gpt2(**sizes):
    fields = dict(vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(GPT2Config(**fields | sizes))


def operands(rows, width, outputs, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((rows, width), (outputs, width), (outputs,)))
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("rows, width, outputs", SHAPES)
def test_a_packed_product_is_the_product(rows, width, outputs, dtype, tolerance):
    x, weight, bias = operands(rows, width, outputs, dtype)
    exact = x.double() @ weight.double().T
    for given, expected in ((None, exact), (bias, exact + bias.double())):
        product = PackedLinear(weight, given)(x[None])
        assert product.dtype == dtype
        torch.testing.assert_close(product[0].double(), expected, rtol=tolerance, atol=tolerance * exact.std().item())


@pytest.mark.parametrize("rows, width, outputs", [(1, 32, 96), (1, 48, 50), (3, 16, 33), (8, 128, 64), (70, 80, 7)])
def test_an_int8_product_is_that_of_the_rounded_weights(rows, width, outputs):
    x, weight, bias = operands(rows, width, outputs, torch.bfloat16)
    weight[0] = 0
    layer = Int8Linear(weight, bias)
    rounded = layer.rounded.double() * layer.scale.double()[:, None]
    half_a_step = weight.abs().amax(1, keepdim=True).double() / 127 / 2
    assert ((rounded - weight.double()).abs() <= half_a_step * 1.01).all()
    exact = x.double() @ rounded.T + bias.double()
    torch.testing.assert_close(layer(x[None])[0].double(), exact, rtol=8e-3, atol=8e-3 * exact.std().item())


@pytest.mark.parametrize("sizes", [{}, {"n_embd": 48, "n_head": 3, "n_inner": 100}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize("build", [tiny_model, gpt2])
def test_greedy_text_is_that_of_plain_weights(build, sizes):
    model = lively(build(**sizes))
    packed = copy.deepcopy(model)
    pack_weights(packed)
    assert isinstance(packed.lm_head, PackedLinear) and not any(type(m) is nn.Linear for m in packed.modules())
    ids = torch.randint(1, 60, (3, 5), generator=torch.Generator().manual_seed(2))
    padded = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    for mask in (torch.ones_like(ids), padded):
        expected = model.generate(ids, attention_mask=mask, **GREEDY)
        assert torch.equal(packed.generate(ids, attention_mask=mask, **GREEDY), expected)
    assert len(expected.unique()) > 9, "a text of few tokens would prove little"


@pytest.mark.parametrize("build", [tiny_model, gpt2])
def test_logits_in_lower_precision_are_near(build):
    model = lively(build())
    ids = torch.randint(0, 60, (2, 20))
    with torch.no_grad():
        expected = model(ids).logits[..., :60]
        half = copy.deepcopy(model).bfloat16()
        for int8, tolerance in ((False, 0.01), (True, 0.02)):
            packed = copy.deepcopy(half)
            pack_weights(packed, int8)
            logits = packed(ids).logits
            assert logits.dtype == torch.bfloat16
            error = (logits[..., :60].float() - expected).square().mean().sqrt()
            assert error < tolerance * expected.std()


def test_the_loss_of_a_packed_model_is_that_of_plain_weights():
    """So that a score can be measured with the weights that generate."""
    model = lively(tiny_model())
    packed = copy.deepcopy(model)
    pack_weights(packed)
    ids = torch.randint(0, 60, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(packed(ids, labels=ids).loss, model(ids, labels=ids).loss)


def test_int8_is_for_gpt2_on_the_cpu():
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    llama = LlamaForCausalLM(LlamaConfig(**sizes))
    pack_weights(llama)
    assert type(llama.lm_head) is nn.Linear, "another architecture may read its weights itself"
    with pytest.raises(UserError, match="--dtype int8 is for GPT-2, not llama; use --dtype bfloat16"):
        pack_weights(llama, int8=True)
    elsewhere = tiny_model().to("meta")
    pack_weights(elsewhere)
    assert type(elsewhere.lm_head) is nn.Linear
    with pytest.raises(UserError, match="--dtype int8 is for a model on the CPU, not on meta"):
        pack_weights(elsewhere, int8=True)


def test_int8_is_for_widths_that_its_kernel_takes():
    with pytest.raises(UserError, match="--dtype int8 is for layers whose width is a multiple of 16, not 40"):
        pack_weights(tiny_model(n_embd=40).bfloat16(), int8=True)


def test_a_processor_without_the_kernels_keeps_plain_weights(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = tiny_model()
    pack_weights(model)
    assert type(model.lm_head) is nn.Linear and type(model.transformer.h[0].mlp.c_fc).forward is nn.Linear.forward
