"""The model behaves like one that ships with transformers: generation, attention, adapters, compilation, files.

The reference is transformers' own GPT-2 with the same weights, or the same computation in plain torch.
tests/test_modeling.py tests the model itself; here are the features of transformers, PEFT and accelerate, which
require more of a model than the right formula.
"""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from accelerate import disk_offload
from tiny_models import as_gpt2_tensors, gradients
from tokenizers import Tokenizer, models, pre_tokenizers
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DynamicCache,
    EarlyStoppingCallback,
    GenerationConfig,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    StaticCache,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.masking_utils import flash_attention_mask
from transformers.utils import (
    is_flash_attn_2_available,
    is_hqq_available,
    is_kernels_available,
    is_optimum_quanto_available,
)

from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.models.openai_weights import to_gpt2
from modeling_gpt2repro import (
    GPT2ReproConfig,
    GPT2ReproForCausalLM,
    GPT2ReproForQuestionAnswering,
    GPT2ReproForSequenceClassification,
    GPT2ReproForTokenClassification,
    GPT2ReproModel,
    linear_cross_entropy,
    register_auto_classes,
)


V, V_REAL = 192, 150  # embedding rows, real tokens
B, T, D, LAYERS, HEADS, POSITIONS = 2, 16, 32, 2, 4, 64
TINY = dict(vocab_size=V, unpadded_vocab_size=V_REAL, n_positions=POSITIONS, n_embd=D, n_layer=LAYERS, n_head=HEADS)
TINY |= dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
GREEDY = dict(max_new_tokens=12, do_sample=False)
CLOSE = dict(atol=1e-5, rtol=0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@torch.no_grad()
def randomize(model, std=0.2):
    """Give every parameter an effect: no bias is 0 and no LayerNorm weight is 1."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        mean = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
        parameter.normal_(mean, std, generator=generator)
    return model.eval()


def make_model(**fields) -> GPT2ReproForCausalLM:
    return randomize(GPT2ReproForCausalLM(GPT2ReproConfig(**TINY | fields)))


def as_gpt2(model) -> GPT2LMHeadModel:
    """transformers' own GPT-2 with the same weights, attention and mode."""
    reference = to_gpt2(model)
    reference.set_attn_implementation(model.config._attn_implementation)
    return reference.train(model.training)


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def reference(model):
    return as_gpt2(model)


@pytest.fixture
def ids():
    """No token is the padding token 0."""
    return torch.randint(1, V_REAL, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def long_ids():
    return torch.randint(1, V_REAL, (1, POSITIONS), generator=torch.Generator().manual_seed(4))


def calls_of(module) -> list:
    """A list that gains one item per call of the module."""
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def cross_entropy_of(logits, ids):
    return F.cross_entropy(logits[:, :-1, :V_REAL].flatten(0, 1), ids[:, 1:].flatten())


# ---- Generation ----


def generated(network, ids, **kwargs):
    """The sequences, and the real tokens' logits of every step."""
    asked = dict(return_dict_in_generate=True, output_logits=True)
    outputs = network.generate(ids, **GREEDY | asked | kwargs)
    return outputs.sequences, torch.stack(outputs.logits)[..., :V_REAL]


def quantized(backend, nbits):
    config = dict(backend=backend, nbits=nbits, q_group_size=8, residual_length=4)
    return dict(cache_implementation="quantized", cache_config=config)


QUANTO = pytest.mark.skipif(not is_optimum_quanto_available(), reason="optimum-quanto is not installed")
HQQ = pytest.mark.skipif(not is_hqq_available(), reason="hqq is not installed")


@pytest.mark.parametrize(
    "backend, nbits",
    [
        pytest.param("quanto", 4, marks=QUANTO),
        pytest.param("quanto", 2, marks=QUANTO),
        pytest.param("hqq", 4, marks=HQQ),
    ],
)
def test_quantized_cache_generates_as_in_gpt2(model, reference, ids, backend, nbits):
    tokens, logits = generated(model, ids, **quantized(backend, nbits))
    expected_tokens, expected_logits = generated(reference, ids, **quantized(backend, nbits))
    assert torch.equal(tokens, expected_tokens)
    assert_close(logits, expected_logits, atol=1e-4, rtol=0)
    _, exact = generated(model, ids)
    assert (logits - exact).abs().max() > 1e-3, "nothing was quantized"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloaded caches need a GPU")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_cache_generates_as_in_gpt2(model, reference, ids, cache):
    ids = ids.cuda()
    tokens, logits = generated(model.cuda(), ids, cache_implementation=cache)
    expected_tokens, expected_logits = generated(reference.cuda(), ids)
    assert torch.equal(tokens, expected_tokens)
    assert_close(logits, expected_logits, atol=1e-4, rtol=0)


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=POSITIONS),
}


@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
def test_generation_continues_from_the_cache_of_an_earlier_one(model, reference, ids, make_cache):
    expected, _ = generated(reference, ids, use_cache=False)
    cache, inputs = make_cache(model.config), calls_of(model)
    half = model.generate(ids, max_new_tokens=5, do_sample=False, past_key_values=cache)
    assert cache.get_seq_length() == T + 4, "the last token has not been an input yet"
    assert torch.equal(model.generate(half, max_new_tokens=7, do_sample=False, past_key_values=cache), expected)
    assert len(inputs) == 12


WAYS = {
    "static cache, beams": dict(cache_implementation="static", num_beams=4, num_return_sequences=3),
    "prompt in chunks": dict(prefill_chunk_size=5),
    "prompt in chunks, static cache": dict(prefill_chunk_size=5, cache_implementation="static"),
    "classifier-free guidance": dict(guidance_scale=1.5),
    "penalties": dict(repetition_penalty=1.3, no_repeat_ngram_size=2, bad_words_ids=[[3]]),
    "renormalized beams": dict(num_beams=3, renormalize_logits=True),
}


