"""The model against independent references: transformers' own GPT-2, torch's cross-entropy, plain formulas."""

import ast
import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tiny_models import as_gpt2_tensors, gradients
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel

import modeling_gpt2repro
from modeling_gpt2repro import (
    GPT2ReproConfig,
    GPT2ReproForCausalLM,
    GPT2ReproModel,
    linear_cross_entropy,
    register_auto_classes,
)


V, V_REAL = 192, 150  # embedding rows, real tokens; V differs from every width of the network
B, T, D, LAYERS, HEADS = 2, 16, 32, 3, 4
TINY = dict(vocab_size=V, unpadded_vocab_size=V_REAL, n_positions=32, n_embd=D, n_layer=LAYERS, n_head=HEADS)
TINY |= dict(bos_token_id=None, eos_token_id=None)
# Wide enough to estimate a standard deviation within a percent; so many padding rows that a loss over the padded
# vocabulary would stand out.
INIT = TINY | dict(vocab_size=1024, unpadded_vocab_size=600, n_embd=128, n_layer=4)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_model(**fields) -> GPT2ReproForCausalLM:
    """A tiny model in training mode whose every parameter matters: large, no bias 0 and no LayerNorm weight 1."""
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**TINY | fields)).train()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "ln_" in name and name.endswith("weight") else 0.0, std=0.2)
    return model


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def ids():
    return torch.randint(V_REAL, (B, T), generator=torch.Generator().manual_seed(1))


def as_gpt2(model) -> GPT2LMHeadModel:
    """transformers' own GPT-2 with the same weights, in the same mode."""
    fields = ("n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function", "layer_norm_epsilon")
    fields += ("resid_pdrop", "embd_pdrop", "attn_pdrop", "bos_token_id", "eos_token_id")
    reference = GPT2LMHeadModel(GPT2Config(vocab_size=V_REAL, **{name: getattr(model.config, name) for name in fields}))
    reference.set_attn_implementation(model.config._attn_implementation)
    reference.load_state_dict(as_gpt2_tensors(model.state_dict(), V_REAL))
    return reference.train(model.training)


def labels_with_gaps(ids):
    return ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)


def reference_loss(reference, ids, labels=None, shift_labels=None):
    if labels is not None:
        return reference(ids, labels=labels).loss
    return F.cross_entropy(reference(ids).logits.flatten(0, 1), shift_labels.flatten())


LABELS = {
    "labels": lambda ids: {"labels": ids},
    "shift_labels": lambda ids: {"shift_labels": ids.flip(0)},
    "labels with -100": lambda ids: {"labels": labels_with_gaps(ids)},
    "shift_labels with -100": lambda ids: {"shift_labels": labels_with_gaps(ids.flip(0))},
}


