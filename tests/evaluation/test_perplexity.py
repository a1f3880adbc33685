"""Perplexities against plain loops over transformers' own GPT-2, and the de-tokenizers by example."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny_models import tiny_model

from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.errors import UserError
from gpt2repro.evaluation import detokenizers
from gpt2repro.evaluation.perplexity import (
    BLOCK_CHARACTERS,
    Document,
    WindowSettings,
    dropped_character,
    make_documents,
    measure_documents,
    rolling_windows,
    token_nlls,
    wikitext_pages,
)
from gpt2repro.evaluation.rows import UnsuitableTokenizer
from gpt2repro.models.openai_weights import to_gpt2


POSITIONS = 32
WIKITEXT = (
    " \n = Robert <unk> = \n \n Robert 's guest @-@ starring role in 52 @.@ 9 million homes , by ( say ) 2000 . \n"
    " \n = = Career = = \n \n The \" Long Firm \" 's players ' pay ; 40 ° N here . \n \n = = = 2000 – 2005 = = = \n"
    " \n = Du Fu = \n \n A poet . \n"
)


@pytest.fixture(scope="module")
def tokenizer(topics):
    return build_tokenizer("bpe:300", topics[:20]).fast


@pytest.fixture(scope="module")
def ours():
    model = tiny_model(vocab_size=320, unpadded_vocab_size=300)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def plain_nlls(model, ids, stride):
    """The loss of each token but the first, one forward pass each. Token number t (from 1) is in window 0 if t <=
    POSITIONS, else in window k that ends at POSITIONS + k * stride or at the last token."""
    losses = []
    last = len(ids) - 1
    for t in range(1, last + 1):
        k = max(0, math.ceil((t - POSITIONS) / stride))
        end = min(POSITIONS + k * stride, last)  # of the window's targets
        start = max(0, end - POSITIONS)
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:t]])).logits[0, -1, :300].double()
        losses.append(-logits.log_softmax(-1)[ids[t]].item())
    return losses


@pytest.mark.parametrize("stride", [POSITIONS, 12, 1])
@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_every_token_is_predicted_once_from_the_tokens_of_its_window(ours, accelerator, kind, stride):
    model = ours if kind == "ours" else to_gpt2(ours)
    ids = np.random.default_rng(0).integers(300, size=83)
    settings = WindowSettings(stride=stride, batch_size=3)
    short = ids[:7]
    [nll, short_nll] = token_nlls(model, [ids, short], accelerator, settings)
    assert nll == pytest.approx(plain_nlls(to_gpt2(ours), ids.tolist(), stride), abs=2e-4)
    assert short_nll == pytest.approx(nll[:6], abs=2e-4)


@pytest.mark.parametrize(
    "targets, positions, stride", [(1, 8, 8), (8, 8, 8), (9, 8, 8), (40, 8, 8), (41, 8, 3), (30, 8, 1)]
)
def test_windows_cover_a_sequence(targets, positions, stride):
    predicted = []
    for start, end, scored in rolling_windows(targets, positions, stride):
        assert end - start <= positions
        assert end == targets or not predicted or end - start == positions
        assert not predicted or end - scored - start >= positions - stride  # tokens before the first target's input
        predicted += range(end - scored + 1, end + 1)
    assert predicted == list(range(1, targets + 1))


def test_a_document_starts_from_end_of_text(ours, tokenizer, accelerator):
    text = "The quick brown fox"
    ids = [tokenizer.eos_token_id, *tokenizer(text).input_ids]
    with torch.no_grad():
        loss = to_gpt2(ours)(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    score = measure_documents(ours, tokenizer, [Document("The quick  brown fox\n", text)], accelerator)
    assert score.per("tokens").value() == pytest.approx(loss, rel=1e-5)
    total = loss * (len(ids) - 1)
    assert score.per("words").value() == pytest.approx(math.exp(total / 5), rel=1e-5)  # four, and what follows the \n
    assert score.per("bytes").value() == pytest.approx(total / 21 / math.log(2), rel=1e-5)


def test_without_a_start_token_the_first_token_is_not_predicted(ours, accelerator):
    characters = build_tokenizer("char", ["abc"]).fast
    score = measure_documents(ours, characters, [Document("abcab", "abcab")], accelerator)
    assert score.tokens.sum() == 4


@pytest.mark.parametrize("text, dropped", [("to be\tor", None), ("to bé or \n", "é"), ("? to be", "?"), ("", None)])
def test_what_a_tokenizer_cannot_write(gpt2, text, dropped):
    assert dropped_character(build_tokenizer("char", ["to be or not"]).fast, [text, "not"]) == dropped
    assert dropped_character(gpt2.fast, [text, "naïve 🙂\u200b\x00e\u0301"]) is None


def test_a_text_that_a_tokenizer_cannot_write_has_no_score(ours, accelerator):
    """Its losses would be those of the rest, over the words and bytes of the whole."""
    tokenizer = build_tokenizer("char", ["to be or not"]).fast
    documents = make_documents(["to be", "or not?"])
    with pytest.raises(UnsuitableTokenizer, match=r"no token for '\?', and would leave it out"):
        measure_documents(ours, tokenizer, documents, accelerator)


def test_documents_are_units_and_a_single_one_is_cut_into_blocks(ours, tokenizer, accelerator, topics):
    texts = [topic[:700] for topic in topics[:3]]
    separate = measure_documents(ours, tokenizer, make_documents(texts), accelerator)
    assert len(separate.nll) == 3 and separate.bytes.tolist() == [len(text.encode()) for text in texts]

    [document] = make_documents(["".join(texts)])
    blocks = measure_documents(ours, tokenizer, [document], accelerator)
    assert len(blocks.nll) == math.ceil(len(document.text) / BLOCK_CHARACTERS)
    assert blocks.words.sum() == pytest.approx(document.words) and blocks.bytes.sum() == pytest.approx(document.bytes)
    assert blocks.tokens.sum() == len(tokenizer(document.text).input_ids)


def test_broken_weights_are_said(tokenizer, accelerator):
    model = tiny_model(vocab_size=320, unpadded_vocab_size=300)
    model.transformer.wpe.weight.data[3] = math.nan
    with pytest.raises(UserError, match="WikiText: the losses of 1 of 1 windows are not finite"):
        measure_documents(model, tokenizer, [Document("a b c d", "a b c d")], accelerator, title="WikiText")


# ---- texts ----


def harness_pages(text):
    """As the loader of EleutherAI/wikitext_document_level makes them."""
    page, pages = [], []
    for line in text.split("\n"):
        short = line.replace("= = =", "===").replace("= =", "==").strip()
        if short.startswith("= ") and short.endswith(" ="):
            pages.append("\n".join(page))
            page = []
        page.append(line)
    return [page for page in [*pages, "\n".join(page)] if page.strip()]


def test_pages_of_wikitext():
    pages = wikitext_pages(WIKITEXT)
    assert len(pages) == 2 and pages[1].startswith(" = Du Fu = \n")
    assert pages == harness_pages(WIKITEXT)


@pytest.mark.parametrize("before", ["", "\n", "no title \n"])
def test_text_before_the_first_title_is_a_page_only_if_there_is_some(before):
    text = before + " = A = \n \n text a \n = B = \n text b \n"
    assert wikitext_pages(text) == harness_pages(text)
    assert len("".join(wikitext_pages(text))) <= len(text)


def test_pages_of_the_real_file(shared):
    text = (shared / "wikitext2_test.txt").read_text(encoding="utf-8")
    pages = wikitext_pages(text)
    assert len(pages) == 62 and pages == harness_pages(text)


def test_wikitext_becomes_text():
    assert detokenizers.wikitext(wikitext_pages(WIKITEXT)[0]) == (
        " = Robert <unk> =\n\nRobert's guest-starring role in 52.9 million homes, by (say) 2000.\n"
        "\n== Career ==\n\nThe \"Long Firm\"'s players' pay; 40°N here.\n\n=== 2000 – 2005 ===\n"
    )


def test_the_penn_treebank_becomes_text():
    tokenized = " the company 's shares do n't yield N N \n it paid $ N million for # N in <unk> \n"
    readable = " the company's shares don't yield 1 1\nit paid $1 million for #1 in <unk>\n"
    assert detokenizers.penn_treebank(tokenized) == readable