@pytest.mark.parametrize("kwargs", WAYS.values(), ids=WAYS)
def test_generation_equals_gpt2(model, reference, ids, kwargs):
    tokens, logits = generated(model, ids[:1], **kwargs)
    expected_tokens, expected_logits = generated(reference, ids[:1], **kwargs)
    assert torch.equal(tokens, expected_tokens)
    assert_close(logits, expected_logits, **CLOSE)


@pytest.mark.parametrize("fields", [{}, {"n_layer": 1}], ids=["as good", "smaller"])
def test_assisted_generation_is_greedy_generation_in_fewer_calls(model, reference, ids, fields):
    assistant, prompt = make_model(**fields), ids[:1]
    expected, _ = generated(reference, prompt)
    calls, drafts = calls_of(model), calls_of(assistant)
    assert torch.equal(model.generate(prompt, **GREEDY, assistant_model=assistant), expected)
    assert drafts
    if not fields:  # every draft is accepted; the smaller model's are rejected and must be removed from the cache
        assert len(calls) < 12


def test_assisted_sampling_draws_as_gpt2_does(ids):
    model, assistant = (make_model(vocab_size=V_REAL, **fields) for fields in ({}, {"n_layer": 1}))
    drawn = []
    for target, draft in ((model, assistant), (as_gpt2(model), as_gpt2(assistant))):
        torch.manual_seed(3)
        drawn.append(target.generate(ids[:1], max_new_tokens=12, do_sample=True, top_k=0, assistant_model=draft))
    assert torch.equal(*drawn)


def test_prompt_lookup_is_greedy_generation_in_fewer_calls(model, reference, ids):
    prompt, _ = generated(reference, ids[:1], max_new_tokens=20)  # contains the continuation
    prompt = torch.cat([prompt, prompt[:, : T + 2]], dim=1)
    expected, _ = generated(reference, prompt, max_new_tokens=9)
    calls = calls_of(model)
    found = model.generate(prompt, max_new_tokens=9, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)
    assert len(calls) < 9


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}], ids=str)
def test_a_tokenizer_finds_the_stop_strings(model, reference, ids, kwargs):
    tokenizer = build_tokenizer("char", ["".join(map(chr, range(40, 40 + V_REAL)))]).fast
    unstopped = reference.generate(ids[:1], **GREEDY, **kwargs)
    stop = tokenizer.decode(unstopped[0, T + 4])
    asked = dict(stop_strings=[stop], tokenizer=tokenizer, **GREEDY, **kwargs)
    stopped = model.generate(ids[:1], **asked)
    assert torch.equal(stopped, reference.generate(ids[:1], **asked))
    assert not torch.equal(stopped, unstopped)


@pytest.mark.parametrize("kwargs", [{"top_k": 0}, {"top_k": 20, "num_beams": 3}, {"top_p": 0.7}], ids=str)
def test_sampling_draws_as_gpt2_does_under_the_same_seed(ids, kwargs):
    """Without padding rows: with them the random numbers are spread over more bins, and other tokens are drawn."""
    model, drawn = make_model(vocab_size=V_REAL), []
    for network in (model, as_gpt2(model)):
        torch.manual_seed(3)
        drawn.append(network.generate(ids, max_new_tokens=12, do_sample=True, num_return_sequences=3, **kwargs))
    assert torch.equal(*drawn)
    assert drawn[0].shape == (3 * B, T + 12)
    assert len(drawn[0].unique(dim=0)) > B, "copies of a prompt should continue differently"


@pytest.mark.parametrize(
    "warper", [{"top_p": 0.6}, {"min_p": 0.1}, {"typical_p": 0.6}, {"eta_cutoff": 0.01}, {"temperature": 3.0}], ids=str
)
def test_the_sampling_distribution_equals_gpt2s(model, reference, ids, warper):
    """Padding rows change neither the tokens that a sampling method keeps nor their probabilities."""
    asked = dict(max_new_tokens=1, do_sample=True, top_k=0, return_dict_in_generate=True, output_scores=True)
    ours, theirs = (network.generate(ids, **asked, **warper).scores[0].softmax(-1) for network in (model, reference))
    assert_close(ours[:, :V_REAL], theirs, atol=1e-6, rtol=0)
    assert (ours[:, V_REAL:] == 0).all()


@pytest.mark.parametrize("kwargs", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
def test_generation_from_inputs_embeds(model, reference, ids, kwargs):
    def continuations(network):
        embeds = network.get_input_embeddings()(ids)
        alone = network.generate(inputs_embeds=embeds, **GREEDY, **kwargs)
        return alone, network.generate(ids, inputs_embeds=embeds, **GREEDY, **kwargs)

    alone, after_ids = continuations(model)
    assert_close((alone, after_ids), continuations(reference))
    assert torch.equal(after_ids, model.generate(ids, **GREEDY, **kwargs))
    assert torch.equal(after_ids, torch.cat([ids, alone], dim=1))


LONG = {
    "dynamic": {},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 2},
    "static beams": {"cache_implementation": "static", "num_beams": 2},
}


@pytest.mark.parametrize("inputs", ["input_ids", "inputs_embeds"])
@pytest.mark.parametrize("kwargs", LONG.values(), ids=LONG)
def test_generation_ends_at_n_positions(model, reference, ids, long_ids, kwargs, inputs):
    """The last generated token is not an input and needs no position: 60 + 5 tokens fit into 64 positions."""
    prompt = long_ids[:, :60]
    given = {inputs: prompt if inputs == "input_ids" else model.get_input_embeddings()(prompt)}
    full = model.generate(**given, **kwargs, max_new_tokens=5, do_sample=False)
    assert torch.equal(full[:, -5:], reference.generate(prompt, **kwargs, max_new_tokens=5, do_sample=False)[:, 60:])
    with pytest.raises(ValueError, match="65 tokens .* n_positions=64"):
        model.generate(**given, **kwargs, max_new_tokens=6, do_sample=False)

    again = model.generate(ids, **GREEDY, cache_implementation="static")
    assert torch.equal(again, reference.generate(ids, **GREEDY)), "the refused call left state behind"