# ---- Same function as GPT-2 ----


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"vocab_size": V_REAL},
        {"n_inner": 40},
        {"activation_function": "relu"},
        {"layer_norm_epsilon": 0.1},
        {"n_head": 1},
        {"attn_implementation": "eager"},
    ],
    ids=str,
)
def test_logits_equal_gpt2(fields, ids):
    model = make_model(**fields).eval()
    logits = model(ids).logits
    assert logits.shape == (B, T, model.config.vocab_size)
    assert_close(logits[..., :V_REAL], as_gpt2(model)(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("make_labels", LABELS.values(), ids=LABELS)
def test_loss_gradients_and_adamw_step_equal_gpt2(model, ids, make_labels):
    reference, labels = as_gpt2(model), make_labels(ids)
    loss, expected = model(ids, **labels).loss, reference_loss(reference, ids, **labels)
    assert_close(loss, expected, atol=1e-5, rtol=0)

    loss.backward()
    expected.backward()
    assert_close(as_gpt2_tensors(gradients(model), V_REAL), gradients(reference), atol=1e-5, rtol=0)

    for network in (model, reference):
        # The gradient of a key's bias is zero in exact arithmetic. A small epsilon would amplify its rounding noise to
        # a full step, so epsilon is well above the noise.
        torch.optim.AdamW(network.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.1).step()
    assert_close(as_gpt2_tensors(model.state_dict(), V_REAL), reference.state_dict(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_dropout_equals_gpt2_under_the_same_seed(ids, name, attention):
    model = make_model(attn_implementation=attention, **{name: 0.3})

    def loss_of(network):
        torch.manual_seed(3)
        return network(ids, labels=ids).loss

    loss = loss_of(model)
    assert_close(loss, loss_of(as_gpt2(model)), atol=1e-5, rtol=0)
    without = loss_of(make_model(attn_implementation=attention))
    assert abs(loss - without) > 1e-3, "dropout had no effect in training"
    assert_close(loss_of(model.eval()), without)


def written_out_logits(model, ids):
    """GPT-2's equations without modules, attention kernels or a library's GELU; (B, T, V_REAL)."""
    weights, H = dict(model.named_parameters()), model.config.n_head

    def affine(x, name):
        return x + weights[name] if name in weights else x

    def linear(x, name):
        return affine(x @ weights[f"{name}.weight"].T, f"{name}.bias")

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + model.config.layer_norm_epsilon)
        return affine(x * weights[f"{name}.weight"], f"{name}.bias")

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][:T]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for i in range(model.config.n_layer):
        block = f"transformer.h.{i}"
        qkv = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").split(D, dim=-1)
        q, k, v = (part.view(B, T, H, D // H).transpose(1, 2) for part in qkv)  # each (B, H, T, D / H)
        scores = (q @ k.mT / math.sqrt(D // H)).masked_fill(future, -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D)
        x = x + linear(mixed, f"{block}.attn.c_proj")
        x = x + linear(gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ weights["transformer.wte.weight"][:V_REAL].T


@pytest.mark.parametrize("fields", [{}, {"bias": False}, {"n_inner": 40}, {"bias": False, "n_inner": 40}], ids=str)
def test_variants_match_the_plain_formula(fields, ids):
    model = make_model(**fields)
    assert any(name.endswith("bias") for name, _ in model.named_parameters()) == model.config.bias
    assert model.transformer.h[0].mlp.c_fc.out_features == fields.get("n_inner", 4 * D)
    expected = F.cross_entropy(written_out_logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    loss = model(ids, labels=ids).loss
    assert_close(loss, expected, atol=1e-5, rtol=0)
    assert_close(torch.autograd.grad(loss, list(model.parameters())), wanted, atol=1e-5, rtol=0)


def test_hidden_states_and_attentions_equal_gpt2(ids):
    model = make_model(attn_implementation="eager").eval()
    asked = {"output_hidden_states": True, "output_attentions": True}
    outputs, expected = model(ids, **asked), as_gpt2(model)(ids, **asked)
    assert len(outputs.hidden_states) == LAYERS + 1 and len(outputs.attentions) == LAYERS
    assert_close(outputs.hidden_states, expected.hidden_states, atol=1e-5, rtol=0)
    assert_close(outputs.attentions, expected.attentions, atol=1e-5, rtol=0)


def test_return_dict_false_gives_the_same_values_as_a_tuple(model, ids):
    model.eval()
    outputs = model(ids, labels=ids, use_cache=False)
    as_tuple = model(ids, labels=ids, use_cache=False, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert_close(as_tuple, (outputs.loss, outputs.logits))


def test_inputs_embeds_replace_input_ids(model, ids):
    model.eval()
    assert_close(model(inputs_embeds=model.transformer.wte(ids)).logits, model(ids).logits)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": model.transformer.wte(ids)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**inputs)


def test_parameter_counts_are_those_of_gpt2():
    with torch.device("meta"):
        padded, unpadded = (GPT2ReproForCausalLM(GPT2ReproConfig(vocab_size=rows)) for rows in (50304, 50257))
        reference = GPT2LMHeadModel(GPT2Config())
    assert GPT2ReproConfig().vocab_size == 50304 and GPT2ReproConfig().unpadded_vocab_size == 50257
    assert padded.num_parameters() == 124_475_904
    assert unpadded.num_parameters() == reference.num_parameters() == 124_439_808


# ---- The loss ----


def loss_inputs(rows=32, dtype=torch.float32):
    hidden = torch.randn(rows, D).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(V, D)).to(dtype).requires_grad_()
    labels = torch.randint(V_REAL, (rows,))
    labels[::5] = -100
    return hidden, weight, labels


def loss_and_gradients(hidden, weight, labels, **kwargs):
    loss = linear_cross_entropy(hidden, weight, labels, V_REAL, **kwargs)
    return loss, *torch.autograd.grad(loss, (hidden, weight))


@pytest.fixture
def chunks(monkeypatch):
    """Seven rows per chunk, three per softmax; the list records the size of each chunk."""
    sizes, to_gradient = [], modeling_gpt2repro._to_gradient

    def counted(logits, *args):
        sizes.append(len(logits))
        return to_gradient(logits, *args)

    monkeypatch.setattr(modeling_gpt2repro, "LOGITS_PER_CHUNK_ON_CPU", 7 * V)
    monkeypatch.setattr(modeling_gpt2repro, "MAX_CHUNKS", 10**6)
    monkeypatch.setattr(modeling_gpt2repro, "SOFTMAX_ROWS", 3)
    monkeypatch.setattr(modeling_gpt2repro, "_to_gradient", counted)
    return sizes


def test_loss_and_gradients_equal_torch_cross_entropy_over_the_real_rows():
    hidden, weight, labels = loss_inputs()
    expected = F.cross_entropy(hidden @ weight[:V_REAL].T, labels)
    wanted = torch.autograd.grad(3 * expected, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels, V_REAL)
    assert_close(loss, expected, atol=0, rtol=1e-6)
    assert_close(torch.autograd.grad(3 * loss, (hidden, weight)), wanted, atol=1e-6, rtol=0)


def test_loss_is_a_softmax_over_the_real_vocabulary(model, ids):
    hidden = model.transformer(ids).last_hidden_state[:, :-1]  # (B, T - 1, D)
    scores = hidden @ model.transformer.wte.weight.T  # (B, T - 1, V)
    right = scores.gather(2, ids[:, 1:, None])[..., 0]
    real = (scores[..., :V_REAL].exp().sum(-1).log() - right).mean()
    padded = (scores.exp().sum(-1).log() - right).mean()
    loss = model(ids, labels=ids).loss
    assert_close(loss, real, atol=1e-5, rtol=0)
    assert padded - loss > 0.1, "the padding rows are too weak to make a difference"


def test_padding_rows_get_no_gradient(model, ids):
    model(ids, labels=ids).loss.backward()
    gradient = model.transformer.wte.weight.grad
    assert (gradient[V_REAL:] == 0).all()
    assert (gradient[:V_REAL].abs().sum(-1) > 0).all()


def test_chunked_loss_equals_unchunked(chunks, monkeypatch):
    inputs = loss_inputs()
    chunked = loss_and_gradients(*inputs)
    assert chunks == [7, 7, 7, 7, 4]
    monkeypatch.setattr(modeling_gpt2repro, "LOGITS_PER_CHUNK_ON_CPU", 2**25)
    assert_close(chunked, loss_and_gradients(*inputs), atol=1e-6, rtol=1e-6)
    assert chunks[5:] == [32]


def test_a_chunk_holds_at_least_one_row(chunks, monkeypatch):
    inputs = loss_inputs()
    expected = loss_and_gradients(*inputs)
    monkeypatch.setattr(modeling_gpt2repro, "LOGITS_PER_CHUNK_ON_CPU", V - 1)
    assert_close(loss_and_gradients(*inputs), expected, atol=1e-6, rtol=1e-6)
    assert chunks[5:] == [1] * 32


def test_many_rows_do_not_make_many_chunks(chunks, monkeypatch):
    """torch.compile unrolls them."""
    monkeypatch.setattr(modeling_gpt2repro, "MAX_CHUNKS", 8)
    loss_and_gradients(*loss_inputs(rows=4096))
    assert chunks == [512] * 8


def plain_loss_and_gradients(hidden, weight, labels):
    """The same computation without chunks, blocks or work in place, in the dtype of its inputs; () float32, and the
    gradients of the summed loss times 1 / the number of labels."""
    logits = hidden.detach() @ weight.detach().T
    logits[:, V_REAL:] = -torch.inf
    log_probs = logits.float().log_softmax(-1)
    counted = labels != -100
    target = labels.where(counted, 0)
    loss = -log_probs[torch.arange(len(labels)), target][counted].sum()
    one_hot = F.one_hot(target, V).float()
    grad_logits = ((log_probs.exp() - one_hot) * counted[:, None]).to(logits.dtype)
    scale = 1 / counted.sum()
    grad_hidden = (grad_logits @ weight.detach() * scale).to(hidden.dtype)
    grad_weight = ((grad_logits.T @ hidden.detach()).float() * scale).to(weight.dtype)
    return loss * scale, grad_hidden, grad_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loss_in_place_has_bit_equal_gradients(dtype, monkeypatch):
    """The softmax in blocks of rows, written back into the logits, rounds like the softmax of all rows at once."""
    monkeypatch.setattr(modeling_gpt2repro, "SOFTMAX_ROWS", 5)
    inputs = loss_inputs(dtype=dtype)
    loss, *gradients = loss_and_gradients(*inputs)
    wanted_loss, *wanted = plain_loss_and_gradients(*inputs)
    assert_close(loss, wanted_loss, atol=0, rtol=1e-6)  # the order of the sum differs
    for got, expected in zip(gradients, wanted):
        assert torch.equal(got, expected)


def test_without_any_label_the_gradients_are_zero(chunks):
    hidden, weight, labels = loss_inputs()
    labels[:] = -100
    loss = linear_cross_entropy(hidden, weight, labels, V_REAL, num_items_in_batch=1)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (hidden, weight)))


def test_a_frozen_head_gets_no_gradient_and_changes_no_other(chunks):
    """As when only adapters are trained."""
    hidden, weight, labels = loss_inputs()
    _, expected, _ = loss_and_gradients(hidden, weight, labels)
    loss = linear_cross_entropy(hidden, weight.detach(), labels, V_REAL)
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], expected)


@pytest.mark.parametrize("rows", [V_REAL, V, 2 * V], ids=["none", "one", "double"])
def test_the_number_of_padding_rows_does_not_matter(chunks, rows):
    hidden, weight, labels = loss_inputs()
    real = weight.detach()[:V_REAL]
    padded = torch.cat([real, torch.randn(rows - V_REAL, D)]).requires_grad_()
    loss, grad_hidden, grad_weight = loss_and_gradients(hidden, padded, labels)
    expected = F.cross_entropy(hidden @ real.T, labels)
    assert_close(loss, expected, atol=0, rtol=1e-6)
    assert_close(grad_hidden, torch.autograd.grad(expected, hidden)[0], atol=1e-6, rtol=0)
    assert (grad_weight[V_REAL:] == 0).all() and (grad_weight[:V_REAL] != 0).any()


def test_backward_twice_gives_the_same_gradients():
    """The saved gradients are not scaled in place."""
    hidden, weight, labels = loss_inputs()
    loss = linear_cross_entropy(hidden, weight, labels, V_REAL)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(loss, (hidden, weight)), first))


@pytest.mark.parametrize("rows, divisor", [(0, 3), (6, 3)], ids=["no rows", "all ignored"])
def test_loss_without_labels_has_gradients_of_zero(rows, divisor):
    hidden, weight, labels = loss_inputs(rows)
    gradients = loss_and_gradients(hidden, weight, labels.fill_(-100), num_items_in_batch=divisor)
    assert all(torch.equal(got, torch.zeros_like(got)) for got in gradients)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
def test_compiled_loss_has_the_gradients_of_the_eager_one(autocast, monkeypatch):
    """torch 2.11 compiles sums in place into gradients of zero."""
    torch._dynamo.reset()
    monkeypatch.setattr(modeling_gpt2repro, "LOGITS_PER_CHUNK_ON_CPU", 7 * V)
    inputs = loss_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = loss_and_gradients(*inputs)
        loss = torch.compile(linear_cross_entropy, fullgraph=True)(*inputs, V_REAL)
        compiled = loss, *torch.autograd.grad(loss, inputs[:2])
    tolerance = 0.01 if autocast else 1e-6  # of the norm; a compiled bf16 graph rounds less often
    for got, wanted in zip(compiled, expected):
        assert (got - wanted).norm() / wanted.norm() < tolerance


def test_chunked_loss_under_bf16_autocast_stays_near_float32(chunks):
    inputs = loss_inputs(rows=256)
    expected = loss_and_gradients(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = loss_and_gradients(*inputs)
    assert len(chunks) == 2 * 37
    assert [tensor.dtype for tensor in rounded] == [torch.float32] * 3
    assert not torch.equal(rounded[1], expected[1]), "autocast had no effect"
    for got, wanted in zip(rounded, expected):  # bf16 keeps 8 bits: each rounding errs by up to 2^-9 = 0.2%
        assert (got - wanted).norm() / wanted.norm() < 0.01


def test_loss_and_weight_gradient_of_a_bf16_model_are_float32_sums(chunks):
    """A bf16 sum over 586 chunks would stall; float32 sums have the rounding error of single terms only."""
    hidden, weight, labels = loss_inputs(rows=4096, dtype=torch.bfloat16)
    expected = F.cross_entropy(hidden.float() @ weight.float()[:V_REAL].T, labels)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    loss, *got = loss_and_gradients(hidden, weight, labels)
    assert len(chunks) == 586 and loss.dtype == torch.float32
    assert_close(loss, expected, atol=0, rtol=1e-3)
    for gradient, reference in zip(got, wanted):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.float() - reference.float()).norm() / reference.float().norm() < 0.01


@pytest.mark.parametrize("label", [-1, V_REAL, V - 1, V])
def test_label_outside_the_real_vocabulary_is_an_error(label):
    """As in torch's cross-entropy; nanoGPT ignores -1, and training on some token instead would go unnoticed."""
    hidden, weight, labels = loss_inputs()
    labels[1] = label
    with pytest.raises((IndexError, RuntimeError), match="out of (bounds|range)"):
        linear_cross_entropy(hidden, weight, labels, V_REAL)


def test_second_derivative_raises_instead_of_being_wrong():
    hidden, weight, labels = loss_inputs()
    loss = linear_cross_entropy(hidden, weight, labels, V_REAL) ** 2
    with pytest.raises(RuntimeError):
        (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), hidden)


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_labels_of_another_shape_are_refused(model, ids, name):
    with torch.no_grad(), pytest.raises(ValueError, match="labels for 32 positions"):
        model(ids, **{name: ids[:, :5]})


@pytest.mark.parametrize("name", ["token_type_ids", "encoder_hidden_states"])
def test_inputs_that_would_be_ignored_are_refused(model, ids, name):
    with pytest.raises(ValueError, match=name):
        model(ids, **{name: ids})


@pytest.mark.parametrize("as_number", [int, torch.tensor], ids=["int", "tensor"])
def test_num_items_in_batch_divides_the_sum(model, ids, as_number):
    counted = B * (T - 1)
    mean, loss = model(ids, labels=ids).loss, model(ids, labels=ids, num_items_in_batch=as_number(7)).loss
    assert_close(loss, mean * counted / 7)
    wanted, got = (torch.autograd.grad(each, list(model.parameters())) for each in (mean * counted / 7, loss))
    assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_micro_batches_add_up_to_the_large_batch(model, ids):
    """Micro-batches with different numbers of labels, as in gradient accumulation."""
    labels = ids.clone()
    labels[0, :12] = -100
    full = model(ids, labels=labels).loss
    items = (labels[:, 1:] != -100).sum()
    parts = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=items).loss for i in range(B)]
    assert_close(sum(parts), full)
    wanted, got = (torch.autograd.grad(loss, list(model.parameters())) for loss in (full, sum(parts)))
    assert_close(got, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_loss_without_gradients_is_the_same(model, ids, mode):
    expected = model(ids, labels=ids).loss
    with mode():
        loss = model(ids, labels=ids).loss
    assert expected.requires_grad and not loss.requires_grad
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_training_returns_and_keeps_no_logits(model, ids, name):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        outputs = model(ids, **{name: ids})
    assert outputs.logits is None and outputs.past_key_values is None
    assert (V, D) in kept, "the gradient of the head's weight should be there"
    assert not [shape for shape in kept if shape and shape[-1] in (V, V_REAL)]


def test_training_without_labels_returns_logits_with_gradients(model, ids):
    logits = model(ids).logits[..., :V_REAL]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    wanted = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    assert_close(torch.autograd.grad(loss, list(model.parameters())), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 5, 9])], ids=str)
