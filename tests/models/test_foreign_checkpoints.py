"""Checkpoints in the upstream formats, written from an independent model and compared with it: tensors bit for bit, and
logits. Then damaged files, and files of other kinds."""

import argparse
import inspect
import io
import json
import math
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gpt2repro.errors import UserError
from gpt2repro.models.foreign_checkpoints import check_tensors, expected_shapes, read_checkpoint_file
from gpt2repro.models.openai_weights import open_gpt2
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM


SMALL = {"block_size": 12, "vocab_size": 65, "n_layer": 2, "n_head": 2, "n_embd": 8}
BPE = SMALL | {"vocab_size": 50304}
FIELDS = {"n_positions": 12, "n_embd": 8, "n_layer": 2, "n_head": 2}  # what GPT2ReproConfig calls SMALL and BPE


class TheirBlock(nn.Module):
    def __init__(self, width, heads, context, bias, mask):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(width, 3 * width, bias), "c_proj": nn.Linear(width, width, bias)}
        )
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width, bias), "c_proj": nn.Linear(4 * width, width, bias)}
        )
        if mask:
            self.attn.register_buffer("bias", torch.ones(context, context).tril()[None, None])

    def forward(self, x, gelu):
        length, width = x.shape
        out = []
        for q, k, v in zip(*(part.chunk(self.heads, -1) for part in self.attn.c_attn(self.ln_1(x)).chunk(3, -1))):
            scores = q @ k.T / math.sqrt(width // self.heads)
            out.append(scores.masked_fill(torch.ones(length, length).triu(1) > 0, -math.inf).softmax(-1) @ v)
        x = x + self.attn.c_proj(torch.cat(out, -1))
        return x + self.mlp.c_proj(gelu(self.mlp.c_fc(self.ln_2(x))))


class TheirGPT(nn.Module):
    """A GPT-2 with the parameter names of nanoGPT and build-nanogpt, one sequence at a time."""

    def __init__(self, block_size, vocab_size, n_layer, n_head, n_embd, bias=True, tanh=False, mask=False):
        super().__init__()
        blocks = [TheirBlock(n_embd, n_head, block_size, bias, mask) for _ in range(n_layer)]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList(blocks),
                "ln_f": nn.LayerNorm(n_embd, bias=bias),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.gelu = nn.GELU("tanh" if tanh else "none")
        torch.manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, ids):
        t = self.transformer
        x = t.wte(ids) + t.wpe(torch.arange(len(ids)))
        for block in t.h:
            x = block(x, self.gelu)
        return self.lm_head(t.ln_f(x))


def tokens(vocab_size):
    return torch.randint(vocab_size, (12,), generator=torch.Generator().manual_seed(1))