@pytest.mark.parametrize("kwargs", LONG.values(), ids=LONG)
def test_left_padding_uses_no_positions(model, reference, long_ids, kwargs):
    """A batch may be padded beyond n_positions as long as its real tokens fit."""
    kwargs = kwargs | dict(max_new_tokens=12, do_sample=False)
    prompt = F.pad(long_ids[:, :40], (30, 0))  # 0 is the padding token
    got = model.generate(prompt, attention_mask=(prompt != 0).long(), **kwargs)
    assert torch.equal(got[:, 30:], reference.generate(long_ids[:, :40], **kwargs))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("part", ["language model", "trunk"])
def test_the_cache_has_two_names(model, ids, part, name):
    """transformers 5.24 calls `cache` what earlier releases call `past_key_values`; callers may use either."""
    network = model if part == "language model" else model.transformer
    cache = DynamicCache(config=model.config)
    outputs = [network(ids[:, i : i + 4], **{name: cache})[0] for i in range(0, T, 4)]
    assert cache.get_seq_length() == T
    assert_close(torch.cat(outputs, dim=1), network(ids)[0], **CLOSE)
    with pytest.raises(ValueError, match="two names of one argument"):
        network(ids, cache=cache, past_key_values=DynamicCache(config=model.config))


def test_continuous_batching_generates_what_each_prompt_does_alone(model):
    """Its paged cache and further keywords differ between releases."""
    prompts = [[5, 6, 7, 8], [9, 3, 12], [40, 2, 101, 33, 20, 12, 149]]
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)
    results = model.generate_batch(prompts, config, small, progress_bar=False, warmup=False)
    for prompt, result in zip(prompts, sorted(results.values(), key=lambda result: int(result.request_id[4:]))):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        assert result.generated_tokens == alone[0, len(prompt) :].tolist()


# ---- Keywords ----


def networks(config):
    heads = (GPT2ReproForSequenceClassification, GPT2ReproForTokenClassification, GPT2ReproForQuestionAnswering)
    return [head(copy.deepcopy(config)).eval() for head in (GPT2ReproForCausalLM, GPT2ReproModel, *heads)]


@pytest.mark.parametrize("name", ["caches", "cache_position", "encoder_hidden_states", "sliding_window", "labls"])
def test_no_keyword_is_ignored(model, ids, name):
    for network in networks(model.config):
        with pytest.raises(ValueError, match=f"^{name}: not supported by this language model; leave it out$"):
            network(ids, **{name: ids})
        network(ids, **{name: None})
        network(ids, **{name: False})


def test_keywords_of_training_and_serving_libraries_reach_the_attention_function(model, ids):
    received = []

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        received.append(kwargs)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling).transpose(1, 2), None

    AttentionInterface.register("recording", attend)
    try:
        given = {"cu_seq_lens_q": torch.tensor([0, T]), "cu_seq_lens_k": torch.tensor([0, T])}
        given |= {"max_length_q": T, "max_length_k": T, "seq_idx": torch.zeros(1, T), "is_causal": True}
        given |= {"attention_instances": {0: "vLLM's"}, "forward_batch": "SGLang's"}
        recording = make_model(attn_implementation="recording")
        position_ids = torch.arange(T)[None]
        logits = recording(ids, position_ids=position_ids, num_items_in_batch=7, use_cache=False, **given).logits
        assert_close(logits, model(ids).logits, **CLOSE)
        assert len(received) == LAYERS
        assert all(kwargs[name] is value for kwargs in received for name, value in given.items())
    finally:
        del AttentionInterface._global_mapping["recording"]


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "seq_idx"])
def test_packing_without_position_ids_is_refused(model, ids, name):
    """SDPA and eager attention would let the sequences see each other, and positions would not restart."""
    with pytest.raises(ValueError, match="packed sequences need position_ids"):
        model(ids, **{name: torch.tensor([0, T])})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_is_causal_false_is_honoured_as_in_gpt2(ids, attention):
    model = make_model(attn_implementation=attention)
    logits = model(ids, is_causal=False, use_cache=False).logits
    expected = as_gpt2(model)(ids, is_causal=False, use_cache=False).logits
    assert_close(logits[..., :V_REAL], expected, **CLOSE)
    assert (logits - model(ids).logits).abs().max() > 0.1


def test_skip_logits_leaves_the_loss_alone(model, ids):
    outputs = model(ids, labels=ids, skip_logits=True)
    assert outputs.logits is None
    assert_close(outputs.loss, model(ids, labels=ids).loss)


# ---- Attention ----


def packed(lengths):
    """(ids, position_ids, shift_labels) of one row, and its sequences; no label crosses a sequence boundary."""
    parts = [torch.randint(1, V_REAL, (1, length)) for length in lengths]
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = [F.pad(part[:, 1:], (0, 1), value=-100) for part in parts]
    return torch.cat(parts, dim=1), position_ids, torch.cat(labels, dim=1), parts


@pytest.fixture(params=["sdpa", "eager", "flex_attention"])
def kernel(request):
    if request.param != "flex_attention":
        yield request.param
        return
    # Run eagerly: compiling the kernel takes half a minute. On the CPU it has no backward pass.
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        yield request.param