def test_logits_to_keep_limits_the_logits_but_not_the_loss(model, ids, keep):
    full = model.eval()(ids, labels=ids)
    cut = model(ids, labels=ids, logits_to_keep=keep)
    assert_close(cut.logits, full.logits[:, keep if isinstance(keep, torch.Tensor) else slice(-keep, None)])
    assert_close(cut.loss, full.loss)
    assert_close(full.loss, as_gpt2(model)(ids, labels=ids).loss, atol=1e-5, rtol=0)


# ---- Initialization ----

LOAD_ELSEWHERE = """
import inspect, json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

folder, init_fields = sys.argv[1], json.loads(sys.argv[2])
ids = torch.load("ids.pt")
causal = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
trunk = AutoModel.from_pretrained(folder, trust_remote_code=True)
torch.manual_seed(0)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True, **init_fields)
fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
with torch.no_grad():
    torch.save({
        "sources": [inspect.getfile(type(model)) for model in (causal, trunk, fresh)],
        "classes": [type(model).__name__ for model in (causal, trunk, fresh)],
        "path": sys.path,
        "tied": causal.lm_head.weight is causal.transformer.wte.weight,
        "logits": causal(ids).logits,
        "hidden": trunk(ids).last_hidden_state,
        "generated": causal.generate(ids, max_new_tokens=8, do_sample=False),
        "fresh": dict(fresh.named_parameters()),
    }, "result.pt")
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Results from a process that has the saved folder of `make_model()`, but neither this checkout nor a network."""
    folder, home = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("elsewhere")
    make_model().save_pretrained(folder)
    torch.save(torch.arange(12).view(2, 6), home / "ids.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hf"), "HF_MODULES_CACHE": str(home / "modules")}
    command = [sys.executable, "-I", "-c", LOAD_ELSEWHERE, str(folder), json.dumps(INIT)]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return torch.load(home / "result.pt") | {"modules": home / "modules"}