def save_nanogpt(path, model, args, prefix="", legacy=False, changes=()):
    """As nanoGPT's train.py does, after one optimizer step."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}])
    model(torch.arange(4)).sum().backward()
    optimizer.step()
    checkpoint = {
        "model": {prefix + name: tensor for name, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": args,
        "iter_num": 2000,
        "best_val_loss": torch.tensor(3.25),
        "config": {"out_dir": "out", "eval_interval": 2000, "compile": True, "dropout": args.get("dropout")},
    }
    torch.save(checkpoint | dict(changes), path, _use_new_zipfile_serialization=not legacy)
    return path


def nanogpt(path, args=SMALL, bias=True, dropout=0.0, mask=False, **how):
    model = TheirGPT(**args, bias=bias, mask=mask)
    return save_nanogpt(path, model, args | {"bias": bias, "dropout": dropout}, **how), model


LLM_C_LAYERS = [
    *("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias"),
    *("ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
]


def replace_in_pickle(path, old, new):
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if name.endswith("data.pkl"):
                assert old in content
                content = content.replace(old, new)
            archive.writestr(name, content)


def llm_c_bytes(model, sizes, rows, version=3):
    header = [20240326, version, *(sizes[k] for k in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")), rows]
    file = io.BytesIO()
    file.write(struct.pack("<256i", *header, *[0] * (256 - len(header))))
    parameters = dict(model.named_parameters())
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    for layer_name in LLM_C_LAYERS:
        names += [f"transformer.h.{i}.{layer_name}" for i in range(sizes["n_layer"])]
    for name in [*names, "transformer.ln_f.weight", "transformer.ln_f.bias"]:
        tensor = parameters[name].detach()
        if name == "transformer.wte.weight":
            tensor = torch.cat([tensor, torch.zeros(rows - len(tensor), tensor.shape[1])])
        bits = tensor.numpy() if version == 3 else tensor.to(torch.bfloat16).view(torch.int16).numpy()
        file.write(bits.tobytes())
    return file.getvalue()


def llm_c(path, sizes=SMALL, rows=128, version=3):
    model = TheirGPT(**sizes, tanh=True)
    path.write_bytes(llm_c_bytes(model, sizes, rows, version))
    return path, model


def assert_same(path, model, vocab_size):
    """The file holds the model's tensors, and our model computes the same logits with them; returns the fields."""
    fields, tensors = read_checkpoint_file(path)
    parameters = dict(model.named_parameters())  # each tied tensor once
    assert set(tensors) == set(parameters)
    for name, tensor in tensors.items():
        theirs = parameters[name].detach().to(tensor.dtype)
        assert torch.equal(tensor[: len(theirs)], theirs), name
        assert not tensor[len(theirs) :].any(), name

    ours = GPT2ReproForCausalLM(GPT2ReproConfig(**fields)).eval()
    assert ours.load_state_dict(tensors, strict=False) == (["lm_head.weight"], [])
    ids = tokens(vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(ids[None]).logits[0, :, :vocab_size], model(ids)[:, :vocab_size], atol=1e-5, rtol=0
        )
    return fields


# ---- nanoGPT ----


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_with_a_vocabulary_of_characters(tmp_path, bias):
    path, model = nanogpt(tmp_path / "ckpt.pt", bias=bias, dropout=0.2)
    assert assert_same(path, model, 65) == FIELDS | {
        **{"vocab_size": 65, "unpadded_vocab_size": 65, "bias": bias, "activation_function": "gelu"},
        **{"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2, "bos_token_id": None, "eos_token_id": None},
    }


@pytest.mark.parametrize("rows", [50257, 50304])  # fine-tuned from OpenAI's weights, and from scratch
def test_nanogpt_with_the_vocabulary_of_gpt2(tmp_path, rows):
    path, model = nanogpt(tmp_path / "ckpt.pt", BPE | {"vocab_size": rows})
    fields = assert_same(path, model, 50257)
    assert (fields["vocab_size"], fields["unpadded_vocab_size"]) == (rows, 50257)
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (50256, 50256)


@pytest.mark.parametrize(
    "how",
    [
        {"prefix": "_orig_mod."},
        {"prefix": "module."},
        {"prefix": "module._orig_mod."},
        {"mask": True},
        {"mask": True, "prefix": "_orig_mod."},
        {"legacy": True},
    ],
    ids=str,
)
def test_nanogpt_under_each_prefix_and_from_old_torch(tmp_path, how):
    path, model = nanogpt(tmp_path / "ckpt.pt", **how)
    assert "tie_word_embeddings" not in assert_same(path, model, 65)


def test_nanogpt_from_before_its_bias_option_has_biases_and_tanh(tmp_path):
    model = TheirGPT(**SMALL, tanh=True, mask=True)
    path = save_nanogpt(tmp_path / "ckpt.pt", model, SMALL | {"dropout": 0.1})
    assert_same(path, model, 65)
    fields, _ = read_checkpoint_file(path)
    assert (fields["activation_function"], fields["bias"], fields["attn_pdrop"]) == ("gelu_new", True, 0.1)


def test_a_value_head_in_a_file_is_dropped_when_asked(tmp_path):
    model = TheirGPT(**SMALL)
    state = model.state_dict() | {"v_head.summary.weight": torch.ones(1, 8)}
    path, _ = nanogpt(tmp_path / "my ckpt.pt", changes={"model": state})
    refused(path, "holds unknown v_head.summary.weight", f"`python publish.py '{path}' --drop_heads --to ./FOLDER`")
    _, tensors = read_checkpoint_file(path, drop_heads=True)
    assert "v_head.summary.weight" not in tensors and torch.equal(
        tensors["transformer.wte.weight"], state["lm_head.weight"]
    )


def test_the_keys_of_a_compiled_model_are_named_as_in_the_file(tmp_path):
    state = TheirGPT(**SMALL).state_dict() | {"transformer.wpe.weight": torch.ones(3, 8)}
    path, _ = nanogpt(tmp_path / "ckpt.pt", changes={"model": {f"_orig_mod.{k}": v for k, v in state.items()}})
    refused(path, "_orig_mod.transformer.wpe.weight has the shape (3, 8)")


def test_nanogpt_saved_from_a_gpu(tmp_path):
    path, model = nanogpt(tmp_path / "ckpt.pt")
    replace_in_pickle(path, struct.pack("<ci3s", b"X", 3, b"cpu"), struct.pack("<ci6s", b"X", 6, b"cuda:0"))
    assert_same(path, model, 65)


def test_an_untied_head_is_kept(tmp_path):
    model = TheirGPT(**SMALL)
    model.lm_head.weight = nn.Parameter(torch.randn(65, 8))
    fields, tensors = read_checkpoint_file(
        save_nanogpt(tmp_path / "ckpt.pt", model, SMALL | {"bias": True, "dropout": 0.0})
    )
    ours = GPT2ReproForCausalLM(GPT2ReproConfig(**fields)).eval()
    ours.load_state_dict(tensors)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens(65)[None]).logits[0], model(tokens(65)), atol=1e-5, rtol=0)