UNCOMPILED_FLEX = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_right_padding_changes_no_real_position(ids, attention):
    model = make_model(attn_implementation=attention)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    logits = model(ids.masked_fill(mask == 0, 0), attention_mask=mask).logits
    assert_close(logits[0, :9], model(ids[:1, :9]).logits[0], **CLOSE)
    assert_close(logits[1], model(ids[1:]).logits[0], **CLOSE)
    expected = as_gpt2(model)(ids.masked_fill(mask == 0, 0), attention_mask=mask).logits
    assert_close(logits[mask == 1][..., :V_REAL], expected[mask == 1], **CLOSE)


@UNCOMPILED_FLEX
def test_left_padding_with_its_position_ids_changes_no_real_position(ids, kernel):
    """As `generate` calls the model."""
    model = make_model(attn_implementation=kernel)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=position_ids).logits
    expected = as_gpt2(make_model())
    assert_close(logits[0, 5:, :V_REAL], expected(ids[:1, 5:]).logits[0], **CLOSE)
    assert_close(logits[1, :, :V_REAL], expected(ids[1:]).logits[0], **CLOSE)


@UNCOMPILED_FLEX
@pytest.mark.parametrize("lengths", [[9, 7], [40, 1, 50, 30]], ids=["short", "longer than n_positions"])
def test_packed_sequences_do_not_attend_to_each_other(kernel, lengths):
    """One row of several sequences, separated by position_ids that restart at 0."""
    model = make_model(attn_implementation=kernel)
    ids, position_ids, _, parts = packed(lengths)
    logits = model(ids, position_ids=position_ids, use_cache=False).logits
    reference = as_gpt2(make_model())
    alone = torch.cat([reference(part).logits for part in parts], dim=1)
    assert_close(logits[..., :V_REAL], alone, **CLOSE)


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable:FutureWarning")  # transformers 6 renames it
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "variable_length"])
def test_training_on_a_packed_row_equals_training_on_its_sequences(attention, checkpointing, variable_length):
    model = make_model(attn_implementation=attention).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, position_ids, shift_labels, parts = packed([9, 20, 7])
    reference = as_gpt2(make_model()).train()
    expected = sum(reference(part, labels=part, num_items_in_batch=33).loss for part in parts)
    loss = model(ids, position_ids=position_ids, shift_labels=shift_labels).loss
    assert_close(loss, expected, **CLOSE)
    loss.backward()
    expected.backward()
    assert_close(as_gpt2_tensors(gradients(model), V_REAL), gradients(reference), **CLOSE)


@pytest.fixture
def variable_length():
    """An attention function registered under that name; the list records the position_ids of each call.

    It treats one row without a mask as flash attention does: sequences start where position_ids are 0. transformers
    builds no mask for such kernels.
    """
    received = []

    def attend(module, query, key, value, attention_mask, scaling=None, position_ids=None, **kwargs):
        assert attention_mask is None
        received.append(position_ids)
        rows = torch.arange(query.shape[2]) if position_ids is None else position_ids[0]
        lengths = (rows == 0).nonzero()[:, 0].diff(append=torch.tensor([len(rows)])).tolist()
        parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)))
        mixed = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling) for q, k, v in parts]
        return torch.cat(mixed, dim=2).transpose(1, 2), None

    AttentionInterface.register("variable_length", attend)
    AttentionMaskInterface.register("variable_length", flash_attention_mask)
    yield received
    del AttentionInterface._global_mapping["variable_length"]
    del AttentionMaskInterface._global_mapping["variable_length"]


def test_position_ids_reach_every_layers_attention_function(variable_length):
    """Flash attention separates packed sequences by them alone."""
    model = make_model(attn_implementation="variable_length")
    ids, position_ids, _, parts = packed([9, 20, 7])
    logits = model(ids, position_ids=position_ids, use_cache=False).logits
    assert len(variable_length) == LAYERS
    assert all(torch.equal(received, position_ids) for received in variable_length)
    reference = as_gpt2(make_model())
    assert_close(logits[..., :V_REAL], torch.cat([reference(part).logits for part in parts], dim=1), **CLOSE)


@pytest.mark.skipif(is_flash_attn_2_available() or is_kernels_available(), reason="flash attention is installed")
def test_missing_flash_attention_is_reported_as_for_gpt2(model, reference):
    """A model that does not declare support raises a ValueError instead, 'does not support Flash Attention'."""
    register_auto_classes()
    messages = []
    for network in (model, reference):
        with pytest.raises(ImportError, match="(?i)flash.?att") as raised:
            config = copy.deepcopy(network.config)
            AutoModelForCausalLM.from_config(config, attn_implementation="flash_attention_2")
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


# ---- The loss with adapters, offloading and a frozen head ----


