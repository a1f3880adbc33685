"""Perplexity of text: how many nats a model needs for each token, word and byte.

    documents = wikitext_pages(text)                                # or [Document(text)]
    score = measure_documents(model, tokenizer, documents, accelerator, settings)
    score.per("words").value()                                      # perplexity a word

**Rolling log-likelihood**, the default (stride = the model's positions), is that of lm-evaluation-harness: a document's
tokens are cut into windows of as many as the model has positions, and every token is predicted exactly once. The first
is predicted from <|endoftext|>; the first of each later window has one token before it, and the last window is moved
back so that it is full (lm_eval/utils.py, get_rolling_token_windows with context_len=1). A token that a tokenizer puts
before every text by itself, as Llama's does, is predicted by the harness as well; here nothing is put before.

**Sliding window**: with a smaller stride each window predicts only its last `stride` tokens, so that each (but those
of the first window) has at least positions - stride + 1 tokens before it; slower by positions / stride, and closer to
what the model can do. This is the strategy of the transformers documentation's page "Perplexity of fixed-length
models", whose loop differs in three things: it joins all documents into one text, never predicts its first token, and
averages means of windows instead of summing over tokens.

The denominators are those of the text as published, before it is de-tokenized: tokens of the model's tokenizer, words
as lm-evaluation-harness counts them (the pieces between runs of white space, with the empty ones at the ends), and
bytes of UTF-8. Perplexities a word and bits a byte of models with different tokenizers can be compared; losses a token
cannot.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from gpt2repro.errors import UserError
from gpt2repro.evaluation.bootstrap import Ratio
from gpt2repro.evaluation.detokenizers import unchanged
from gpt2repro.evaluation.rows import UnsuitableTokenizer, last_logits, padded, positions, share_of_rank


FALLBACK_POSITIONS = 2048  # of a model without a limit; as lm-evaluation-harness
BLOCK_CHARACTERS = 1024  # of a text that is a single document; about 250 tokens of GPT-2
BATCH_LOGITS = 2**29  # of a batch, by default; 10 windows of GPT-2, 2 GB in float32
CPU_BATCH_LOGITS = 2**26  # one window of GPT-2: more at once were slower there
LARGEST_BATCH = 64
# A page's heading in WikiText has one equals sign on each side, its sections more.
PAGE_TITLE = re.compile(r"^[ \t]*= (?!= ).* =[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Document:
    """A text to be predicted.

    published: as the benchmark has it; its words and bytes are what losses are normalised by.
    text: what the model reads, de-tokenized.
    """

    published: str
    text: str

    @property
    def words(self) -> int:
        return len(re.split(r"\s+", self.published))

    @property
    def bytes(self) -> int:
        return len(self.published.encode())


@dataclass(frozen=True)
class WindowSettings:
    """How windows are scored.

    stride: tokens that each window predicts; None: as many as the model has positions.
    batch_size: windows per forward pass and rank; None: by the size of their logits.
    progress: show a progress bar on the main process.
    """

    stride: int | None = None
    batch_size: int | None = None
    progress: bool = False


DEFAULT_WINDOWS = WindowSettings()


@dataclass(frozen=True)
class TextScore:
    """What a model needs for a text, unit by unit; all (U,). A unit is a document, or of a text that is a single one a
    block of BLOCK_CHARACTERS characters, over which the document's words and bytes are spread evenly.

    nll: float64, nats.
    tokens, words, bytes: float64.
    """

    nll: np.ndarray
    tokens: np.ndarray
    words: np.ndarray
    bytes: np.ndarray

    def per(self, unit: str) -> Ratio:
        """The score normalised by one of these: "tokens": nats a token; "words": perplexity; "bytes": bits."""
        transform = {"tokens": "mean", "words": "perplexity", "bytes": "bits"}[unit]
        return Ratio(self.nll, getattr(self, unit), transform)


# ---- texts ----


def make_documents(texts: list[str], detokenize: Callable[[str], str] = unchanged) -> list[Document]:
    return [Document(text, detokenize(text)) for text in texts if text.strip()]


def wikitext_pages(text: str) -> list[str]:
    """The pages of a WikiText file, as in EleutherAI/wikitext_document_level: each begins with its title."""
    titles = [title.start() for title in PAGE_TITLE.finditer(text)]
    starts, ends = [0, *titles], [*titles, len(text)]
    pages = [text[start:end] for start, end in zip(starts, ends)]
    pages[:-1] = [page.removesuffix("\n") for page in pages[:-1]]  # the line break before the next title
    return [page for page in pages if page.strip()]


def whole_text(text: str) -> list[str]:
    return [text]


def measure_documents(
    model: Any,
    tokenizer: Any,
    documents: list[Document],
    accelerator: Accelerator,
    settings: WindowSettings = DEFAULT_WINDOWS,
    title: str = "perplexity",
) -> TextScore:
    """Score documents one by one, each from its beginning. All ranks call it and get the same result.

    Args:
        model: a causal language model on accelerator.device.
        tokenizer: of transformers; the token before a document is its bos_token, or its eos_token. Of a tokenizer with
            neither (one token per character), each document's first token is not predicted.
        title: of the progress bar.
    Raises:
        UnsuitableTokenizer: the tokenizer has no token for a character of the documents.
        UserError: a loss is not finite.
    """
    check_characters(tokenizer, [document.text for document in documents])
    encoded = [encode_document(tokenizer, document.text) for document in documents]
    if not any(len(ids) > 1 for ids, _ in encoded):
        raise UnsuitableTokenizer("the tokenizer has no tokens for this text")
    nlls = token_nlls(model, [ids for ids, _ in encoded], accelerator, settings, title)
    if len(documents) == 1:
        return _score_of_blocks(documents[0], nlls[0], encoded[0][1])
    return TextScore(
        nll=np.array([nll.sum() for nll in nlls]),
        tokens=np.array([len(nll) for nll in nlls], np.float64),
        words=np.array([document.words for document in documents], np.float64),
        bytes=np.array([document.bytes for document in documents], np.float64),
    )


def encode_document(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """A document's tokens after the one that begins a text.

    Returns:
        ids: (T + 1,) int64; of a tokenizer without such a token the document's own first one takes its place.
        starts: (T,) int64, the character at which each predicted token begins; 0 if the tokenizer does not say.
    """
    offsets = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
    encoding = tokenizer(text, add_special_tokens=False, verbose=False, **offsets)
    ids = encoding["input_ids"]
    starts = [start for start, _ in encoding["offset_mapping"]] if offsets else [0] * len(ids)
    prefix = start_token(tokenizer)
    if prefix is None:
        return np.array(ids, np.int64), np.array(starts[1:], np.int64)
    return np.array([prefix, *ids], np.int64), np.array(starts, np.int64)


def check_characters(tokenizer: Any, texts: list[str]) -> None:
    """Raises UnsuitableTokenizer: the tokenizer has no token for a character of the texts."""
    dropped = dropped_character(tokenizer, texts)
    if dropped is not None:
        raise UnsuitableTokenizer(f"the tokenizer has no token for {dropped!r}, and would leave it out of the text")


def dropped_character(tokenizer: Any, texts: list[str]) -> str | None:
    """The first character but white space of which the tokenizer makes no token; None: there is none."""
    characters = sorted(character for character in set().union(*texts) if not character.isspace())
    if not characters:
        return None
    encoded = tokenizer(characters, add_special_tokens=False, verbose=False)["input_ids"]
    return next((character for character, ids in zip(characters, encoded) if not ids), None)


def start_token(tokenizer: Any) -> int | None:
    """The token from which a text's first one is predicted, as in lm-evaluation-harness."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _score_of_blocks(document: Document, nll: np.ndarray, starts: np.ndarray) -> TextScore:
    """A single document, cut into blocks of its text. A token belongs to the block in which it begins."""
    blocks = starts // BLOCK_CHARACTERS
    count = int(blocks.max()) + 1
    characters = np.full(count, BLOCK_CHARACTERS, np.float64)
    characters[-1] = len(document.text) - BLOCK_CHARACTERS * (count - 1)
    share = characters / characters.sum()
    return TextScore(
        nll=np.bincount(blocks, weights=nll, minlength=count),
        tokens=np.bincount(blocks, minlength=count).astype(np.float64),
        words=share * document.words,
        bytes=share * document.bytes,
    )


