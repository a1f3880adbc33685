"""docs/formats.md: its exports, opened by the software that they are for, compute what the model computes. GGUF is
tested in tests/hub/test_publish.py."""

import sys

import pytest
import torch
from support import ROOT
from tiny_models import tiny_model

from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.hub.model_card import model_card
from gpt2repro.models.folder import save_model_folder


@pytest.fixture
def formats(monkeypatch, tmp_path):
    """The benchmark as a module, in an empty working directory."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    monkeypatch.chdir(tmp_path)
    import formats

    return formats


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "mlx"])
def test_the_recipes_compute_the_same(formats, name):
    for package in {"onnx": ["onnxscript", "onnxruntime"], "mlx": ["mlx.core", "mlx_lm"]}[name]:
        pytest.importorskip(package, reason=f"docs/formats.md says how {name} is installed")
    model = tiny_model(vocab_size=128, unpadded_vocab_size=90)
    tokenizer = build_tokenizer("char", ["".join(map(chr, range(32, 122)))]).fast
    save_model_folder(formats.Path("tiny"), model, tokenizer, model_card(model, "tiny"))
    ids = torch.randint(90, (model.config.n_positions,), generator=torch.Generator().manual_seed(0))
    _, logits_of = formats.FORMATS[name]
    with torch.no_grad():
        expected = model(ids[None]).logits[0, :, :90]
    torch.testing.assert_close(torch.tensor(logits_of("./tiny", ids)), expected, atol=1e-4, rtol=0)