def test_an_untied_but_equal_head_is_dropped(tmp_path):
    path, model = nanogpt(tmp_path / "ckpt.pt")
    checkpoint = torch.load(path)
    checkpoint["model"]["lm_head.weight"] = checkpoint["model"]["lm_head.weight"].clone()
    torch.save(checkpoint, path)
    assert_same(path, model, 65)


# ---- build-nanogpt ----

BUILD_NANOGPT = """
import json, math, sys, types
from dataclasses import dataclass
import torch
from torch import nn

{classes}

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

folder, sizes, mask, prefix = json.loads(sys.argv[1])
model = TheirGPT(**sizes, tanh=True, mask=mask)
state = {{prefix + name: tensor for name, tensor in model.state_dict().items()}}
checkpoint = {{'model': state, 'config': GPTConfig(**sizes), 'step': 19072, 'val_loss': 3.07}}
torch.save(checkpoint, folder + '/model_19072.pt')
sys.modules['train_gpt2'] = types.ModuleType('train_gpt2')
sys.modules['train_gpt2'].GPTConfig = GPTConfig
GPTConfig.__module__ = 'train_gpt2'
torch.save(checkpoint, folder + '/imported.pt')
"""


def run_build_nanogpt(folder, sizes, mask=False, prefix=""):
    classes = inspect.getsource(TheirBlock) + "\n" + inspect.getsource(TheirGPT)
    argument = json.dumps([str(folder), sizes, mask, prefix])
    subprocess.run([sys.executable, "-c", BUILD_NANOGPT.format(classes=classes), argument], check=True, timeout=100)
    return TheirGPT(**sizes, tanh=True)  # seeded, so the same


def pickled(path):
    with zipfile.ZipFile(path) as archive:
        return next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))


@pytest.mark.slow
def test_build_nanogpt(tmp_path):
    model = run_build_nanogpt(tmp_path, BPE)
    for file, module in (("model_19072.pt", b"__main__"), ("imported.pt", b"train_gpt2")):
        assert b"c" + module + b"\nGPTConfig\n" in pickled(tmp_path / file)
        assert assert_same(tmp_path / file, model, 50257) == FIELDS | {
            **{"vocab_size": 50304, "unpadded_vocab_size": 50257, "bias": True, "activation_function": "gelu_new"},
            **{"bos_token_id": 50256, "eos_token_id": 50256},
        }


@pytest.mark.slow
def test_build_nanogpt_compiled_and_with_its_early_mask(tmp_path):
    model = run_build_nanogpt(tmp_path, SMALL, mask=True, prefix="_orig_mod.")
    assert assert_same(tmp_path / "model_19072.pt", model, 65)["eos_token_id"] is None


# ---- llm.c ----


