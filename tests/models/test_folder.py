"""Opening what users have: runs, checkpoints, damaged folders, adapters, typing errors."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.errors import UserError
from gpt2repro.hub.model_card import model_card
from gpt2repro.models import find
from gpt2repro.models.find import find_model
from gpt2repro.models.folder import check_tokenizer, load_tokenizer, open_model, save_model_folder
from gpt2repro.models.openai_weights import from_gpt2, to_gpt2
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM


TENSOR = "transformer.h.0.mlp.c_fc.weight"


@pytest.fixture(params=["gpt2repro", "gpt2"])
def folder(request, tmp_path):
    """A tiny model folder in each of the two formats; its tokenizer knows the letters h, e, l and o only."""
    tokenizer = build_tokenizer("char", ["hello"]).fast
    sizes = dict(vocab_size=64, unpadded_vocab_size=4, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**sizes, bos_token_id=None, eos_token_id=None))
    model = to_gpt2(model) if request.param == "gpt2" else model
    save_model_folder(tmp_path / "run" / "model", model, tokenizer, model_card(model, "x"))
    return tmp_path / "run" / "model"


def test_run_and_model_folder_are_the_same_model(folder):
    assert find_model(str(folder.parent)) == find_model(str(folder)) == str(folder)
    model, tokenizer = open_model(str(folder.parent))
    assert torch.equal(model.state_dict()[TENSOR], load_file(folder / "model.safetensors")[TENSOR])
    assert tokenizer("hello").input_ids == [1, 0, 2, 2, 3]


def test_an_unfinished_runs_newest_checkpoint_is_named(tmp_path):
    for step in (10, 20):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    with pytest.raises(UserError, match="its newest checkpoint is .*step_00000020"):
        find_model(str(tmp_path))


@pytest.mark.parametrize(
    "given, files, remedy",
    [
        ("out", ["out/ckpt.pt"], "give out/ckpt.pt"),
        ("log", ["log/model_00050.bin", "log/model_00100.bin", "log/state_00100.bin"], "give log/model_00100.bin"),
        ("trainer", [f"trainer/checkpoint-{n}/config.json" for n in (500, 1000)], "give trainer/checkpoint-1000"),
        ("runs", ["runs/a/model/config.json", "runs/notes"], "give runs/a"),
        ("run/checkpoints", ["run/checkpoints/step_00000020/config.json"], "give run/checkpoints/step_00000020"),
        ("data", ["data/manifest.json", "data/train_00000.npy"], "it is prepared data"),
        ("empty", ["empty/notes"], "give a model folder"),
        ("m/optimizer.safetensors", ["m/optimizer.safetensors", "m/config.json"], "give its folder, m"),
        ("m", ["m/config.json", "m/model.fp16.safetensors"], "if model.fp16.safetensors is them, rename it"),
    ],
)
def test_what_is_no_model_says_what_to_give_instead(tmp_path, monkeypatch, given, files, remedy):
    monkeypatch.chdir(tmp_path)
    for file in files:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text('{"n_layer": 1}')
    with pytest.raises(UserError, match=f"; {remedy}"):
        from_gpt2(find_model(given))


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        load_tokenizer(folder)


@pytest.mark.parametrize("damage", ["missing", "misshapen", "truncated"])
def test_damaged_weights_are_refused_and_never_initialized_at_random(folder, damage):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if damage == "missing":
        del tensors[TENSOR]
    elif damage == "misshapen":
        tensors[TENSOR] = torch.zeros(3, 5)
    save_file(tensors, path, {"format": "pt"})
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="not a causal language model" if damage == "truncated" else TENSOR) as caught:
        open_model(str(folder))
    assert len(str(caught.value).splitlines()) == 1


def test_another_architectures_missing_and_unexpected_tensors_are_one_line(folder, capfd):
    """Without transformers' table of them."""
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None))
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["strange.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 .*model.norm.weight.* and holds strange.weight instead; save"):
        open_model(str(folder))
    assert "LOAD REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(folder, value):
    tensors = load_file(folder / "model.safetensors")
    tensors[TENSOR][0, 1] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for read in (open_model, from_gpt2):
        with pytest.raises(UserError, match=f"{TENSOR} is not finite; give a checkpoint from before"):
            read(str(folder))


