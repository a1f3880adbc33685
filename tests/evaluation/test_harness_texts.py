"""Perplexities of WikiText and LAMBADA against lm-evaluation-harness itself: its model, its rules, its metrics."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny_models import tiny_model

from gpt2repro.evaluation.detokenizers import wikitext
from gpt2repro.evaluation.lambada import measure_lambada, split_passage
from gpt2repro.evaluation.perplexity import WindowSettings, make_documents, measure_documents, wikitext_pages
from gpt2repro.models.openai_weights import to_gpt2


pytestmark = pytest.mark.slow  # importing it takes long
REASON = "pip install -e '.[harness]'"
huggingface = pytest.importorskip("lm_eval.models.huggingface", reason=REASON)
instance = pytest.importorskip("lm_eval.api.instance", reason=REASON)
metrics = pytest.importorskip("lm_eval.api.metrics", reason=REASON)
rules = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext", reason=REASON)


@pytest.fixture(scope="module")
def model():
    model = tiny_model(vocab_size=50304, unpadded_vocab_size=50257, n_positions=40, n_embd=16, n_layer=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def harness(model, gpt2):
    return huggingface.HFLM(pretrained=to_gpt2(model), tokenizer=gpt2.fast, device="cpu", batch_size=2)


def requests(kind, arguments):
    return [instance.Instance(kind, {}, given, n) for n, given in enumerate(arguments)]


def test_perplexity_a_word_and_bits_a_byte(model, gpt2, harness, topics):
    text = "".join(f" \n = Page {n} = \n \n {topics[n][: 90 * n]} \n" for n in range(1, 8))
    pages = wikitext_pages(text)
    documents = make_documents(pages, wikitext)
    assert [document.text for document in documents] == [rules.wikitext_detokenizer({"page": page}) for page in pages]

    texts = [(document.text,) for document in documents]
    likelihoods = harness.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    results = [rules.process_results({"page": page}, [value]) for page, value in zip(pages, likelihoods)]
    score = measure_documents(model, gpt2.fast, documents, Accelerator(cpu=True), WindowSettings(batch_size=3))
    assert -score.nll == pytest.approx(likelihoods, rel=1e-5)
    expected = metrics.weighted_perplexity([result["word_perplexity"] for result in results])
    assert score.per("words").value() == pytest.approx(expected, rel=1e-4)
    assert score.per("bytes").value() == pytest.approx(
        metrics.bits_per_byte([result["bits_per_byte"] for result in results]), rel=1e-5
    )


def test_lambada(model, gpt2, harness, topics):
    words = " ".join(topics[:4]).split()
    items = [" ".join(words[start : start + 4 + start // 4]) for start in range(0, 200, 8)]  # some exceed 40 tokens
    context = "It is the"
    with torch.no_grad():
        token = model(torch.tensor([gpt2.fast(context).input_ids])).logits[0, -1].argmax()
    word = gpt2.fast.decode(token)
    items += [f"{words[n]}  {words[n + 1]}   {words[n + 2]}" for n in range(5)]  # several blanks before the last word
    items += [f"{context}{word}"] if word.startswith(" ") and word.strip() else []
    found = harness.loglikelihood(requests("loglikelihood", map(split_passage, items)), disable_tqdm=True)
    score = measure_lambada(model, gpt2.fast, items, Accelerator(cpu=True), WindowSettings(batch_size=3))
    assert -score.nll == pytest.approx([likelihood for likelihood, _ in found], rel=1e-5)
    assert score.correct.tolist() == [greedy for _, greedy in found]
    assert score.perplexity().value() == pytest.approx(np.exp(-np.mean([value for value, _ in found])), rel=1e-4)


def test_the_rules_of_wikitext_on_the_real_file(shared):
    for page in wikitext_pages((shared / "wikitext2_test.txt").read_text(encoding="utf-8")):
        assert wikitext(page) == rules.wikitext_detokenizer({"page": page})
