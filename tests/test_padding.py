"""Padding rows exist in training only: what is opened, exported or published looks like a plain GPT-2 to everyone."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import publish
from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.hub.model_card import model_card
from gpt2repro.models.folder import save_model_folder
from gpt2repro.models.openai_weights import from_gpt2, open_gpt2, to_gpt2
from gpt2repro.models.padding import padded, unpadded, without_padding
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM


LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?'\n0123456789"
V, ROWS, D = len(LETTERS), 64, 32
SIZES = dict(n_positions=32, n_embd=D, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None)
CLOSE = dict(atol=1e-5, rtol=0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("char", [LETTERS]).fast


@pytest.fixture
def ids():
    return torch.randint(V, (2, 16), generator=torch.Generator().manual_seed(1))


def in_training(**fields) -> GPT2ReproForCausalLM:
    """A model as the trainer has it, with weights large enough to matter; its padding rows are 0."""
    model = GPT2ReproForCausalLM(GPT2ReproConfig(vocab_size=ROWS, unpadded_vocab_size=V, **SIZES | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        for layer in (model.transformer.wte, model.lm_head):
            layer.weight[V:] = 0
    return model


@pytest.fixture
def model():
    return in_training()


def assert_is_plain(model):
    assert model.config.vocab_size == model.config.unpadded_vocab_size == V
    assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (V, D)
    assert model.num_parameters() == to_gpt2(model).num_parameters()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_without_padding_the_function_is_the_same_and_the_weights_are_shared(ids, tied):
    model = in_training(tie_word_embeddings=tied, attn_implementation="eager")
    stripped = without_padding(model)
    assert_is_plain(stripped)
    assert (stripped.lm_head.weight is stripped.transformer.wte.weight) == tied
    outputs, expected = stripped(ids, labels=ids), model(ids, labels=ids)
    assert_close(outputs.loss, expected.loss, **CLOSE)
    assert_close(outputs.logits, expected.logits[..., :V], **CLOSE)
    assert model.config.vocab_size == ROWS and model.lm_head.weight.shape == (ROWS, D), "the trained model was changed"
    ours, theirs = (network.transformer.h[1].mlp.c_fc.weight for network in (stripped, model))
    assert ours.data_ptr() == theirs.data_ptr(), "a copy was made"
    assert not stripped.training and stripped.config._attn_implementation == "eager"
    assert without_padding(stripped) is stripped


def test_without_padding_leaves_transformers_own_model_alone(model):
    gpt2 = to_gpt2(model)
    assert without_padding(gpt2) is gpt2


def test_configurations_are_padded_and_unpadded_without_changing_the_original():
    config = GPT2ReproConfig(vocab_size=V, **SIZES)
    assert (padded(config).vocab_size, padded(config).unpadded_vocab_size) == (ROWS, V)
    assert unpadded(padded(config)).to_dict() == config.to_dict()
    assert config.vocab_size == V


def test_a_model_folder_has_no_trace_of_padding(model, tokenizer, ids, tmp_path):
    save_model_folder(tmp_path / "model", model, tokenizer, model_card(model, "x"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["vocab_size"] == config["unpadded_vocab_size"] == V
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert weights["transformer.wte.weight"].shape == (V, D)
    assert ROWS not in {size for tensor in weights.values() for size in tensor.shape}
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"{V} tokens, {without_padding(model).num_parameters():,} parameters" in card and "padding" not in card
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert_close(opened(ids).logits, model(ids).logits[..., :V], **CLOSE)


@pytest.fixture
def old_folder(model, tokenizer, tmp_path):
    """As earlier releases published it, and as a checkpoint of a run is today: with padding rows."""
    folder = tmp_path / "old"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == ROWS
    return folder


def test_a_folder_with_padding_opens_without_it(old_folder, model, ids, tmp_path):
    as_published = AutoModelForCausalLM.from_pretrained(old_folder, trust_remote_code=True)
    assert torch.equal(as_published(ids).logits, model(ids).logits)
    opened = from_gpt2(old_folder)
    assert_is_plain(opened)
    assert_close(opened(ids).logits, model(ids).logits[..., :V], **CLOSE)
    publish.main([str(old_folder), "--to", str(tmp_path / "published")])
    assert_is_plain(AutoModelForCausalLM.from_pretrained(tmp_path / "published", trust_remote_code=True))


@pytest.mark.parametrize("kind", ["with padding", "without", "gpt2"])
def test_what_opens_a_model_to_train_pads_it_again(kind, old_folder, model, ids, tmp_path):
    folder = old_folder
    if kind != "with padding":
        folder = tmp_path / "plain"
        (to_gpt2(model) if kind == "gpt2" else without_padding(model)).save_pretrained(folder)
    stored = open_gpt2(folder)
    assert stored.config.vocab_size == stored.config.unpadded_vocab_size == V
    to_train = stored.build(padded(stored.config)).train()
    assert to_train.lm_head.weight.shape == (ROWS, D)
    assert (to_train.lm_head.weight[V:] == 0).all()
    assert to_train.lm_head.weight is to_train.transformer.wte.weight
    loss = to_train(ids, labels=ids).loss
    assert_close(loss, model(ids, labels=ids).loss, **CLOSE)
    loss.backward()
    assert (to_train.lm_head.weight.grad[V:] == 0).all()


# ---- what others do with the model ----


def test_distillation_at_a_low_temperature_is_finite(old_folder, ids):
    """The logits of padding rows are the dtype's minimum: divided by 0.5 they would be -inf, and 0 * -inf is NaN."""
    teacher, student = from_gpt2(old_folder), from_gpt2(old_folder)
    student.transformer.ln_f.weight.data *= 0.9
    log_p, log_q = ((network(ids).logits / 0.5).log_softmax(-1) for network in (teacher, student))
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert divergence.isfinite() and divergence > 0
    divergence.backward()
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters())