@pytest.fixture(params=["imported", pytest.param("remote code", marks=pytest.mark.slow)])
def fresh_weights(request):
    """Freshly initialized weights of an INIT-sized model, from this class and from its copy in a saved folder."""
    if request.param == "remote code":
        return request.getfixturevalue("elsewhere")["fresh"]
    return dict(GPT2ReproForCausalLM(GPT2ReproConfig(**INIT)).named_parameters())


def test_initial_weights_have_gpt2s_spread(fresh_weights):
    residual_std = 0.02 / math.sqrt(2 * INIT["n_layer"])
    matrices = {name: weight for name, weight in fresh_weights.items() if weight.ndim == 2}
    assert len(matrices) == 2 + 4 * INIT["n_layer"]
    wte = matrices["transformer.wte.weight"]
    assert (wte[600:] == 0).all(), "padding rows"
    matrices["transformer.wte.weight"] = wte[:600]
    for name, weight in matrices.items():
        std = residual_std if name.endswith("c_proj.weight") else 0.02
        assert weight.std().item() == pytest.approx(std, rel=0.03), name
        assert abs(weight.mean().item()) < 0.03 * std, name


def test_initial_biases_are_zero_and_layernorms_are_the_identity(fresh_weights):
    vectors = {name: weight for name, weight in fresh_weights.items() if weight.ndim == 1}
    assert len(vectors) == 2 + 8 * INIT["n_layer"]
    for name, vector in vectors.items():
        assert (vector == (1.0 if name.endswith("weight") else 0.0)).all(), name