@pytest.mark.parametrize("version, dtype", [(3, torch.float32), (5, torch.bfloat16)])
def test_llm_c(tmp_path, version, dtype):
    path, model = llm_c(tmp_path / "gpt2_124M.bin", SMALL | {"vocab_size": 50257}, 50304, version)
    assert {tensor.dtype for tensor in read_checkpoint_file(path)[1].values()} == {dtype}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))  # what the file can hold
    assert assert_same(path, model, 50257) == FIELDS | {
        **{"vocab_size": 50304, "unpadded_vocab_size": 50257, "bias": True, "activation_function": "gelu_new"},
        **{"bos_token_id": 50256, "eos_token_id": 50256},
    }


def test_llm_c_with_another_vocabulary(tmp_path):
    fields = assert_same(*llm_c(tmp_path / "model.bin"), 65)
    assert (fields["vocab_size"], fields["unpadded_vocab_size"], fields["eos_token_id"]) == (128, 65, None)


# ---- loaded once and lazily, nothing written, no class left allowed ----


def test_a_file_is_loaded_once_for_its_configuration_and_its_weights(tmp_path, monkeypatch):
    path, model = nanogpt(tmp_path / "ckpt.pt")
    load, loaded = torch.load, []
    monkeypatch.setattr(torch, "load", lambda file, **kwargs: loaded.append(file) or load(file, **kwargs))
    stored = open_gpt2(path)
    assert loaded == [path] and stored.config.unpadded_vocab_size == 65
    ours = stored.build(dtype=torch.float32)
    assert loaded == [path]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens(65)[None]).logits[0, :, :65], model(tokens(65)), atol=1e-5, rtol=0)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="memory maps are listed in /proc, on Linux only")
@pytest.mark.parametrize("make", [nanogpt, llm_c])
def test_files_are_mapped_and_never_written(tmp_path, make):
    path, _ = make(tmp_path / "file")
    before = path.read_bytes()
    path.chmod(0o444)
    tensors = read_checkpoint_file(path)[1]
    assert str(path) in Path("/proc/self/maps").read_text()
    for tensor in tensors.values():
        tensor.zero_()
    assert path.read_bytes() == before


def test_the_stand_in_for_gptconfig_is_allowed_during_the_read_only(tmp_path):
    nanogpt(tmp_path / "ckpt.pt")
    before = set(map(str, torch.serialization.get_safe_globals()))
    read_checkpoint_file(tmp_path / "ckpt.pt")
    assert set(map(str, torch.serialization.get_safe_globals())) == before


# ---- refusals ----


def refused(path, *parts):
    """read_checkpoint_file refuses the file in one line that contains its path and each of the parts."""
    with pytest.raises(UserError) as caught:
        read_checkpoint_file(path)
    message = str(caught.value)
    assert "\n" not in message and "; " in message  # problem; remedy
    for part in (str(path), *parts):
        assert part in message, message


def test_no_file(tmp_path):
    refused(tmp_path / "ckpt.pt", "No such file")
    refused(tmp_path, "Is a directory")


@pytest.mark.parametrize(
    "content",
    [b"", b"PK", b"Once upon a time\n" * 99, np.random.default_rng(0).bytes(5000)]
    + [pickle.dumps({"model": {}, "model_args": {}}, protocol) for protocol in range(6)],
)
def test_no_checkpoint_at_all(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    refused(tmp_path / "file", "not a checkpoint", "nanoGPT", "llm.c")


def test_another_kind_of_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "a.zip", "not a checkpoint")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.999])
def test_a_truncated_torch_file(tmp_path, legacy, share):
    path, _ = nanogpt(tmp_path / "ckpt.pt", legacy=legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path, "damaged", "copy it again")


@pytest.mark.parametrize("version", [3, 5])
@pytest.mark.parametrize("change", [-5000, -1, 1, 2, 4, 5000])
def test_an_llm_c_model_that_is_truncated_or_too_long(tmp_path, version, change):
    path, _ = llm_c(tmp_path / "model.bin", version=version)
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + bytes(change))
    refused(path, f"{len(content) + change:,} bytes", f"asks for {len(content):,}")