# ---- windows ----


@dataclass(frozen=True)
class Row:
    """One row of a batch.

    ids: (T + 1,) int64; all but the last are inputs, all but the first targets.
    scored: how many of the last targets are scored.
    """

    ids: np.ndarray
    scored: int


@dataclass(frozen=True)
class RowScore:
    """What the model gives the scored targets of a row.

    nll: (scored,) float32, nats.
    likeliest: (scored,) bool, whether the target is the likeliest token; empty if not asked.
    """

    nll: np.ndarray
    likeliest: np.ndarray


def rolling_windows(targets: int, positions: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows over a sequence of `targets` + 1 tokens that together predict each but the first exactly once.

    Args:
        positions: inputs of a window at most.
        stride: targets that each window after the first predicts, at most `positions`.
    Yields:
        start, end: the window's inputs are start ... end - 1; its targets lie one further.
        scored: how many of its last targets are predicted.
    """
    predicted = 0
    while predicted < targets:
        scored = min(stride if predicted else positions, targets - predicted)
        end = predicted + scored
        yield max(0, end - positions), end, scored
        predicted = end


def token_nlls(
    model: Any,
    sequences: list[np.ndarray],
    accelerator: Accelerator,
    settings: WindowSettings = DEFAULT_WINDOWS,
    title: str = "perplexity",
) -> list[np.ndarray]:
    """The loss of every token but the first of each sequence, in nats. All ranks call it and get the same result.

    Args:
        sequences: (T + 1,) int64 each.
    Returns:
        (T,) float64 each.
    Raises:
        UserError: a loss is not finite.
    """
    positions = model_positions(model)
    stride = min(settings.stride or positions, positions)
    rows, places = [], []
    for number, ids in enumerate(sequences):
        for start, end, scored in rolling_windows(len(ids) - 1, positions, stride):
            rows.append(Row(ids[start : end + 1], scored))
            places.append((number, end - scored, end))
    nlls = [np.zeros(max(0, len(ids) - 1)) for ids in sequences]
    for (number, first, end), score in zip(places, score_rows(model, rows, accelerator, settings, title)):
        nlls[number][first:end] = score.nll
    return nlls


def model_positions(model: Any) -> int:
    """Tokens that the model sees at once."""
    return positions(model) or FALLBACK_POSITIONS


def score_rows(
    model: Any,
    rows: list[Row],
    accelerator: Accelerator,
    settings: WindowSettings,
    title: str,
    with_likeliest: bool = False,
) -> list[RowScore]:
    """Score rows, shared among the ranks. All ranks call it and get the scores of all rows, in their order.

    Args:
        with_likeliest: also compare each target with the likeliest token, which takes as long as the loss.
    Raises:
        UserError: a loss is not finite.
    """
    batch_size = settings.batch_size or default_batch_size(model, rows, accelerator.device)
    # Longest first: rows of one batch have similar lengths, and a batch too large for the memory fails at the start.
    order = sorted(range(len(rows)), key=lambda r: -len(rows[r].ids))
    mine = share_of_rank(order, accelerator.process_index, accelerator.num_processes)
    hidden = not (settings.progress and accelerator.is_main_process)
    scores: list[tuple[int, RowScore]] = []
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(mine), desc=title, unit=" windows", disable=hidden)
    try:
        with torch.no_grad(), accelerator.autocast(), bar:
            for start in range(0, len(mine), batch_size):
                indices = mine[start : start + batch_size]
                batch = score_batch(model, [rows[r] for r in indices], accelerator.device, with_likeliest)
                scores += zip(indices, batch)
                bar.update(len(indices))
    finally:
        model.train(was_training)
    gathered = dict(gather_object(scores))
    broken = sum(not np.isfinite(score.nll).all() for score in gathered.values())
    if broken:
        raise UserError(
            f"{title}: the losses of {broken} of {len(rows)} windows are not finite; the model's weights are broken, "
            "or its precision is too low (float32 shows which)"
        )
    return [gathered[r] for r in range(len(rows))]


def default_batch_size(model: Any, rows: list[Row], device: torch.device) -> int:
    """Rows of which the logits take a reasonable amount of memory."""
    longest = max((len(row.ids) for row in rows), default=1)
    logits = CPU_BATCH_LOGITS if device.type == "cpu" else BATCH_LOGITS
    fitting = logits // (longest * model.config.get_text_config().vocab_size)
    return min(LARGEST_BATCH, max(1, fitting))


def score_batch(model: Any, rows: list[Row], device: torch.device, with_likeliest: bool = False) -> list[RowScore]:
    """Score rows in one forward pass."""
    tokens, _ = padded([row.ids for row in rows], device)  # (B, T + 1)
    T = tokens.shape[1] - 1
    lengths = [len(row.ids) - 1 for row in rows]
    first = min(length - row.scored for length, row in zip(lengths, rows))  # no target before it is scored
    logits = last_logits(model, tokens[:, :-1], T - first)  # (B, T - first, V)

    scores = []
    for r, (length, row) in enumerate(zip(lengths, rows)):
        begin = length - row.scored
        row_logits = logits[r, begin - first : length - first].float()  # (scored, V); all rows would take much memory
        targets = tokens[r, begin + 1 : length + 1]
        nll = F.cross_entropy(row_logits, targets, reduction="none")
        likeliest = row_logits.argmax(-1) == targets if with_likeliest else torch.empty(0, dtype=torch.bool)
        scores.append(RowScore(nll.cpu().numpy(), likeliest.cpu().numpy()))
    return scores