def with_lora(model, targets):
    """LoRA with random weights, so that neither factor is 0; lora_B of an unpadded head is cut to the real tokens."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    adapted, generator = peft.get_peft_model(model, config), torch.Generator().manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            rows = V if "lm_head.lora_B" in name else len(parameter)
            values = torch.randn(rows, parameter.shape[1], generator=generator)
            parameter.data.copy_(0.05 * values[: len(parameter)])
    return adapted.train()


# PEFT warns about a tied head and about Conv1D, and uses a deprecated name of transformers.
QUIET_PEFT = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.*is_gradient_checkpointing:FutureWarning")
LORA = {"head": ["lm_head"], "blocks": ["c_attn", "c_proj", "c_fc"], "both": ["c_attn", "lm_head"]}


@QUIET_PEFT
@pytest.mark.parametrize("targets", LORA.values(), ids=LORA)
def test_lora_trains_as_on_gpt2(model, reference, ids, targets):
    ours, theirs = with_lora(model, targets), with_lora(reference, targets)
    losses = []
    optimizers = [torch.optim.AdamW(network.parameters(), lr=1e-2, eps=1e-3) for network in (ours, theirs)]
    for _ in range(4):
        loss, expected = (network(input_ids=ids, labels=ids).loss for network in (ours, theirs))
        assert_close(loss, expected, **CLOSE)
        assert_close(loss, cross_entropy_of(ours(input_ids=ids).logits, ids), **CLOSE)
        losses.append(loss.item())
        loss.backward()
        expected.backward()
        theirs_by_name = gradients(theirs)
        for name, gradient in gradients(ours).items():
            if "lora_" in name:
                assert gradient.abs().max() > 1e-4, f"{name} has no gradient"
                assert_close(gradient[: len(theirs_by_name[name])], theirs_by_name[name], **CLOSE)
            else:
                assert gradient is None, name
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True) and losses[0] - losses[-1] > 0.02


@QUIET_PEFT
@pytest.mark.parametrize("targets", LORA.values(), ids=LORA)
def test_lora_survives_saving_and_merging(ids, targets, tmp_path):
    """Untied: merging an adapter into a tied head also changes the embedding, in GPT-2 as well."""
    peft = pytest.importorskip("peft")
    model = make_model(tie_word_embeddings=False)
    adapted = with_lora(copy.deepcopy(model), targets).eval()
    logits, loss = adapted(input_ids=ids).logits, adapted(input_ids=ids, labels=ids).loss
    assert (logits - model(ids).logits).abs().max() > 0.1, "the adapter is too weak to make a difference"

    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert_close(again(input_ids=ids).logits, logits, atol=0, rtol=0)

    merged = adapted.merge_and_unload()
    assert type(merged) is GPT2ReproForCausalLM and type(merged.lm_head) is torch.nn.Linear
    assert_close(merged(ids).logits, logits, **CLOSE)
    assert_close(merged(ids, labels=ids).loss, loss, **CLOSE)


TRUNK_ON_CPU = {f"transformer.{name}": "cpu" for name in ("wte", "wpe", "drop", "h", "ln_f")}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_loss_with_a_head_offloaded_to_disk(ids, tied, training, tmp_path):
    model = make_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    places = TRUNK_ON_CPU | {"lm_head": "disk"} | ({"transformer.wte": "disk"} if tied else {})
    kwargs = dict(device_map=places, offload_folder=tmp_path / "offload")
    offloaded = GPT2ReproForCausalLM.from_pretrained(tmp_path, **kwargs)
    assert offloaded.lm_head.weight.is_meta
    labels = ids.masked_fill(ids < 40, -100)
    for kwargs in ({}, {"num_items_in_batch": 7}):
        got, expected = (network.train(training)(ids, labels=labels, **kwargs) for network in (offloaded, model))
        assert_close(got.loss, expected.loss, **CLOSE)
        assert (got.logits is None) == training


def test_loss_with_a_model_offloaded_to_disk(model, ids, tmp_path):
    expected = model(ids, labels=ids)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    outputs = model(ids, labels=ids)
    assert_close((outputs.loss, outputs.logits), (expected.loss, expected.logits), **CLOSE)


def head_gradients(model, ids):
    """The gradients of parameters and hidden states, and the shapes of the tensors saved for the backward pass."""
    shapes, hidden = [], model.transformer(ids).last_hidden_state.detach().flatten(0, 1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: shapes.append(tensor.shape) or tensor, lambda t: t):
        loss = linear_cross_entropy(hidden, model.lm_head.weight, ids.flatten(), V_REAL)
    (gradient,) = torch.autograd.grad(loss, hidden)
    model(ids, labels=ids).loss.backward()
    return gradients(model), gradient, shapes


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_frozen_head_has_no_gradient_and_changes_no_other(ids, tied):
    model = make_model(tie_word_embeddings=tied).train()
    expected, expected_hidden, saved = head_gradients(copy.deepcopy(model), ids)
    assert (V, D) in saved, "the gradient of the head's weight should be there"
    model.lm_head.weight.requires_grad_(False)
    got, hidden, saved = head_gradients(model, ids)
    assert (V, D) not in saved
    assert torch.equal(hidden, expected_hidden)
    frozen = "transformer.wte.weight" if tied else "lm_head.weight"
    assert got.pop(frozen) is None and expected.pop(frozen).abs().max() > 1e-3
    assert_close(got, expected, atol=0, rtol=0)


def test_loss_of_a_model_quantized_by_torchao(ids):
    """Its weights are a subclass of Tensor, which only the head's own forward knows how to multiply."""
    quantization = pytest.importorskip("torchao.quantization")
    model = make_model(tie_word_embeddings=False)
    exact = model(ids, labels=ids).loss
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(model.lm_head.weight) is not torch.nn.Parameter, "the head was not quantized"
    outputs = model(ids, labels=ids)
    assert_close(outputs.loss, cross_entropy_of(outputs.logits, ids), **CLOSE)
    assert 0 < (outputs.loss - exact).abs() < 0.2


# ---- Trainer ----


LOGGED = {"loss", "eval_loss", "eval_accuracy"}


class Rows(torch.utils.data.Dataset):
    """Sixteen sequences that count upwards from different tokens: learned within a few steps.

    The first token has no label: Trainer would count it for GPT2LMHeadModel, whose loss then is 15/16 of the mean.
    """

    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = torch.arange(i, i + T)
        return {"input_ids": ids, "labels": ids.masked_fill(ids == i, -100)}


def train_with_trainer(network, folder, callbacks=(), **arguments):
    settings = dict(num_train_epochs=6, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, seed=1)
    settings |= dict(per_device_eval_batch_size=4, eval_strategy="epoch", save_strategy="epoch", save_total_limit=2)
    settings |= dict(report_to="none", use_cpu=True, disable_tqdm=True)

    def compute_metrics(prediction):
        guesses, labels = prediction.predictions[:, :-1].argmax(-1), prediction.label_ids[:, 1:]
        return {"accuracy": float((guesses == labels).mean())}

    trainer = Trainer(
        model=network,
        args=TrainingArguments(output_dir=folder, **settings | arguments),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        compute_metrics=compute_metrics,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"label_smoothing_factor": 0.1}], ids=["plain", "label smoothing"])