@pytest.mark.parametrize("length", [4, 8, 32, 1023])
def test_an_llm_c_model_truncated_in_its_header(tmp_path, length):
    path, _ = llm_c(tmp_path / "model.bin")
    path.write_bytes(path.read_bytes()[:length])
    refused(path, "truncated", f"{length:,} bytes")


class CreatesAFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["model", "config", "optimizer"])
def test_code_in_a_pickle_is_refused_and_not_executed(tmp_path, place, legacy):
    path, _ = nanogpt(tmp_path / "ckpt.pt", legacy=legacy, changes={place: CreatesAFile(tmp_path / "created")})
    refused(path, "io.open", "not executed")
    assert not (tmp_path / "created").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "created").exists()  # the trap works


def test_code_in_a_bare_pickle_is_not_executed(tmp_path):
    for protocol in range(6):
        (tmp_path / "ckpt.pt").write_bytes(pickle.dumps(CreatesAFile(tmp_path / "created"), protocol))
        refused(tmp_path / "ckpt.pt", "not a checkpoint")
    assert not (tmp_path / "created").exists()


def test_other_objects_are_refused(tmp_path):
    path, _ = nanogpt(tmp_path / "ckpt.pt", changes={"config": argparse.Namespace(lr=1)})
    refused(path, "argparse.Namespace", "not executed")


@pytest.mark.parametrize(
    "checkpoint, parts",
    [
        (TheirGPT(**SMALL).state_dict(), ["the keys transformer.wte.weight, ", " and 26 more"]),
        ({"state": {}, "param_groups": []}, ["the keys state, param_groups"]),
        ({"model": TheirGPT(**SMALL).state_dict()}, ["the keys model"]),
        ({"model": TheirGPT(**SMALL).state_dict(), "config": SMALL}, ["the keys model, config"]),
        ({"model_args": SMALL}, ["the keys model_args"]),
        ({1: 2}, ["the keys 1"]),
        ([1, 2], ["(none)"]),
        (torch.ones(3), ["(none)"]),
    ],
    ids=range(8),
)
def test_another_kind_of_torch_file(tmp_path, checkpoint, parts):
    torch.save(checkpoint, tmp_path / "file.pt")
    refused(tmp_path / "file.pt", *parts, "model_args (nanoGPT)", "config, a GPTConfig (build-nanogpt)")


ARGS = SMALL | {"bias": True, "dropout": 0.0}


@pytest.mark.parametrize(
    "args, parts",
    [
        ({k: v for k, v in ARGS.items() if k not in ("bias", "n_head")}, ["lacks n_head;"]),
        (ARGS | {"use_rmsnorm": True}, ["unknown use_rmsnorm"]),
        (ARGS | {"n_layer": 0}, ["n_layer=0"]),
        (ARGS | {"n_layer": "2"}, ["n_layer='2'"]),
        (ARGS | {"n_embd": 8.0, "vocab_size": None}, ["n_embd=8.0", "vocab_size=None"]),
        (ARGS | {"n_head": 3}, ["n_embd=8", "n_head=3"]),
        (ARGS | {"bias": 1}, ["bias=1"]),
        (ARGS | {"dropout": 1.0}, ["dropout=1.0"]),
        (ARGS | {"dropout": "0"}, ["dropout='0'"]),
    ],
    ids=str,
)
def test_invalid_nanogpt_sizes(tmp_path, args, parts):
    refused(save_nanogpt(tmp_path / "ckpt.pt", TheirGPT(**SMALL), args), *parts)


@pytest.mark.slow
def test_a_config_of_a_modified_build_nanogpt(tmp_path):
    run_build_nanogpt(tmp_path, SMALL)
    path = tmp_path / "model_19072.pt"
    replace_in_pickle(path, b"n_embd", b"d_embd")
    refused(path, "config", "lacks n_embd", "unknown d_embd")


@pytest.mark.parametrize(
    "state",
    [
        [1, 2],
        {0: torch.ones(2)},
        {"transformer.wte.weight": 5},
        {name: tensor.to(torch.int8) for name, tensor in TheirGPT(**SMALL).state_dict().items()},
    ],
    ids=range(4),
)
def test_a_model_that_is_not_floating_point_tensors(tmp_path, state):
    refused(nanogpt(tmp_path / "ckpt.pt", changes={"model": state})[0], "model", "floating-point tensors")