def test_a_tokenizer_with_a_token_that_has_no_row_is_refused_until_the_advice_is_followed(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    rule = r"the tokenizer has 5 tokens, the model 4: \[PAD\] was added without a row"
    with pytest.raises(UserError, match=rule) as caught:
        open_model(str(folder))
    with pytest.raises(UserError, match=rule):
        check_tokenizer(str(folder), tokenizer, from_gpt2(folder).config)  # what publish.py does

    follow_advice(caught.value)
    model, tokenizer = open_model(str(folder))
    assert model(torch.tensor([[tokenizer.pad_token_id]])).logits.shape[-1] == 5


def follow_advice(error):
    command = re.search("`(.+?)`", str(error))[1]
    interpreter, *arguments = shlex.split(command)
    assert interpreter == "python"
    exec(arguments[1], {})  # python -c


@pytest.mark.parametrize(
    "settings, message",
    [
        ('{"peft_ty', "adapter_config.json is damaged .*; save the adapter again"),
        ("[1, 2]", "adapter_config.json is damaged .*; save the adapter again"),
        ('{"peft_type": "LORA", "base_model_name_or_path": null}', "write the name of its base model"),
        (
            '{"peft_type": "LORA", "base_model_name_or_path": "gpt2", "megatron_config": {"tp": 1}}',
            "megatron_config names code to run",
        ),
        ('{"peft_type": "PREFIX_TUNING", "base_model_name_or_path": "gpt2"}', "PREFIX_TUNING .* cannot be merged"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_one_line(tmp_path, settings, message):
    (tmp_path / "adapter_config.json").write_text(settings)
    with pytest.raises(UserError, match=message) as caught:
        find_model(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_an_adapter_beside_full_weights_is_refused_everywhere(folder):
    """transformers would apply it, to weights that it may be merged into already; from_gpt2 would not."""
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    for read in (find_model, open_model, from_gpt2):
        with pytest.raises(UserError, match="holds adapter_config.json beside full weights; delete"):
            read(str(folder))


def test_a_path_may_start_with_the_home_directory(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent.parent))
    assert find_model("~/run") == str(folder)
    with pytest.raises(UserError, match="~/nothing does not exist"):
        find_model("~/nothing")


def test_without_a_network_an_unknown_name_is_one_line_and_asked_for_once(no_network):
    with pytest.raises(
        UserError, match="runs/typo: no such file or folder, .*check the name and the network"
    ) as caught:
        find_model("runs/typo")
    assert len(no_network) <= 2 and len(str(caught.value).splitlines()) == 1


def test_the_hub_is_asked_once_about_a_model_that_it_has(monkeypatch):
    answers = [ConnectionError("no network"), None, ConnectionError("nobody should ask again")]
    monkeypatch.setattr(find, "hub_failure", lambda name, file: answers.pop(0))
    with pytest.raises(UserError, match="no network"):
        find_model("ada/asked-once")
    assert find_model("ada/asked-once") == find_model("ada/asked-once") == "ada/asked-once"
    assert len(answers) == 1


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


EIGHT_BITS = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def index_weights(folder: Path, shard: str) -> None:
    """An index that names a shard stands in for the weights."""
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda folder: (folder / "config.json").write_text("[]"), "no model can be loaded from there"),
        (lambda folder: edit_config(folder, n_layer=10**9), "n_layer=1000000000 must be at most"),
        (lambda folder: edit_config(folder, vocab_size=10**12), "vocab_size=1000000000000 must be at most"),
        (
            lambda folder: edit_config(
                folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}
            ),
            "bitsandbytes",
        ),
    ],
)
def test_odd_configurations_are_one_line(folder, change, complaint):
    change(folder)
    with pytest.raises(UserError, match=complaint) as error:
        open_model(str(folder))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("shard", ["../weights.safetensors", "/etc/passwd", "a/weights.safetensors"])
def test_an_index_of_weights_points_at_files_of_its_folder_only(folder, shard):
    index_weights(folder, shard)
    with pytest.raises(UserError, match=f"{re.escape(shard)} is not a file of this folder"):
        from_gpt2(str(folder))