def test_trainer_trains_and_evaluates_as_with_gpt2(tmp_path, arguments):
    model = make_model(vocab_size=V_REAL, pad_token_id=None)
    histories = []
    for network, name in ((as_gpt2(model), "theirs"), (model, "ours")):
        trainer = train_with_trainer(network, tmp_path / name, num_train_epochs=3, **arguments)
        rows = trainer.state.log_history
        histories.append([{key: row[key] for key in LOGGED & row.keys()} for row in rows])
    assert sum("eval_loss" in row for row in histories[0]) == 3
    for theirs, ours in zip(*histories, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
    assert histories[1][-2]["eval_loss"] < 0.7 * histories[1][0]["loss"]


def test_trainer_stops_early_and_keeps_the_best_model(tmp_path):
    arguments = dict(load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False)
    arguments |= dict(num_train_epochs=30, learning_rate=0.2, lr_scheduler_type="constant")
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    trainer = train_with_trainer(make_model(vocab_size=V_REAL), tmp_path, [stop], **arguments)
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(losses) < 30, "it was not stopped"
    assert losses[-1] > min(losses)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-5)
    assert trainer.model.lm_head.weight is trainer.model.transformer.wte.weight


# ---- torch.compile, torch.export ----


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounter()  # runs the graphs eagerly
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_training_loss_needs_few_graphs_for_many_lengths(model, counter):
    compiled = torch.compile(model.train(), fullgraph=True, backend=counter)
    for length in (16, 12, 9, 5, 7, 64, 15, 33, 10, 6, 4, 13):
        ids = torch.randint(V_REAL, (B, length))
        assert_close(compiled(ids, labels=ids).loss, model(ids, labels=ids).loss)
    assert counter.frame_count <= 3


def test_compiled_decoding_step_is_one_graph(model, reference, ids, counter):
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    cache, steps = StaticCache(config=model.config, max_cache_len=30), []
    with torch.no_grad():
        model(ids[:, :6], past_key_values=cache)
        for t in range(6, T):
            steps.append(compiled(ids[:, t : t + 1], past_key_values=cache).logits[..., :V_REAL])
        assert_close(torch.cat(steps, dim=1), reference(ids).logits[:, 6:], **CLOSE)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_exported_forward_equals_eager_at_every_length(model):
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    batch, length = torch.export.Dim("batch", max=8), torch.export.Dim("length", max=POSITIONS)
    example = torch.zeros(2, 9, dtype=torch.long)
    program = torch.export.export(Logits(), (example,), dynamic_shapes={"ids": {0: batch, 1: length}})
    for shape in ((3, 5), (1, POSITIONS), (8, 17)):
        ids = torch.randint(V_REAL, shape)
        assert_close(program.module()(ids), model(ids).logits, **CLOSE)


# ---- Saving, loading, placing ----


def test_shards_load_as_one_model(model, ids, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = {path.name for path in tmp_path.glob("*.safetensors")}
    assert len(shards) > 3 and shards == set(index["weight_map"].values())
    assert not {"lm_head.weight", "transformer.wte.weight"} <= set(index["weight_map"]), "the tie is saved twice"

    loaded = GPT2ReproForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)
    trunk = GPT2ReproModel.from_pretrained(tmp_path)
    assert torch.equal(trunk(ids).last_hidden_state, model.transformer(ids).last_hidden_state)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, {"transformer": "cpu", "lm_head": "cpu"}], ids=str)