@pytest.mark.parametrize("assistant", ["ours", "gpt2"])
def test_each_format_assists_the_other(old_folder, ids, assistant):
    ours = from_gpt2(old_folder)
    main, helper = (to_gpt2(ours), ours) if assistant == "ours" else (ours, to_gpt2(ours))
    options = dict(max_new_tokens=10, do_sample=False)
    expected = main.generate(ids[:1], **options)
    assert torch.equal(main.generate(ids[:1], assistant_model=helper, **options), expected)


def with_low_logits() -> GPT2LMHeadModel:
    """A GPT-2 whose logits lie around -35, as OpenAI's do: every embedding has a component that ln_f's bias opposes."""
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=V, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **SIZES))
    unit = F.normalize(torch.randn(D), dim=0)
    with torch.no_grad():
        gpt2.transformer.wte.weight += unit
        gpt2.transformer.ln_f.bias -= 35 * unit
    return gpt2


@pytest.mark.slow
def test_supervised_fine_tuning_with_trl_equals_gpt2s(tokenizer, tmp_path):
    """TRL's fused head multiplies by the head's weight, and knows nothing of our padding."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    gpt2 = with_low_logits()
    assert gpt2(torch.arange(16)[None]).logits.mean() < -25
    gpt2.save_pretrained(tmp_path / "gpt2")
    gpt2.loss_type = "ForCausalLM"  # which is not in its class's name, so Trainer would count one label too many a row
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token = "\n"
    text = "the quick brown fox jumps over the lazy dog, twice. "
    data = datasets.Dataset.from_list([{"input_ids": tokenizer(text[i:] + text[:i]).input_ids[:24]} for i in range(40)])
    losses = {}
    for name, network in {"gpt2": gpt2, "ours": from_gpt2(tmp_path / "gpt2")}.items():
        settings = dict(max_steps=20, per_device_train_batch_size=2, learning_rate=3e-3, logging_steps=1, seed=1)
        settings |= dict(report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no")
        settings |= dict(gradient_checkpointing=False)
        arguments = trl.SFTConfig(output_dir=str(tmp_path / name), **settings)
        trainer = trl.SFTTrainer(network, args=arguments, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        losses[name] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses["ours"]) == 20
    assert losses["ours"] == pytest.approx(losses["gpt2"], abs=1e-3)
    assert sum(losses["ours"][-5:]) < sum(losses["ours"][:5]) - 1
