"""Conversion to and from transformers' GPT-2: same function, same bits, for every form in which a folder was saved."""

import argparse
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig

from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.errors import UserError, first_line
from gpt2repro.models.errors import explained
from gpt2repro.models.find import find_model
from gpt2repro.models.folder import open_model
from gpt2repro.models.openai_weights import from_gpt2, open_gpt2, to_gpt2
from gpt2repro.models.padding import without_padding
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM


V = 150
TINY = dict(vocab_size=V, n_positions=32, n_embd=32, n_layer=3, n_head=4, bos_token_id=None, eos_token_id=None)


def make_gpt2(**fields) -> GPT2LMHeadModel:
    """A tiny GPT-2 whose every parameter affects the output."""
    model = GPT2LMHeadModel(GPT2Config(**TINY | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


@pytest.fixture
def gpt2():
    return make_gpt2()


@pytest.fixture
def folder(gpt2, tmp_path):
    gpt2.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def ids():
    return torch.arange(24).view(2, 12) * 7 % V


def same_tensors(left: torch.nn.Module, right: torch.nn.Module) -> None:
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name


def rewrite(folder, change) -> None:
    """Replace the tensors of a saved model by `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, folder / "model.safetensors")


def rewrite_config(folder, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


# ---- Same function, same bits ----


@pytest.mark.parametrize("fields", [{}, {"n_inner": 48}, {"activation_function": "gelu"}, {"layer_norm_epsilon": 1e-3}])
def test_converted_model_gives_gpt2s_logits_and_comes_back_bit_for_bit(fields, tmp_path, ids):
    gpt2 = make_gpt2(**fields)
    gpt2.save_pretrained(tmp_path)
    ours = from_gpt2(tmp_path)
    assert (ours.config.vocab_size, ours.config.unpadded_vocab_size) == (V, V)
    assert not ours.training and ours.lm_head.weight is ours.transformer.wte.weight
    assert_close(ours(ids).logits[..., :V], gpt2(ids).logits, atol=1e-5, rtol=1e-5)
    same_tensors(to_gpt2(ours), gpt2)


@pytest.mark.parametrize("bias", [True, False])
def test_export_and_reload_is_bit_exact(bias, tmp_path, ids):
    """After a few training steps with padding rows, which the export leaves behind."""
    config = GPT2ReproConfig(**TINY | {"vocab_size": 192, "unpadded_vocab_size": V, "bias": bias})
    ours = GPT2ReproForCausalLM(config)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        ours(ids, labels=ids).loss.backward()
        optimizer.step()
    gpt2 = to_gpt2(ours.eval())
    assert gpt2.transformer.wte.weight.shape == (V, 32) and gpt2.lm_head.weight is gpt2.transformer.wte.weight
    assert_close(gpt2(ids).logits, ours(ids).logits[..., :V], atol=1e-5, rtol=1e-5)
    gpt2.save_pretrained(tmp_path)
    again, trained = from_gpt2(tmp_path), without_padding(ours)
    if bias:
        same_tensors(again, trained)
    else:
        kept = again.state_dict()
        assert all(torch.equal(kept[name], tensor) for name, tensor in trained.state_dict().items())
        assert all((kept[name] == 0).all() for name in kept.keys() - trained.state_dict().keys())
    assert_close(again(ids).logits, ours(ids).logits[..., :V], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_exported_folder_loads_in_plain_transformers_without_our_code(tmp_path, ids):
    config = GPT2ReproConfig(**TINY | {"vocab_size": 192, "unpadded_vocab_size": V})
    ours = GPT2ReproForCausalLM(config).eval()
    to_gpt2(ours).save_pretrained(tmp_path / "gpt2")
    torch.save(ids, tmp_path / "ids.pt")
    code = (
        "import torch; from transformers import AutoModelForCausalLM as A; m = A.from_pretrained('gpt2').eval();"
        "torch.save((type(m).__name__, m(torch.load('ids.pt')).logits.detach()), 'result.pt')"
    )
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True, capture_output=True)
    name, logits = torch.load(tmp_path / "result.pt")
    assert name == "GPT2LMHeadModel"
    assert_close(logits, ours(ids).logits[..., :V], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "n_layer, n_head, n_embd, parameters",
    [(12, 12, 768, 124439808), (24, 16, 1024, 354823168), (36, 20, 1280, 774030080), (48, 25, 1600, 1557611200)],
)
def test_the_four_sizes_have_openais_parameter_counts(n_layer, n_head, n_embd, parameters):
    with torch.device("meta"):
        fields = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        assert GPT2ReproForCausalLM(GPT2ReproConfig(vocab_size=50257, **fields)).num_parameters() == parameters
        padding = (50304 - 50257) * n_embd
        assert GPT2ReproForCausalLM(GPT2ReproConfig(**fields)).num_parameters() == parameters + padding


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept(gpt2, tmp_path, dtype):
    gpt2.to(dtype).save_pretrained(tmp_path)
    ours = from_gpt2(tmp_path)
    assert ours.dtype == ours.config.dtype == dtype
    same_tensors(to_gpt2(ours), gpt2)
    assert from_gpt2(tmp_path, dtype=torch.float32).dtype == torch.float32


# ---- The forms in which folders are saved ----

FORMS = {
    "without the prefix": lambda tensors: {name.removeprefix("transformer."): t for name, t in tensors.items()},
    "with mask buffers": lambda tensors: (
        tensors
        | {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(3)}
        | {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
    ),
    "compiled": lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()},
    "compiled and wrapped": lambda tensors: {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()},
    "compiled block by block": lambda tensors: {
        name.replace("h.1.", "h.1._orig_mod."): tensor for name, tensor in tensors.items()
    },
    "under Lightning's model.": lambda tensors: {f"model.{name}": tensor for name, tensor in tensors.items()},
    "under PEFT's prefix": lambda tensors: {
        f"base_model.model.{name.removeprefix('transformer.')}": tensor for name, tensor in tensors.items()
    },
    "with a copy of the head": lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_keys_loads(gpt2, folder, form):
    rewrite(folder, FORMS[form])
    ours = from_gpt2(folder)
    assert ours.lm_head.weight is ours.transformer.wte.weight
    same_tensors(to_gpt2(ours), gpt2)
    build_tokenizer("char", ["".join(map(chr, range(40, 40 + V)))]).fast.save_pretrained(folder)
    opened, _ = open_model(str(folder))
    same_tensors(to_gpt2(opened) if isinstance(opened, GPT2ReproForCausalLM) else opened, gpt2)


def test_a_folder_of_2019_loads(gpt2, folder):
    """Its config.json does not say that it is a GPT-2."""
    tokenizer = build_tokenizer("char", ["".join(map(chr, range(40, 40 + V)))]).fast
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    opened, opened_tokenizer = open_model(str(folder))
    same_tensors(to_gpt2(opened), gpt2)
    assert opened_tokenizer.get_vocab() == tokenizer.get_vocab()


HEADS = {
    "a value head": {"v_head.summary.weight": torch.zeros(1, 32), "v_head.summary.bias": torch.zeros(1)},
    "double heads": {"multiple_choice_head.summary.weight": torch.zeros(1, 32)},
    "a classifier": {"score.weight": torch.zeros(2, 32)},
}


@pytest.mark.parametrize("head", HEADS)
def test_heads_of_other_trainers_are_named_as_in_the_file_and_dropped_when_asked(gpt2, folder, head):
    rewrite(folder, lambda tensors: tensors | HEADS[head])
    names = ", ".join(sorted(HEADS[head]))
    with pytest.raises(UserError, match=f"holds unknown {names}; .*--drop_heads"):
        from_gpt2(folder)
    same_tensors(to_gpt2(from_gpt2(folder, drop_heads=True)), gpt2)


@pytest.mark.parametrize("prefix", ["", "pretrained_model."])
def test_dropping_heads_is_advised_only_where_that_leaves_a_whole_model(gpt2, folder, prefix):
    """TRL's prefix for a model with a value head is left out by itself."""
    rewrite(folder, lambda tensors: {f"{prefix}{k}": t for k, t in tensors.items()} | HEADS["a value head"])
    with pytest.raises(UserError, match="--drop_heads"):
        from_gpt2(folder)
    same_tensors(to_gpt2(from_gpt2(folder, drop_heads=True)), gpt2)
    rewrite(folder, lambda tensors: {k: t for k, t in tensors.items() if "h.1.ln_1" not in k})
    with pytest.raises(UserError, match="lacks transformer.h.1.ln_1.weight.*holds unknown v_head.*give the complete"):
        from_gpt2(folder)


def test_two_models_in_one_file_are_not_mixed(folder):
    rewrite(
        folder, lambda tensors: {f"{who}.{k}": t.clone() for who in ("policy", "critic") for k, t in tensors.items()}
    )
    with pytest.raises(UserError, match="lacks transformer.wte.weight.*holds unknown critic.*give the complete"):
        from_gpt2(folder)


def test_messages_name_the_keys_of_the_file(folder):
    rewrite(folder, lambda tensors: {name.removeprefix("transformer."): t for name, t in tensors.items()})
    rewrite(folder, lambda tensors: tensors | {"wpe.weight": torch.zeros(3, 32), "h.7.ln_1.weight": torch.zeros(32)})
    with pytest.raises(UserError, match="holds unknown h.7.ln_1.weight, wpe.weight has the shape"):
        from_gpt2(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_the_weights_file_of_a_folder_means_the_folder(gpt2, folder, name):
    if name.endswith(".bin"):
        torch.save(gpt2.state_dict(), folder / name)
        (folder / "model.safetensors").unlink()
    assert find_model(str(folder / name)) == str(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="config.json beside"):
        from_gpt2(find_model(str(folder / name)))


@pytest.mark.parametrize("config_says_tied", [True, False])
def test_an_untied_head_stays_untied(gpt2, folder, ids, config_says_tied):
    """If config.json contradicts the weights, the weights win, as in transformers."""
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"].flip(0)})
    rewrite_config(folder, tie_word_embeddings=config_says_tied)
    ours = from_gpt2(folder)
    assert not ours.config.tie_word_embeddings
    assert_close(ours(ids).logits[..., :V], GPT2LMHeadModel.from_pretrained(folder)(ids).logits, atol=1e-5, rtol=1e-5)
    exported = to_gpt2(ours)
    assert torch.equal(exported.lm_head.weight, gpt2.transformer.wte.weight.flip(0))
    ours.save_pretrained(folder / "again")
    again = AutoModelForCausalLM.from_pretrained(folder / "again", trust_remote_code=True)
    assert_close(again(ids).logits, ours(ids).logits)


def test_shards_and_torchs_own_format_load(gpt2, tmp_path):
    gpt2.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    same_tensors(to_gpt2(from_gpt2(tmp_path / "sharded")), gpt2)
    gpt2.config.save_pretrained(tmp_path / "bin")
    for zipped in (True, False):  # the format since torch 1.6, and the one before
        torch.save(gpt2.state_dict(), tmp_path / "bin" / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        same_tensors(to_gpt2(from_gpt2(tmp_path / "bin")), gpt2)


def test_the_generation_config_is_kept(gpt2, folder):
    gpt2.generation_config.update(do_sample=True, top_p=0.7, _from_model_config=None)
    gpt2.generation_config.save_pretrained(folder)
    assert from_gpt2(folder).generation_config.top_p == to_gpt2(from_gpt2(folder)).generation_config.top_p == 0.7


def test_our_own_model_folder_loads_too(tmp_path):
    ours = GPT2ReproForCausalLM(GPT2ReproConfig(**TINY | {"vocab_size": 192, "unpadded_vocab_size": V, "bias": False}))
    ours.save_pretrained(tmp_path)
    assert open_gpt2(tmp_path).config.bias is False
    same_tensors(from_gpt2(tmp_path), without_padding(ours))


def test_fewer_positions_change_nothing_for_short_sequences(gpt2, folder, ids):
    config = open_gpt2(folder).config
    config.n_positions = 16
    ours = from_gpt2(folder, config)
    assert ours.transformer.wpe.weight.shape == (16, 32)
    assert_close(ours(ids).logits[..., :V], gpt2(ids).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="n_positions=16"):
        ours(ids.view(1, -1))


PEAK = """
import re, sys
from gpt2repro.models.openai_weights import from_gpt2
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak()
model = from_gpt2(sys.argv[1])
print((peak() - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_loading_a_checkpoint_needs_no_second_copy_in_memory(tmp_path):
    """In GPT-2 124M the embedding alone is a third of the weights; in the larger sizes it is less."""
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config())
    save_file(
        {name: torch.zeros_like(p, device="cpu") for name, p in gpt2.named_parameters()}, tmp_path / "model.safetensors"
    )
    gpt2.config.save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path], capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) < 1.2


# ---- Refusals ----


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"activation_function": "relu"}, "activation_function=relu"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"add_cross_attention": True}, "cross-attention"),
        ({"quantization_config": {"quant_method": "x"}}, "quantized"),
    ],
)
def test_another_architecture_is_refused_with_its_reason(folder, fields, reason):
    rewrite_config(folder, **fields)
    with pytest.raises(UserError, match=reason):
        from_gpt2(folder)


def test_another_model_type_is_refused(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a llama model"):
        open_gpt2(tmp_path)


def test_missing_unknown_and_misshapen_tensors_are_named(folder):
    name = "transformer.h.1.mlp.c_fc.weight"
    rewrite(folder, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(UserError, match=name):
        from_gpt2(folder)
    rewrite(folder, lambda tensors: tensors | {name: torch.zeros(32, 64)})
    with pytest.raises(UserError, match=name):
        from_gpt2(folder)
    rewrite(folder, lambda tensors: tensors | {name: torch.zeros(32, 128), "score.weight": torch.zeros(2, 32)})
    with pytest.raises(UserError, match="score.weight"):
        from_gpt2(folder)


def test_a_head_that_contradicts_the_configuration_is_refused(folder):
    rewrite_config(folder, tie_word_embeddings=False)
    with pytest.raises(UserError, match="lacks lm_head.weight"):
        from_gpt2(folder)
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": torch.zeros(V + 10, 32)})
    with pytest.raises(UserError, match="lm_head.weight has the shape"):
        from_gpt2(folder)


def test_a_configuration_of_another_model_is_refused(folder):
    for name, value in {"n_layer": 2, "bias": False, "n_positions": 64}.items():
        config = open_gpt2(folder).config
        setattr(config, name, value)
        with pytest.raises(ValueError, match="the configuration does not match"):
            from_gpt2(folder, config)


def test_integer_weights_are_refused_and_mixed_precision_keeps_the_widest_dtype(gpt2, folder, ids):
    wte = "transformer.wte.weight"
    rewrite(folder, lambda tensors: tensors | {wte: tensors[wte].half()})
    assert from_gpt2(folder).dtype == torch.float32
    rewrite(folder, lambda tensors: tensors | {wte: tensors[wte].to(torch.int8)})
    with pytest.raises(UserError, match="int8"):
        from_gpt2(folder)


@pytest.mark.parametrize("fields", [{"n_head": 5}, {"n_layer": "two"}, {"resid_pdrop": 1.5}])
def test_an_invalid_configuration_is_one_line(folder, fields):
    rewrite_config(folder, **fields)
    with pytest.raises(UserError) as caught:
        open_gpt2(folder)
    assert next(iter(fields)) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_damaged_and_missing_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors"):
        from_gpt2(folder)
    weights.unlink()
    with pytest.raises(UserError, match="holds no weights"):
        from_gpt2(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="config.json"):
        from_gpt2(folder)


@pytest.mark.parametrize(
    "wrap, named",
    [
        (lambda tensors: {"state_dict": tensors}, "state_dict"),
        (lambda tensors: {"epoch": 3, "model": tensors}, "epoch, model"),
        (lambda tensors: tensors | {"global_step": 7}, "global_step"),
    ],
    ids=["state_dict", "model", "global_step"],
)
def test_a_file_with_more_than_tensors_is_refused_until_the_advice_is_followed(gpt2, folder, wrap, named):
    build_tokenizer("char", ["".join(map(chr, range(40, 40 + V)))]).fast.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(wrap(gpt2.state_dict()), folder / "pytorch_model.bin")
    for read in (open_model, from_gpt2):
        with pytest.raises(UserError, match=f"pytorch_model.bin holds {named}, which is no tensor") as caught:
            read(str(folder))
    interpreter, *arguments = shlex.split(re.search("`(.+)`", str(caught.value))[1])
    assert interpreter == "python"
    exec(arguments[1], {})  # python -c
    same_tensors(to_gpt2(from_gpt2(folder)), gpt2)


@pytest.mark.parametrize("content", [[1, 2], {}, torch.ones(3), {"args": argparse.Namespace(lr=1)}], ids=str)
def test_a_file_of_anything_else_is_one_plain_line(folder, content):
    build_tokenizer("char", ["".join(map(chr, range(40, 40 + V)))]).fast.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    expected = "holds argparse.Namespace, which is not data" if isinstance(content, dict) and content else "no tensors"
    for read in (open_model, from_gpt2):
        with pytest.raises(UserError, match=f"pytorch_model.bin .*{expected}") as caught:
            read(str(folder))
        assert str(caught.value).isprintable()


def test_the_librarys_own_words_about_a_pickle_are_not_repeated(tmp_path):
    """They are bold and advise to execute it."""
    torch.save({"args": argparse.Namespace(lr=1)}, tmp_path / "file")
    with pytest.raises(UserError) as caught, explained("x cannot be opened", "give another"):
        torch.load(tmp_path / "file", weights_only=True)
    assert str(caught.value).startswith("x cannot be opened: its weights are a pickle that holds argparse.Namespace")
    assert "\x1b" not in first_line(caught.value.__cause__)


class Malicious:
    def __reduce__(self):
        return exec, ("open('executed', 'w')",)


def test_a_pickle_that_holds_code_is_refused_and_not_executed(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Malicious()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin"):
        from_gpt2(folder)
    assert not (folder / "executed").exists()