def test_device_map_places_the_model_and_keeps_the_tie(model, ids, device_map, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = GPT2ReproForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    outputs, expected = (network(ids, labels=ids) for network in (loaded, model))
    assert torch.equal(outputs.logits, expected.logits) and torch.equal(outputs.loss, expected.loss)


def test_model_built_on_meta_takes_its_weights_by_assignment(model, ids):
    with torch.device("meta"):
        empty = GPT2ReproForCausalLM(copy.deepcopy(model.config)).eval()
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    empty.load_state_dict(state, assign=True)
    empty.tie_weights()
    assert empty.lm_head.weight is empty.transformer.wte.weight
    assert empty.transformer.wte.weight.data_ptr() == state["transformer.wte.weight"].data_ptr(), "a copy was made"
    assert torch.equal(empty(ids).logits, model(ids).logits)
    assert torch.equal(empty.generate(ids, **GREEDY), model.generate(ids, **GREEDY))


@pytest.mark.parametrize("dtype, precision", [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)], ids=str)
def test_float32_weights_load_in_half_precision(model, ids, dtype, precision, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = GPT2ReproForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == loaded.config.dtype == dtype
    rounded = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    assert_close(loaded.state_dict(), rounded, atol=0, rtol=0)
    outputs, expected = (network(ids, labels=ids) for network in (loaded, model))
    logits, wanted = outputs.logits[..., :V_REAL].float(), expected.logits[..., :V_REAL]
    assert (logits - wanted).norm() / wanted.norm() < 8 * precision  # the roundings of two blocks add up to about 2
    assert outputs.loss.dtype == torch.float32
    assert_close(outputs.loss, expected.loss, atol=0.02, rtol=0)


def test_embeddings_can_be_read_replaced_and_tied_again(model, ids):
    assert model.get_input_embeddings() is model.transformer.wte is model.base_model.get_input_embeddings()
    assert model.get_output_embeddings() is model.lm_head
    assert model.transformer.get_output_embeddings() is None

    embedding = torch.nn.Embedding(V, D)
    model.set_input_embeddings(embedding)
    assert model.transformer.wte is embedding and model.lm_head.weight is not embedding.weight
    model.tie_weights()
    assert model.lm_head.weight is embedding.weight
    assert_close(model(ids).logits[..., :V_REAL], as_gpt2(model)(ids).logits, **CLOSE)

    head = torch.nn.Linear(D, V, bias=False)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is model.lm_head is head
    expected = F.linear(model.transformer(ids).last_hidden_state, head.weight)
    assert_close(model(ids).logits[..., :V_REAL], expected[..., :V_REAL], **CLOSE)


def test_config_survives_every_serialization(tmp_path):
    changed = TINY | dict(n_inner=40, resid_pdrop=0.1, bias=False, use_cache=False, tie_word_embeddings=False)
    config = GPT2ReproConfig(**changed)
    config.save_pretrained(tmp_path)
    written = {
        "dict": GPT2ReproConfig.from_dict(config.to_dict()),
        "difference to the defaults": GPT2ReproConfig.from_dict(config.to_diff_dict()),
        "json": GPT2ReproConfig.from_dict(json.loads(config.to_json_string())),
        "file": GPT2ReproConfig.from_pretrained(tmp_path),
    }
    for form, again in written.items():
        assert {name: getattr(again, name) for name in changed} == changed, form
        assert again.auto_map == config.auto_map, form
        assert again.to_dict() == config.to_dict(), form


# ---- Classification and question answering ----


def make_classifiers(num_labels=3, **fields):
    """Ours and transformers', with the same weights."""
    causal = make_model(num_labels=num_labels, **fields)
    ours = GPT2ReproForSequenceClassification(copy.deepcopy(causal.config)).eval()
    ours.transformer.load_state_dict(causal.transformer.state_dict())
    torch.nn.init.normal_(ours.score.weight)
    gpt2 = to_gpt2(causal)
    gpt2.config.num_labels = num_labels
    theirs = GPT2ForSequenceClassification(gpt2.config).eval()
    theirs.transformer.load_state_dict(gpt2.transformer.state_dict())
    theirs.score.load_state_dict(ours.score.state_dict())
    return ours, theirs


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_classifier_logits_equal_gpt2(ids, side):
    """The logits depend on the last real token's hidden state only, wherever that token is."""
    ours, theirs = make_classifiers()
    kwargs = {}
    if side != "none":
        pads = torch.zeros(B, 4, dtype=torch.long)
        ids = torch.cat([pads, ids] if side == "left" else [ids, pads], dim=1)
        kwargs["attention_mask"] = (ids != 0).long()
    logits = ours(ids, **kwargs).logits
    assert logits.shape == (B, 3)
    assert_close(logits, theirs(ids, **kwargs).logits, **CLOSE)
    last = ours.transformer(ids, **kwargs).last_hidden_state[:, T + 3 if side == "left" else T - 1]
    assert_close(logits, last @ ours.score.weight.T, **CLOSE)


CLASSES = {
    "single label": (3, torch.tensor([0, 2]), lambda logits, labels: F.cross_entropy(logits, labels)),
    "multi label": (
        3,
        torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]),
        lambda logits, labels: F.binary_cross_entropy_with_logits(logits, labels),
    ),
    "regression": (1, torch.tensor([0.5, -2.0]), lambda logits, labels: F.mse_loss(logits[:, 0], labels)),
}