def test_initializer_range_scales_all_weights():
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**INIT | {"initializer_range": 0.1}))
    assert model.transformer.wte.weight[:600].std().item() == pytest.approx(0.1, rel=0.03)
    c_proj = model.transformer.h[1].mlp.c_proj.weight
    assert c_proj.std().item() == pytest.approx(0.1 / math.sqrt(2 * INIT["n_layer"]), rel=0.03)


def test_initial_loss_is_that_of_a_uniform_guess():
    """ln(V_real) plus half the variance of the logits, 0.02^2 * n_embd: 6.397 + 0.026; 0.06 is four standard errors."""
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**INIT))
    ids = torch.randint(600, (8, 32))
    loss = model(ids, shift_labels=torch.randint(600, (8, 32))).loss.item()
    assert loss == pytest.approx(math.log(600) + 0.02**2 * 128 / 2, abs=0.06)


# ---- Saving, loading, the Hub ----


def test_tie_survives_save_and_load_with_one_copy_on_disk(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert sum(math.prod(shape) for shape in shapes.values()) == model.num_parameters()
    assert list(shapes.values()).count((V, D)) == 1

    loaded = GPT2ReproForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_loading_one_state_dict_into_another_model_keeps_the_tie(model):
    other = GPT2ReproForCausalLM(GPT2ReproConfig(**TINY))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert other.lm_head.weight is other.transformer.wte.weight
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_bf16_survives_save_and_load(model, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = GPT2ReproForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)


def test_saved_folder_contains_the_code_and_the_auto_map(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_gpt2repro.py").read_bytes() == Path(modeling_gpt2repro.__file__).read_bytes()
    assert [path.name for path in tmp_path.glob("*.py")] == ["modeling_gpt2repro.py"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "gpt2repro"
    assert config["auto_map"] == {
        "AutoConfig": "modeling_gpt2repro.GPT2ReproConfig",
        "AutoModel": "modeling_gpt2repro.GPT2ReproModel",
        "AutoModelForCausalLM": "modeling_gpt2repro.GPT2ReproForCausalLM",
        "AutoModelForQuestionAnswering": "modeling_gpt2repro.GPT2ReproForQuestionAnswering",
        "AutoModelForSequenceClassification": "modeling_gpt2repro.GPT2ReproForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_gpt2repro.GPT2ReproForTokenClassification",
    }


@pytest.mark.slow
def test_saved_folder_works_in_a_process_without_the_checkout(elsewhere):
    assert str(Path(__file__).parents[1]) not in elsewhere["path"]
    assert all(Path(source).is_relative_to(elsewhere["modules"]) for source in elsewhere["sources"])
    assert elsewhere["classes"] == ["GPT2ReproForCausalLM", "GPT2ReproModel", "GPT2ReproForCausalLM"]
    assert elsewhere["tied"]
    model, ids = make_model().eval(), torch.arange(12).view(2, 6)
    assert_close(elsewhere["logits"], model(ids).logits, atol=1e-6, rtol=0)
    assert_close(elsewhere["hidden"], model.transformer(ids).last_hidden_state, atol=1e-6, rtol=0)
    assert torch.equal(elsewhere["generated"], model.generate(ids, max_new_tokens=8, do_sample=False))


def test_registered_auto_classes_use_this_module_without_remote_code(model, tmp_path):
    register_auto_classes()
    register_auto_classes()  # idempotent
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is GPT2ReproConfig
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is GPT2ReproForCausalLM


def test_trunk_loads_from_the_language_models_folder(model, ids, tmp_path):
    model.eval().save_pretrained(tmp_path)
    trunk = GPT2ReproModel.from_pretrained(tmp_path)
    assert_close(trunk(ids).last_hidden_state, model.transformer(ids).last_hidden_state, atol=0, rtol=0)


def test_modeling_file_imports_only_torch_transformers_and_the_standard_library():
    tree = ast.parse(Path(modeling_gpt2repro.__file__).read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    modules = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [node.lineno for node in modules if node.level], "a relative import"
    roots = {name.split(".")[0] for name in names + [node.module for node in modules]}
    assert {"torch", "transformers"} <= roots
    assert roots - {"torch", "transformers"} <= sys.stdlib_module_names


# ---- Generation ----

GREEDY = dict(max_new_tokens=12, do_sample=False)
CACHES = {
    "no cache": {"use_cache": False},
    "dynamic": {"use_cache": True},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_greedy_generation_equals_gpt2_with_every_cache(model, ids, cache):
    expected = as_gpt2(model.eval()).generate(ids, **GREEDY, use_cache=False)
    assert expected[:, T:].unique().numel() > 4, "a constant continuation would prove little"
    assert torch.equal(model.generate(ids, **GREEDY, **cache), expected)


def test_cached_logits_equal_uncached(model, ids):
    expected = model.eval()(ids).logits
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([6, 1, 9], dim=1)]
    assert cache.get_seq_length() == T
    assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_left_padded_batch_generates_what_each_prompt_does_alone(ids, cache, attention):
    model = make_model(attn_implementation=attention).eval()
    short, long = ids[:1, :5], ids[1:, :9]
    batch = torch.cat([F.pad(short, (4, 0), value=3), long])
    mask = torch.cat([F.pad(torch.ones_like(short), (4, 0)), torch.ones_like(long)])
    together = model.generate(batch, attention_mask=mask, pad_token_id=3, **GREEDY, **cache)
    assert torch.equal(together[:1, 4:], model.generate(short, **GREEDY))
    assert torch.equal(together[1:], model.generate(long, **GREEDY))


def test_beam_search_equals_gpt2(model, ids):
    beams = dict(max_new_tokens=10, num_beams=4, do_sample=False, return_dict_in_generate=True, output_scores=True)
    outputs, expected = (network.generate(ids, **beams) for network in (model.eval(), as_gpt2(model)))
    assert torch.equal(outputs.sequences, expected.sequences)
    assert_close(outputs.sequences_scores, expected.sequences_scores, atol=1e-5, rtol=0)
    assert not torch.equal(outputs.sequences, model.generate(ids, **beams | {"num_beams": 1}).sequences)


def test_no_padding_id_is_ever_sampled():
    model = make_model(n_embd=8, n_head=2, n_layer=1).eval()
    prompts = torch.randint(V_REAL, (500, 2))
    drawn = model.generate(prompts, max_new_tokens=20, do_sample=True, top_k=0, temperature=5.0)[:, 2:]
    assert drawn.numel() == 10_000
    assert drawn.unique().numel() == V_REAL, "a distribution this flat draws every real token"
    assert drawn.max() < V_REAL

    # The guard matters: the head itself gives padding rows a fifth of the probability, and sampling would draw them.
    with torch.no_grad():
        raw = model.lm_head(model.transformer(prompts).last_hidden_state[:, -1]) / 5.0
    probabilities = raw.softmax(-1)
    assert probabilities[:, V_REAL:].sum(-1).mean() > 0.1
    assert (torch.multinomial(probabilities, 20, replacement=True) >= V_REAL).float().mean() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_padding_ids_have_zero_probability_in_every_dtype(model, ids, dtype):
    logits = model.to(dtype).eval()(ids).logits
    assert logits.dtype == dtype
    assert (logits[..., V_REAL:] == torch.finfo(dtype).min).all() and logits.isfinite().all()
    assert (logits.softmax(-1)[..., V_REAL:] == 0).all()


def test_error_for_a_sequence_longer_than_n_positions_names_both_numbers(model):
    model.eval()
    too_long = r"33 tokens .* n_positions=32"
    model(torch.zeros(1, 32, dtype=torch.long))
    with pytest.raises(ValueError, match=too_long):
        model(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(ValueError, match=too_long):
        model.generate(torch.zeros(1, 30, dtype=torch.long), max_new_tokens=5, do_sample=False)


# ---- Attention kernels, torch.compile, gradient checkpointing ----


def test_training_forward_uses_the_causal_kernel_without_a_mask(model, ids, monkeypatch):
    calls, kernel = [], F.scaled_dot_product_attention

    def recorded(*args, **kwargs):
        calls.append(kwargs)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    model(ids, labels=ids).loss.backward()
    assert len(calls) == LAYERS
    assert all(call["is_causal"] is True and call["attn_mask"] is None for call in calls)


@pytest.mark.slow
def test_compiled_training_forward_is_one_graph_with_the_causal_kernel(model, ids):
    graphs = []

    def record(graph_module, inputs):
        graphs.append(graph_module.graph)
        return graph_module

    torch._dynamo.reset()
    loss = torch.compile(model, fullgraph=True, backend=record)(ids, labels=ids).loss
    (graph,) = graphs
    calls = [node for node in graph.nodes if node.target is F.scaled_dot_product_attention]
    assert len(calls) == LAYERS
    assert all(call.kwargs["is_causal"] is True and call.kwargs["attn_mask"] is None for call in calls)

    expected = model(ids, labels=ids).loss
    assert_close(loss, expected)
    wanted, got = (torch.autograd.grad(each, list(model.parameters())) for each in (expected, loss))
    assert_close(got, wanted, atol=1e-6, rtol=0)


def test_eager_and_sdpa_attention_agree(ids):
    """Also with left padding; the padding positions themselves are meaningless and left out."""
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    results = []
    for attention in ("sdpa", "eager"):
        model = make_model(attn_implementation=attention)
        loss = model(ids, attention_mask=mask, shift_labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        results.append((model.eval()(ids, attention_mask=mask).logits[mask == 1], loss.detach(), gradients(model)))
    for sdpa, eager in zip(*results):
        assert_close(eager, sdpa, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@torch.no_grad()  # torch's flex attention has no backward pass on CPU; compiling its kernel would take half a minute
@torch.compiler.set_stance("force_eager")
def test_flex_attention_agrees_with_sdpa(ids):
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    sdpa, flex = (make_model(attn_implementation=name).eval() for name in ("sdpa", "flex_attention"))
    assert_close(flex(ids).logits, sdpa(ids).logits, atol=1e-5, rtol=0)
    padded = [network(ids, attention_mask=mask).logits[mask == 1] for network in (flex, sdpa)]
    assert_close(*padded, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable:FutureWarning")  # transformers 6 renames it
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_is_bit_exact(ids, reentrant):
    model = make_model(resid_pdrop=0.1, attn_pdrop=0.1)
    runs = []
    model.transformer.h[0].ln_1.register_forward_hook(lambda *_: runs.append(1))

    def loss_and_gradients_of_model():
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.detach(), gradients(model)

    expected = loss_and_gradients_of_model()
    assert len(runs) == 1
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_close(loss_and_gradients_of_model(), expected, atol=0, rtol=0)
    assert len(runs) == 3, "the block should have run again in the backward pass"


# ---- Vocabulary and configuration ----


@pytest.mark.parametrize("new_size, multiple, rows", [(160, None, 160), (200, 64, 256), (120, 64, 128)])
def test_resize_token_embeddings_keeps_the_tie_and_updates_the_real_vocabulary(model, ids, new_size, multiple, rows):
    ids = ids % 100
    with torch.no_grad():
        before = model.eval()(ids).logits
    model.resize_token_embeddings(new_size, pad_to_multiple_of=multiple, mean_resizing=False)
    assert model.config.vocab_size == model.lm_head.out_features == rows
    assert model.config.unpadded_vocab_size == new_size
    assert model.lm_head.weight is model.transformer.wte.weight and model.lm_head.weight.shape == (rows, D)

    logits = model(ids).logits
    assert (model.lm_head.weight[new_size:] == 0).all()
    kept = min(new_size, V_REAL)
    assert_close(logits[..., :kept], before[..., :kept], atol=1e-6, rtol=0)
    assert (logits[..., :new_size] > -1e6).all() and (logits[..., new_size:] < -1e6).all()
    model.train()(ids, labels=ids).loss.backward()
    assert (model.lm_head.weight.grad[new_size:] == 0).all()


def test_resizing_the_trunk_alone_leaves_a_folder_that_loads(model, tmp_path):
    trunk = model.transformer
    trunk.resize_token_embeddings(120)
    assert trunk.config.vocab_size == trunk.config.unpadded_vocab_size == 120
    trunk.save_pretrained(tmp_path)
    assert GPT2ReproModel.from_pretrained(tmp_path).wte.num_embeddings == 120


def test_new_tokens_start_at_the_mean_embedding_as_in_gpt2(model):
    """Not as the padding rows they replace: those are untrained, and such a token can outweigh all others."""
    reference = as_gpt2(model)
    reference.resize_token_embeddings(V_REAL + 5)
    model.resize_token_embeddings(V_REAL + 5, pad_to_multiple_of=64)
    assert_close(model.lm_head.weight[: V_REAL + 5], reference.lm_head.weight, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_embd": 30}, "n_embd=30 is not a multiple of n_head=4"),
        ({"unpadded_vocab_size": 193}, "unpadded_vocab_size=193 .* vocab_size=192"),
        ({"unpadded_vocab_size": 0}, "unpadded_vocab_size=0 .* vocab_size=192"),
        ({"n_inner": 0, "n_embd": 33}, "n_inner=0 must be at least 1\nn_embd=33 is not a multiple of n_head=4"),
        ({"initializer_range": -3}, "initializer_range=-3 must be at least 0"),
        (
            {"n_layer": 10**9, "vocab_size": 10**12},
            "n_layer=1000000000 must be at most 10000\nvocab_size=1000000000000",
        ),
        ({"layer_norm_epsilon": -1}, "layer_norm_epsilon=-1 must be at least 0"),
    ],
)
def test_errors_for_impossible_values_name_them_all(fields, message):
    with pytest.raises(ValueError, match=message):
        GPT2ReproConfig(**TINY | fields)


@pytest.mark.parametrize("rows, real", [(128, 128), (50257, 50257), (50304, 50257), (65536, 65536)])
def test_the_number_of_rows_is_enough_for_a_configuration(rows, real):
    assert GPT2ReproConfig(vocab_size=rows).unpadded_vocab_size == real


@pytest.mark.slow
def test_an_older_transformers_is_told_in_one_line(tmp_path):
    """As 4.57 does, which lacks half of what the file imports."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text('__version__ = "4.57.6"\n')
    (tmp_path / "modeling_gpt2repro.py").write_bytes(Path(modeling_gpt2repro.__file__).read_bytes())
    command = [sys.executable, "-c", "import modeling_gpt2repro"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError: this model needs transformers>=5.17 and torch>=2.11")
    assert "finds transformers 4.57.6; run `pip install" in last_line


def test_config_answers_to_transformers_common_names():
    config = GPT2ReproConfig(**TINY)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (D, LAYERS, HEADS)
    assert config.max_position_embeddings == 32
