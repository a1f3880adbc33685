"""The comparison of two models, checked by plain formulas; scorecard.py as users run it."""

import json

import pytest
import torch
from tiny_models import SIZES, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.evaluation.compare import compare_models
from gpt2repro.hub.model_card import model_card
from gpt2repro.models.folder import save_model_folder
from gpt2repro.models.openai_weights import from_gpt2, to_gpt2


V = 90


@pytest.fixture
def model():
    ours = tiny_model(vocab_size=128, unpadded_vocab_size=V)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.2)
    return ours.eval()


@pytest.fixture
def windows():
    return torch.randint(V, (3, 17), generator=torch.Generator().manual_seed(1))


def test_an_exact_conversion_differs_by_rounding_only(model, windows):
    result = compare_models(model, to_gpt2(model), windows, V)
    assert len(result.hidden_max) == SIZES["n_layer"] + 1
    assert max(*result.hidden_max, result.logits_max, result.kl_max) < 1e-4
    assert result.top1_agreement == 1 and result.tokens == 48


def test_every_figure_equals_its_formula(model, windows):
    other = to_gpt2(model)
    with torch.no_grad():
        other.transformer.h[1].mlp.c_fc.weight[3] += 0.5
        p, q = (m(windows[:, :-1]).logits[..., :V].double() for m in (model, other))
        states = [m(windows[:, :-1], output_hidden_states=True).hidden_states for m in (model, other)]
    result = compare_models(model, other, windows, V)
    assert result.hidden_max[:2] == pytest.approx([0, 0], abs=1e-5)
    assert result.hidden_max[2] == pytest.approx((states[0][2] - states[1][2]).abs().max().item(), rel=1e-4)
    assert result.hidden_mean[2] == pytest.approx((states[0][2] - states[1][2]).abs().mean().item(), rel=1e-4)
    assert result.logits_max == pytest.approx((p - q).abs().max().item(), rel=1e-4)
    assert result.logits_mean == pytest.approx((p - q).abs().mean().item(), rel=1e-4)
    targets = windows[:, 1:, None]
    assert result.loss_a == pytest.approx(-p.softmax(-1).gather(-1, targets).log().mean().item(), rel=1e-5)
    assert result.loss_b == pytest.approx(-q.softmax(-1).gather(-1, targets).log().mean().item(), rel=1e-5)
    assert result.top1_agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item() < 1
    kl = (p.softmax(-1) * (p.softmax(-1) / q.softmax(-1)).log()).sum(-1)
    assert result.kl == pytest.approx(kl.mean().item(), rel=1e-3)
    assert result.kl_max == pytest.approx(kl.max().item(), rel=1e-3)


def test_models_of_different_depth_have_no_hidden_differences(model, windows):
    other = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    result = compare_models(model, other, windows, V)
    assert result.hidden_max == [] and result.logits_max > 0


@pytest.fixture
def folders(tmp_path, topics):
    """A model and its export as a GPT2LMHeadModel, both with a tokenizer."""
    tokenizer = build_tokenizer("bpe:300", topics[:20])
    ours = tiny_model(vocab_size=320, unpadded_vocab_size=300)
    for name, model in {"ours": ours, "gpt2": to_gpt2(ours)}.items():
        save_model_folder(tmp_path / name, model, tokenizer.fast, model_card(model, name))
    return tmp_path


def test_scorecard_prints_the_comparison_and_writes_it(folders, run_script):
    flags = ("--tokens", 200, "--output", folders / "out.json")
    done = run_script("scorecard.py", "--weights-only", folders / "ours", folders / "gpt2", *flags)
    assert done.returncode == 0, done.stderr
    assert "same likeliest token" in done.stdout and "100.0000%" in done.stdout
    written = json.loads((folders / "out.json").read_text())
    assert (
        written["tokens"] == 192 and written["logits_max"] < 1e-5 and written["loss_a"] == pytest.approx(5.7, abs=0.1)
    )


def test_scorecard_refuses_short_texts_and_different_tokenizers(folders, run_script, tmp_path):
    (tmp_path / "short.txt").write_text("a b")
    done = run_script("scorecard.py", "--weights-only", *[folders / "ours"] * 2, "--text", tmp_path / "short.txt")
    assert done.returncode == 2 and "fewer than one window" in done.stderr
    model = from_gpt2(folders / "gpt2")
    other = build_tokenizer("bpe:300", ["another text " * 3 + "".join(map(chr, range(192, 400)))])
    save_model_folder(folders / "other", model, other.fast, model_card(model, "other"))
    done = run_script("scorecard.py", "--weights-only", folders / "ours", folders / "other")
    assert done.returncode == 2 and "different tokenizers" in done.stderr