def test_tensors_that_are_missing_unknown_or_misshapen(tmp_path):
    state = TheirGPT(**SMALL).state_dict()

    def refuse(changed, *parts):
        refused(nanogpt(tmp_path / "ckpt.pt", changes={"model": changed})[0], *parts)

    name = "transformer.h.1.mlp.c_fc.bias"
    refuse({k: v for k, v in state.items() if k != name}, f"lacks {name};")
    refuse({k: v for k, v in state.items() if ".ln_" not in k}, "lacks transformer.h.0.ln_1.weight, ", " and 7 more")
    refuse({k: v for k, v in state.items() if "wte" not in k}, "lacks transformer.wte.weight")
    refuse(state | {"transformer.h.2.ln_1.weight": torch.ones(8)}, "unknown transformer.h.2.ln_1.weight;")
    refuse(
        state | {"a": state[name], "b": state[name], "c": state[name], "d": state[name]}, "unknown a, b, c and 1 more"
    )
    refuse(state | {name: torch.ones(16)}, f"{name} has the shape (16,) instead of (32,)")
    wpe = "transformer.wpe.weight"
    shape = f"{wpe} has the shape (8, 8) instead of (12, 8)"
    refuse(state | {wpe: torch.ones(8, 8), "x": state[wpe]}, f"holds unknown x, {shape};")
    refuse(state | {"lm_head.weight": torch.ones(64, 8)}, "lm_head.weight has the shape (64, 8) instead of (65, 8)")
    refuse(TheirGPT(**SMALL, bias=False).state_dict(), "lacks transformer.h.0.ln_1.bias", "and 10 more")


@pytest.mark.parametrize(
    "magic, what",
    [
        (20240520, "a file of tokens"),
        (20240522, "multiple-choice questions"),
        (20240527, "the optimizer's state"),
        (20240327, "a debugging state"),
        (20240328, "a tokenizer"),
    ],
)
def test_other_files_of_llm_c(tmp_path, magic, what):
    path, _ = llm_c(tmp_path / "file.bin")
    path.write_bytes(struct.pack("<i", magic) + path.read_bytes()[4:])
    refused(path, "llm.c", what, "not a model")


@pytest.mark.parametrize("version", [1, 2, 4, 6])
def test_other_versions_of_llm_c(tmp_path, version):
    path, _ = llm_c(tmp_path / "model.bin")
    content = path.read_bytes()
    path.write_bytes(content[:4] + struct.pack("<i", version) + content[8:])
    refused(path, f"version {version}", "3 (float32) and 5 (bfloat16)")


@pytest.mark.parametrize(
    "place, value, part",
    [
        (2, -12, "block_size=-12"),
        (3, 129, "vocab_size=129, rows of the embedding=128"),
        (4, 2**31 - 1, "bytes, but its header asks for"),
        (4, 0, "n_layer=0"),
        (5, 3, "n_embd=8, n_head=3"),
        (6, 16, "bytes, but its header asks for"),
        (7, 0, "rows of the embedding=0"),
    ],
)
def test_a_damaged_header_of_llm_c(tmp_path, place, value, part):
    path, _ = llm_c(tmp_path / "model.bin")
    content = path.read_bytes()
    path.write_bytes(content[: 4 * place] + struct.pack("<i", value) + content[4 * place + 4 :])
    refused(path, part)


# ---- shapes ----


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"n_inner": 12}, {"n_inner": None, "n_layer": 3}], ids=str)
def test_expected_shapes_are_those_of_our_model(changes):
    fields = FIELDS | {"vocab_size": 128, "unpadded_vocab_size": 65, "bias": True} | changes
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**fields))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # lm_head is tied
    assert expected_shapes(fields) == shapes
    check_tensors(fields, shapes, {}, "there")
    check_tensors(fields, shapes | {"lm_head.weight": (128, 8)}, {}, "there")
    with pytest.raises(UserError, match=r"^there: lm_head.weight has the shape \(65, 8\) instead of \(128, 8\); "):
        check_tensors(fields, shapes | {"lm_head.weight": (65, 8)}, {}, "there")
