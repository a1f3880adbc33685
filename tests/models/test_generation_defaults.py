"""The generation defaults of a base model: kept or dropped by one rule, never in the way of a sample or an export."""

import json

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, TextStreamer

from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.errors import UserError
from gpt2repro.hub.model_card import model_card
from gpt2repro.models.folder import open_model, rehearse_export, save_model_folder
from gpt2repro.models.openai_weights import from_gpt2
from gpt2repro.models.sampling import generate


OURS = {"do_sample": True, "top_k": 50, "num_beams": None}
# What generation_config.json says, and the fields of the exported one.
CASES = {
    "beams": ({"num_beams": 4, "num_return_sequences": 2}, {"num_beams": 4, "num_return_sequences": 2}),
    "temperature of greedy decoding": ({"do_sample": False, "temperature": 0.7}, {"do_sample": False}),
    "temperature without do_sample": ({"temperature": 0.7, "num_beams": 2}, {"num_beams": 2}),
    "several greedy sequences": ({"do_sample": False, "num_return_sequences": 3}, OURS),
    "a dictionary as output": ({"return_dict_in_generate": True, "output_scores": True}, {"output_scores": True}),
    "a minimum length": ({"min_new_tokens": 50, "do_sample": True}, {"min_new_tokens": 50}),
    "stop strings": ({"stop_strings": ["e"]}, {"stop_strings": ["e"]}),
    "a static cache": ({"cache_implementation": "static"}, {"cache_implementation": "static"}),
    "contrastive search, which transformers does not save": ({"penalty_alpha": 0.6, "top_k": 4}, OURS),
    "several ends": ({"do_sample": True, "eos_token_id": [70, 71]}, {"do_sample": True, "eos_token_id": [70, 71]}),
    "contradictory, with ids": (
        {"do_sample": False, "num_return_sequences": 3, "bos_token_id": 1, "eos_token_id": [70], "pad_token_id": 2},
        OURS | {"bos_token_id": 1, "eos_token_id": [70], "pad_token_id": 2},
    ),
    "text as an id": ({"eos_token_id": "5", "pad_token_id": 2}, OURS | {"eos_token_id": None, "pad_token_id": 2}),
    "text among the ids": ({"eos_token_id": [70, "a"], "bos_token_id": [[1]]}, OURS | {"eos_token_id": None}),
    "other kinds of ids": ({"eos_token_id": {"a": 1}, "bos_token_id": 1.5, "pad_token_id": -1}, OURS),
    "an empty list of ids": ({"eos_token_id": [], "bos_token_id": True}, OURS),
    "beam groups": ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, {"num_beam_groups": 2}),
    "bad words": ({"bad_words_ids": "no", "suppress_tokens": ["x"]}, {}),
    "forced words": ({"force_words_ids": [[1]], "constraints": 3, "num_beams": 2}, {}),
    "text as numbers": ({"temperature": "hot", "top_k": "4", "do_sample": True}, {}),
    "wrong kinds": ({"watermarking_config": "x", "compile_config": {}, "cache_implementation": "?"}, OURS),
    "ours and theirs": ({"custom_generate": "a/b", "do_sample": "yes", "max_new_tokens": -3}, {}),
    "a list": ("[1, 2]", OURS),
    "damaged": ("{", OURS),
    "absent": (None, OURS),
}


@pytest.fixture
def tokenizer():
    return build_tokenizer("char", ["hello"]).fast


@pytest.fixture
def base(tmp_path, tokenizer):
    """A GPT-2 without generation_config.json."""
    sizes = dict(vocab_size=4, n_positions=16, n_embd=8, n_layer=1, n_head=1, bos_token_id=None, eos_token_id=None)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").unlink()
    return tmp_path / "base"


def sample(model, tokenizer):
    streamer = TextStreamer(tokenizer)
    return generate(model, tokenizer, "he", 8, seed=0, top_k=2, temperature=0.8, streamer=streamer)


@pytest.mark.slow
@pytest.mark.parametrize("written, exported", CASES.values(), ids=CASES)
def test_samples_do_not_depend_on_them_and_the_export_keeps_what_can_be_saved(
    base, tokenizer, tmp_path, written, exported
):
    expected = sample(from_gpt2(base), tokenizer)
    if written is not None:
        text = written if isinstance(written, str) else json.dumps(written)
        (base / "generation_config.json").write_text(text)
    assert sample(from_gpt2(base), tokenizer) == expected
    opened, opened_tokenizer = open_model(str(base))
    assert sample(opened, opened_tokenizer) == expected

    model = from_gpt2(base)
    rehearse_export(model, tokenizer, lambda model: model_card(model, "x"))
    save_model_folder(tmp_path / "model", model, tokenizer, model_card(model, "x"))
    saved = GenerationConfig.from_pretrained(tmp_path / "model")
    saved.validate(strict=True)
    assert {name: getattr(saved, name) for name in exported} == exported
    reopened, _ = open_model(str(tmp_path / "model"))
    assert sample(reopened, tokenizer) == expected


def test_legacy_settings_in_config_json_are_dropped(base, tokenizer):
    expected = sample(from_gpt2(base), tokenizer)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_beams": 4, "num_return_sequences": 2}))
    model, _ = open_model(str(base))
    assert sample(model, tokenizer) == sample(from_gpt2(base), tokenizer) == expected
    assert model.generation_config.num_beams in (None, 1)


def test_what_is_dropped_is_said(base, capsys):
    (base / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.7}))
    from_gpt2(base)
    assert "sets temperature beside do_sample=false, which has no effect; dropped" in capsys.readouterr().err


def test_an_export_that_would_fail_is_found_before(base, tokenizer, monkeypatch):
    model = from_gpt2(base)
    model.generation_config.temperature = -1.0  # transformers refuses to save a greedy one with a temperature
    model.generation_config.do_sample = False
    with pytest.raises(UserError, match="could not be saved at the end of this run") as caught:
        rehearse_export(model, tokenizer, lambda model: model_card(model, "x"))
    assert len(str(caught.value).splitlines()) == 1


def test_a_rehearsal_reads_no_weights(base, tokenizer):
    model = from_gpt2(base)
    rehearse_export(model.to("meta"), tokenizer, lambda model: model_card(model, "x"))
    assert next(model.parameters()).device == torch.device("meta")