@pytest.mark.parametrize("num_labels, labels, loss_of", CLASSES.values(), ids=CLASSES)
def test_classifier_loss_and_gradients_equal_gpt2(ids, num_labels, labels, loss_of):
    ours, theirs = make_classifiers(num_labels)
    outputs, expected = (network.train()(ids, labels=labels) for network in (ours, theirs))
    assert_close(outputs.loss, expected.loss, **CLOSE)
    assert_close(outputs.loss, loss_of(outputs.logits, labels), **CLOSE)
    outputs.loss.backward()
    expected.loss.backward()
    for name, gradient in as_gpt2_tensors(gradients(ours), V_REAL).items():
        wanted = gradients(theirs)[name]
        assert (gradient - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


def test_classifier_without_a_padding_token_refuses_a_batch_as_gpt2_does(ids):
    messages = []
    for network in make_classifiers(pad_token_id=None):
        assert network(ids[:1]).logits.shape == (1, 3)
        with pytest.raises(ValueError, match="no padding token") as raised:
            network(ids)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def make_heads(ours_class, theirs_class, names):
    """Ours and transformers' with the same weights; names: ours to theirs, of the head."""
    causal = make_model(num_labels=3)
    ours, gpt2 = ours_class(copy.deepcopy(causal.config)).eval(), to_gpt2(causal)
    ours.transformer.load_state_dict(causal.transformer.state_dict())
    gpt2.config.num_labels = 3
    theirs = theirs_class(gpt2.config).eval()
    theirs.transformer.load_state_dict(gpt2.transformer.state_dict())
    for our_name, their_name in names.items():
        theirs.get_submodule(their_name).load_state_dict(ours.get_submodule(our_name).state_dict())
    return ours, theirs


def assert_same_head(ours, theirs, ids, labels, fields):
    outputs, expected = (network(ids, **labels) for network in (ours, theirs))
    for field in ("loss", *fields):
        assert_close(outputs[field], expected[field], **CLOSE)
    outputs.loss.backward()
    expected.loss.backward()
    assert ours.get_input_embeddings() is ours.transformer.wte
    got, wanted = (network.transformer.wte.weight.grad[:V_REAL] for network in (ours, theirs))
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_token_classifier_equals_gpt2(ids):
    ours, theirs = make_heads(GPT2ReproForTokenClassification, GPT2ForTokenClassification, {"score": "classifier"})
    assert ours.dropout.p == theirs.dropout.p
    assert_same_head(ours, theirs, ids, {"labels": ids % 3}, ["logits"])


def test_question_answering_equals_gpt2(ids):
    ours, theirs = make_heads(GPT2ReproForQuestionAnswering, GPT2ForQuestionAnswering, {"qa_outputs": "qa_outputs"})
    labels = {"start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([3, 9])}
    assert_same_head(ours, theirs, ids, labels, ["start_logits", "end_logits"])


CLASSIFY_ELSEWHERE = """
import sys
import torch
from transformers import AutoModelForSequenceClassification

ids, results = torch.load("ids.pt"), {"path": sys.path}
for name in ("classifier", "language_model"):
    model, info = AutoModelForSequenceClassification.from_pretrained(
        sys.argv[1] + "/" + name, num_labels=3, trust_remote_code=True, output_loading_info=True
    )
    with torch.no_grad():
        results[name] = {
            "class": type(model).__name__,
            "missing": sorted(info["missing_keys"]),
            "score": model.score.weight.detach().clone(),
            "logits": model(ids).logits,
            "hidden": model.transformer(ids).last_hidden_state,
        }
torch.save(results, "result.pt")
"""


@pytest.mark.slow
def test_classifier_loads_in_a_process_without_the_checkout(ids, tmp_path):
    classifier, _ = make_classifiers()
    language_model = make_model()
    classifier.save_pretrained(tmp_path / "classifier")
    language_model.save_pretrained(tmp_path / "language_model")
    home = tmp_path / "elsewhere"
    home.mkdir()
    torch.save(ids, home / "ids.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hf"), "HF_MODULES_CACHE": str(home / "modules")}
    command = [sys.executable, "-I", "-c", CLASSIFY_ELSEWHERE, str(tmp_path)]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    results = torch.load(home / "result.pt")
    assert os.path.dirname(os.path.dirname(__file__)) not in results["path"]

    saved, fresh = results["classifier"], results["language_model"]
    assert saved["class"] == fresh["class"] == "GPT2ReproForSequenceClassification"
    assert saved["missing"] == [] and fresh["missing"] == ["score.weight"]
    assert_close(saved["logits"], classifier(ids).logits, atol=1e-6, rtol=0)
    assert_close(fresh["hidden"], language_model.transformer(ids).last_hidden_state, atol=1e-6, rtol=0)
    assert fresh["score"].shape == (3, D)
    assert 0.01 < fresh["score"].std() < 0.03, "the new layer should be N(0, 0.02)"


# ---- The pipeline ----


def test_pipeline_generates_a_left_padded_batch_as_gpt2_does(model, reference):
    words = {f"w{i}": i for i in range(V_REAL)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w1", pad_token="w0", eos_token="w2", padding_side="left"
    )
    prompts = ["w5 w80 w9", "w3 w7 w101 w33 w20 w12 w149", "w44"]
    texts = []
    for network, batch_size in ((model, 3), (model, 1), (reference, 3)):
        generate = pipeline("text-generation", model=network, tokenizer=tokenizer, device="cpu")
        outputs = generate(prompts, max_new_tokens=8, do_sample=False, batch_size=batch_size, return_full_text=False)
        texts.append([output[0]["generated_text"].split() for output in outputs])
    assert texts[0] == texts[1] == texts[2]
    assert [len(text) for text in texts[0]] == [8, 8, 8]
    assert len({word for text in texts[0] for word in text}) > 4, "a constant continuation would prove little"


# ---- The size of GPT-2 124M ----


def full_size():
    """GPT-2 124M, ours and transformers', with weights of the initial scale and no zero bias; and token ids."""
    with torch.device("meta"):
        model = GPT2ReproForCausalLM(GPT2ReproConfig())
    model = randomize(model.to_empty(device="cpu"), std=0.02)
    model.tie_weights()
    model.transformer.wte.weight.data[50257:] = 0
    return model, as_gpt2(model), torch.randint(50257, (2, 64))


@pytest.mark.slow
def test_full_size_step_equals_gpt2():
    """Forward pass, backward pass and a step of AdamW in float32.

    Logits, loss and the weights after the step agree to 1e-5. The scale of gradients varies by orders of magnitude
    between parameters, so each is held to 1e-5 of its own largest element.
    """
    model, reference, ids = full_size()
    with torch.no_grad():
        assert_close(model(ids).logits[..., :50257], reference(ids).logits, **CLOSE)
    loss, expected = model.train()(ids, labels=ids).loss, reference.train()(ids, labels=ids).loss
    assert_close(loss, expected, **CLOSE)
    loss.backward()
    expected.backward()
    got, wanted = as_gpt2_tensors(gradients(model), 50257), gradients(reference)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (got[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name

    for network in (model, reference):
        # Adam normalizes gradients by their size, and so turns the rounding noise of a zero gradient, like that of a
        # key's bias, into a full step of 1e-3. This epsilon is above the noise and below most gradients.
        torch.optim.AdamW(network.parameters(), lr=1e-3, eps=1e-5, weight_decay=0.1).step()
    assert_close(as_gpt2_tensors(dict(model.named_parameters()), 50257), dict(reference.named_parameters()), **CLOSE)


@pytest.mark.slow
@torch.no_grad()
def test_full_size_bf16_error_is_no_larger_than_gpt2s():
    model, reference, ids = full_size()
    exact = reference(ids).logits
    ours, theirs = (network.bfloat16()(ids).logits[..., :50257].float() - exact for network in (model, reference))
    assert theirs.norm() > 1e-3 * exact.norm(), "nothing was rounded"
    assert ours.norm() <= 1.5 * theirs.norm()
    assert ours.abs().max() <= 1.5 * theirs.abs().max()
