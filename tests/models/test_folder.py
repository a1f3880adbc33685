"""Opening what users have: runs, checkpoints, damaged folders."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.errors import UserError
from gpt2repro.hub.model_card import model_card
from gpt2repro.models.folder import find_model, load_tokenizer, open_model, save_model_folder
from gpt2repro.models.openai_weights import to_gpt2
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
