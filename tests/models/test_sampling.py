"""Samples: several as one batch, one of them streamed; the random state of training left alone."""

import re

import pytest
import torch
from tiny_models import tiny_model
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

import sample
from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.errors import UserError
from gpt2repro.hub.model_card import model_card
from gpt2repro.models import sampling
from gpt2repro.models.folder import save_model_folder
from gpt2repro.models.sampling import FirstRowStreamer, count_new_tokens, draw, generate, samples_at_once


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("char", ["the quick brown fox jumps over a lazy dog\n"]).fast


@pytest.fixture
def model(tokenizer):
    return tiny_model(vocab_size=64, unpadded_vocab_size=len(tokenizer)).eval()


def test_samples_are_drawn_as_transformers_draws_them_in_one_batch(model, tokenizer):
    ids = torch.tensor([tokenizer("the quick").input_ids] * 3)
    torch.manual_seed(5)
    expected = model.generate(ids, max_new_tokens=12, do_sample=True, top_k=7, temperature=0.8, pad_token_id=0)
    state = torch.get_rng_state()
    samples = draw(model, tokenizer, "the quick", 12, seed=5, num_samples=3, top_k=7, temperature=0.8)
    assert torch.equal(samples, expected)
    assert len({tuple(row) for row in samples.tolist()}) == 3
    assert torch.equal(torch.get_rng_state(), state)


def test_one_sample_is_the_text_of_generate(model, tokenizer):
    alone = draw(model, tokenizer, "the", 12, seed=5)
    assert generate(model, tokenizer, "the", 12, seed=5) == tokenizer.decode(alone[0])


def test_the_first_of_a_batch_is_streamed(model, tokenizer, capsys):
    streamer = FirstRowStreamer(tokenizer)
    samples = draw(model, tokenizer, "the", 12, seed=5, num_samples=3, streamer=streamer)
    assert capsys.readouterr().out == tokenizer.decode(samples[0]) + "\n"


def test_a_sample_that_ends_is_padded_while_the_others_go_on(model, tokenizer):
    unlimited = draw(model, tokenizer, "the", 20, seed=5, num_samples=3)
    first_end = int(unlimited[0, 6])
    tokenizer_with_end = build_tokenizer("char", ["the quick brown fox jumps over a lazy dog\n"]).fast
    tokenizer_with_end.eos_token = tokenizer.convert_ids_to_tokens(first_end)
    model.generation_config.eos_token_id = first_end
    samples = draw(model, tokenizer_with_end, "the", 20, seed=5, num_samples=3)
    assert samples[0, :7].equal(unlimited[0, :7]) and (samples[0, 7:] == first_end).all()
    assert not (samples[1:, 7:] == first_end).all()


def test_the_generated_end_of_a_text_is_counted_and_what_pads_it_is_not(model):
    model.generation_config.eos_token_id = [7, 9]
    samples = torch.tensor([[7, 1, 2, 3, 4], [7, 1, 7, 7, 7], [7, 7, 7, 7, 7], [7, 9, 1, 7, 7]])
    assert count_new_tokens(samples, 1, model) == 4 + 2 + 1 + 1
    model.generation_config.eos_token_id = None
    assert count_new_tokens(samples, 2, model) == 4 * 3


def test_a_batch_is_as_large_as_its_cache_may_be(model):
    assert samples_at_once(model, 24) == 64
    with torch.device("meta"):
        gpt2_xl = GPT2LMHeadModel(GPT2Config(n_layer=48, n_embd=1600, n_head=25))
    cache = DynamicCache()
    cache.update(*torch.zeros(2, 1, 25, 1, 64), 0)  # key and value of a position in one layer
    bytes_per_sample = 48 * 1024 * 2 * cache.layers[0].keys.nbytes
    assert samples_at_once(gpt2_xl, 5000) == 8 * 2**30 // bytes_per_sample == 13
    assert samples_at_once(gpt2_xl.bfloat16(), 1024) == 27


@pytest.mark.slow
def test_many_samples_are_drawn_in_batches(model, tokenizer, tmp_path, monkeypatch, capsys):
    """The first batch is that of so many samples alone; no sample comes twice."""
    save_model_folder(tmp_path / "model", model, tokenizer, model_card(model, "tiny"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def sample_texts(number: int) -> tuple[list[str], str]:
        sample.main([str(tmp_path / "model"), "--num_samples", str(number), "--max_new_tokens", "9"])
        printed = capsys.readouterr()
        return re.split(r"--- sample \d+ ---\n", printed.out)[1:], printed.err

    alone, _ = sample_texts(3)
    monkeypatch.setattr(sampling, "MAX_SAMPLES", 3)
    many, speed = sample_texts(7)
    assert many[:3] == alone and len(set(many)) == 7
    assert speed.splitlines()[-1].startswith("63 tokens in ")


def test_flags_that_no_sample_can_be_drawn_with_are_refused(tmp_path):
    """NaN is not above 0 either; torch takes seeds of 64 bits."""
    (tmp_path / "config.json").write_text("{}")
    for flag, value in (("temperature", "nan"), ("temperature", "inf"), ("temperature", "0"), ("seed", str(2**64))):
        with pytest.raises(UserError) as caught:
            sample.parse_arguments([str(tmp_path), f"--{flag}", value])
        assert f"--{flag} {float(value) if flag == 'temperature' else value} must be" in str(caught.value)
