"""The tasks of a scorecard: what is measured, how, on which data, and which scores follow from it."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from gpt2repro.data.manifest import MANIFEST, Manifest, corpus_identity, corpus_title
from gpt2repro.data.order import count_windows
from gpt2repro.data.token_stream import TokenStream
from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.errors import UserError, refuse
from gpt2repro.evaluation import hellaswag, hellaswag_items, lambada
from gpt2repro.evaluation.detokenizers import DETOKENIZERS
from gpt2repro.evaluation.perplexity import (
    BLOCK_CHARACTERS,
    Document,
    TextScore,
    WindowSettings,
    make_documents,
    measure_documents,
    model_positions,
    token_nlls,
    whole_text,
    wikitext_pages,
)
from gpt2repro.evaluation.published import preparation_caveat
from gpt2repro.evaluation.task import Columns, Metric, Task
from gpt2repro.evaluation.task_data import HubSource, download_problems, hub_texts, read_text
from gpt2repro.files import content_sha256
from gpt2repro.models.folder import load_tokenizer


BLOCK_TOKENS = 1024  # of prepared data without <|endoftext|>


def spread(items: Sequence[Any], limit: int | None) -> list[Any]:
    """`limit` items at equal distances, since benchmarks are sorted; all of them without a limit."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]


def describe_data(
    file: str | None, hub_id: str | None, items: list[Any], of: Sequence[Any], units: str, caveat: str | None
) -> dict[str, Any]:
    """What scorecard.json says about a task's data; of a local file its name, not the path.

    Args:
        hub_id: the dataset on the Hub; the file is a copy of it if there is no `caveat`.
        items: those measured, `of` all that were read.
    """
    is_of_hub = hub_id is not None and (file is None or caveat is None)
    return {
        "name": Path(file).name if file else hub_id,
        "hub_id": hub_id if is_of_hub else None,
        "sha256": content_sha256(items),
        "n": len(items),
        "units": units,
        "complete": is_of_hub and caveat is None and len(items) == len(of),
    }


def _other_size(found: int, of_set: int) -> str | None:
    """The caveat about a file that is not a benchmark's set, as a part of it or its training split."""
    return None if found == of_set else f"{found:,} were given, the set has {of_set:,}"


def _sample_text(items: list[Any], of: Sequence[Any]) -> str:
    """A --limit is part of the method."""
    return "" if len(items) == len(of) else f"; {len(items):,} of {len(of):,}, evenly spread"


# ---- HellaSwag ----


def hellaswag_task(file: str | None, limit: int | None, flag: str) -> Task:
    """HellaSwag in both styles.

    Args:
        file: local .jsonl or .jsonl.gz; None: from the Hub.
    Raises:
        UserError: as `hellaswag_items.load_items`.
    """
    if file is None:
        source = HubSource(hellaswag_items.HUB_ID, None, "validation", "ctx")
        refuse(download_problems(source, "HellaSwag", f"give a local copy with {flag}"))
    loaded = hellaswag_items.load_items(file, flag=flag, styles=hellaswag_items.STYLES)
    items = spread(loaded, limit)

    def measure(model: Any, tokenizer: Any, accelerator: Accelerator, settings: WindowSettings) -> Columns:
        scores = hellaswag.score_hellaswag(
            model,
            tokenizer,
            items,
            accelerator,
            settings.batch_size or hellaswag.default_batch_size(accelerator.device),
            hellaswag_items.STYLES,
            settings.progress,
        )
        columns = {"items": np.ones(len(items))}
        for style, score in scores.items():
            columns[f"{style}_acc"] = score.acc.astype(np.float64)
            columns[f"{style}_acc_norm"] = score.acc_norm.astype(np.float64)
        return columns

    other_size = _other_size(len(loaded), hellaswag_items.FULL_SET)
    has_marks = hellaswag_items.has_wikihow_marks(loaded)
    caveats = {
        "completion": other_size
        or (None if has_marks else "this copy of the set lacks WikiHow's marks, which the completion style keeps"),
        "harness": other_size,
    }
    metrics = [
        Metric(
            key=f"hellaswag_{style}_{name}",
            title=f"HellaSwag {name} ({style})",
            numerator=f"{style}_{name}",
            denominator="items",
            unit="share",
            higher_is_better=True,
            headline=name == "acc_norm",
            caveat=caveats[style],
        )
        for style in hellaswag_items.STYLES
        for name in ("acc_norm", "acc")
    ]
    return Task(
        name="hellaswag",
        title="HellaSwag",
        method="zero-shot; completion style as build-nanogpt, harness style as lm-evaluation-harness"
        + _sample_text(items, loaded),
        version=1,
        units="items",
        data=describe_data(file, hellaswag_items.HUB_ID, items, loaded, "items", caveats["harness"]),
        metrics=tuple(metrics),
        measure=measure,
        depends_on_windows=False,
    )


# ---- LAMBADA ----


def lambada_task(file: str | None, limit: int | None, flag: str) -> Task:
    """LAMBADA, OpenAI's variant.

    Raises:
        UserError: as `lambada.read_lambada` and `hub_texts`.
    """
    if file is None:
        texts = hub_texts(lambada.HUB, "LAMBADA", f"give a local copy with {flag}")
        texts = [lambada.check_passage({"text": text}, f"{lambada.HUB}, row {n}") for n, text in enumerate(texts)]
    else:
        texts = lambada.read_lambada(file, f"{flag.removesuffix('FILE')}{file}")
    items = spread(texts, limit)
    caveat = _other_size(len(texts), lambada.FULL_SET)

    def measure(model: Any, tokenizer: Any, accelerator: Accelerator, settings: WindowSettings) -> Columns:
        score = lambada.measure_lambada(model, tokenizer, items, accelerator, settings)
        return {"items": np.ones(len(items)), "nll": score.nll, "correct": score.correct}

    return Task(
        name="lambada",
        title="LAMBADA",
        method="OpenAI's variant, the whole last word greedily, as lm-evaluation-harness' lambada_openai"
        + _sample_text(items, texts),
        version=2,
        units="items",
        data=describe_data(file, lambada.HUB.hub_id, items, texts, "items", caveat),
        metrics=(
            Metric("lambada_acc", "LAMBADA accuracy", "correct", "items", "share", True, True, caveat=caveat),
            Metric(
                "lambada_perplexity", "LAMBADA perplexity", "nll", "items", "perplexity", False, False, caveat=caveat
            ),
        ),
        measure=measure,
        depends_on_windows=False,
    )


# ---- texts ----


@dataclass(frozen=True)
class TextBenchmark:
    """A benchmark of perplexity.

    split: cuts a local file into documents.
    join: whether the Hub's rows are lines of one text.
    size: documents of the whole set; if the rows are joined, rows.
    """

    title: str
    source: HubSource
    split: Callable[[str], list[str]]
    join: bool
    detokenizer: str
    size: int

    def caveat(self, texts: list[str]) -> str | None:
        """Why figures published for the set are not of these texts."""
        if any(UNKNOWN_WORD in text for text in texts) and not self.join:
            return f"this copy has {UNKNOWN_WORD} for rare words, the set of the figures has none"
        found = texts[0].strip().count("\n") + 1 if self.join else len(texts)
        return _other_size(found, self.size)


UNKNOWN_WORD = "<unk>"
TEXT_BENCHMARKS = {
    "wikitext2": TextBenchmark(
        "WikiText-2",
        HubSource("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test", "page"),
        wikitext_pages,
        join=False,
        detokenizer="wikitext",
        size=62,
    ),
    "wikitext103": TextBenchmark(
        "WikiText-103",
        HubSource("EleutherAI/wikitext_document_level", "wikitext-103-raw-v1", "test", "page"),
        wikitext_pages,
        join=False,
        detokenizer="wikitext",
        size=62,
    ),
    "ptb": TextBenchmark(
        "Penn Treebank",
        # `datasets` runs no loading scripts any more; the Hub keeps what the script gave as Parquet on this branch.
        HubSource("ptb-text-only/ptb_text_only", None, "test", "sentence", "refs/convert/parquet", "penn_treebank"),
        whole_text,
        join=True,
        detokenizer="ptb",
        size=3_761,
    ),
}
DETOKENIZED = {"none": "as it is", "wikitext": "de-tokenized as there", "ptb": "de-tokenized after Megatron-LM's rules"}


def benchmark_task(
    name: str, file: str | None, limit: int | None, flag: str, stride: int | None, detokenizer: str | None
) -> Task:
    """One of TEXT_BENCHMARKS.

    Args:
        detokenizer: a key of DETOKENIZERS; None: the benchmark's own.
    Raises:
        UserError: the file cannot be read, or the Hub not be reached.
    """
    benchmark = TEXT_BENCHMARKS[name]
    if file is None:
        rows = hub_texts(benchmark.source, benchmark.title, f"give a local copy with {flag}")
        texts = [" \n".join(rows)] if benchmark.join else rows
    else:
        texts = benchmark.split(read_text(file, f"{flag.removesuffix('FILE')}{file}"))
    rules = detokenizer or benchmark.detokenizer
    caveat = benchmark.caveat(texts)
    if stride or rules != benchmark.detokenizer:
        caveat = "measured with other settings"
    return _text_task(name, benchmark.title, texts, file, benchmark.source.hub_id, limit, stride, rules, caveat)


def plain_text_task(file: str, name: str, stride: int | None, detokenizer: str | None) -> Task:
    """A text file of the user's, as one document.

    Args:
        name: in the table.
    Raises:
        UserError: it cannot be read.
    """
    texts = [read_text(file, f"--text {file}")]
    return _text_task(f"text:{name}", name, texts, file, None, None, stride, detokenizer or "none", None)


def _text_task(
    name: str,
    title: str,
    texts: list[str],
    file: str | None,
    hub_id: str | None,
    limit: int | None,
    stride: int | None,
    detokenizer: str,
    caveat: str | None,
) -> Task:
    all_documents = make_documents(texts, DETOKENIZERS[detokenizer])
    documents = spread(all_documents, limit)
    units = "documents" if len(documents) > 1 else f"blocks of {BLOCK_CHARACTERS:,} characters"

    def measure(model: Any, tokenizer: Any, accelerator: Accelerator, settings: WindowSettings) -> Columns:
        return text_columns(measure_documents(model, tokenizer, documents, accelerator, settings, title))

    pairs = [(document.published, document.text) for document in documents]
    data = describe_data(file, hub_id, pairs, all_documents, "documents", caveat)
    return Task(
        name=name,
        title=title,
        method=f"{window_method(stride)}; {DETOKENIZED[detokenizer]}, normalised by the published text"
        + _sample_text(documents, all_documents),
        version=1,
        units=units,
        data=data,
        metrics=text_metrics(name.replace("text:", "text_"), title, caveat),
        measure=measure,
    )


def window_method(stride: int | None) -> str:
    if stride is None:
        return "rolling log-likelihood as lm-evaluation-harness, each document from <|endoftext|>"
    return f"sliding window with stride {stride:,}, each document from <|endoftext|>"


def text_columns(score: TextScore) -> Columns:
    return {"nll": score.nll, "tokens": score.tokens, "words": score.words, "bytes": score.bytes}


def text_metrics(key: str, title: str, caveat: str | None) -> tuple[Metric, ...]:
    perplexity = f"{title} perplexity a word"
    return (
        Metric(f"{key}_word_perplexity", perplexity, "nll", "words", "perplexity", False, True, caveat=caveat),
        Metric(f"{key}_bits_per_byte", f"{title} bits a byte", "nll", "bytes", "bits", False, False),
        Metric(f"{key}_loss", f"{title} loss a token", "nll", "tokens", "nats", False, False, True),
    )


# ---- prepared data ----


@dataclass(frozen=True)
class PreparedData:
    """The validation split of a prepared directory or of another trainer's folder.

    tokens: (N,) int64, those that are predicted and the one before them.
    starts: where documents start in there; without <|endoftext|>, blocks of BLOCK_TOKENS tokens.
    """

    directory: Path
    manifest: Manifest
    tokenizer: Any
    tokens: np.ndarray
    starts: np.ndarray

    @classmethod
    def open(cls, directory: str, max_tokens: int) -> "PreparedData":
        """Open the first `max_tokens` of the validation split; 0: all.

        Raises:
            UserError: no such directory, unfinished or damaged; no validation tokens.
        """
        manifest = Manifest.open(directory)
        if not manifest.splits["val"].tokens:
            raise UserError(f"--data {directory} has no validation tokens; prepare it with --val_tokens")
        stream = TokenStream.open(directory, "val", manifest)
        tokens = stream.read(0, min(len(stream), max_tokens + 1) if max_tokens else len(stream))
        eot = manifest.tokenizer.eot_id
        starts = np.arange(0, len(tokens), BLOCK_TOKENS) if eot is None else np.flatnonzero(tokens == eot)
        if not len(starts) or starts[0] != 0:
            starts = np.concatenate([[0], starts])
        folder = Path(directory) / "tokenizer"
        has_manifest = (Path(directory) / MANIFEST).exists()
        tokenizer = load_tokenizer(folder) if has_manifest and folder.is_dir() else build_tokenizer("gpt2", []).fast
        return cls(Path(directory), manifest, tokenizer, tokens, starts)

    @property
    def title(self) -> str:
        return corpus_title(self.manifest.corpus)

    @property
    def units(self) -> str:
        return "documents" if self.manifest.tokenizer.eot_id is not None else f"blocks of {BLOCK_TOKENS:,} tokens"

    @property
    def caveat(self) -> str | None:
        """Why losses published for the corpus are not of this split; None: they are, as far as its preparation says."""
        return preparation_caveat(self.manifest.record())

    def describe(self) -> dict[str, Any]:
        hub_id = self.manifest.corpus.get("hub_id") if self.manifest.corpus.get("revision") else None
        # The fingerprint of another trainer's folder covers its files' ends only.
        identity = [self.manifest.fingerprint, hashlib.sha256(self.tokens.tobytes()).hexdigest()]
        data = {"name": self.title, "hub_id": hub_id, "sha256": content_sha256(identity)}
        return data | {"n": len(self.tokens) - 1, "units": "tokens", "complete": False}

    def texts(self) -> list[str]:
        """The documents, or the blocks, as text without <|endoftext|>."""
        ends = [*self.starts[1:], len(self.tokens)]
        eot = self.manifest.tokenizer.eot_id
        pieces = [self.tokens[start:end] for start, end in zip(self.starts, ends)]
        return [self.tokenizer.decode(piece[piece != eot] if eot is not None else piece) for piece in pieces]


def vocabulary_sha256(tokenizer: Any) -> str:
    """Identity of a tokenizer's ids; models with the same can be compared token by token."""
    return content_sha256(tokenizer.get_vocab())


def validation_task(data: PreparedData) -> Task:
    """The validation loss as the trainer measures it: windows of the model's length tile the split, whatever documents
    they cut."""

    def measure(model: Any, tokenizer: Any, accelerator: Accelerator, settings: WindowSettings) -> Columns:
        positions = model_positions(model)
        predicted = count_windows(len(data.tokens), positions) * positions or len(data.tokens) - 1
        sequence = data.tokens[: predicted + 1]
        tiles = dataclasses.replace(settings, stride=None)
        [nll] = token_nlls(model, [sequence], accelerator, tiles, data.title)
        # A document's <|endoftext|> is predicted, too: it belongs to the document that it opens.
        unit = np.searchsorted(data.starts, np.arange(1, predicted + 1), side="right") - 1
        count = len(data.starts)
        tokens = np.bincount(unit, minlength=count).astype(np.float64)
        return {"nll": np.bincount(unit, weights=nll, minlength=count), "tokens": tokens}

    title = f"held-out loss a token ({data.title})"
    return Task(
        name="validation",
        title=title,
        method="as the trainer's validation: windows of the model's length tile the split, in order",
        version=1,
        units=data.units,
        data=data.describe(),
        metrics=(Metric("validation_loss", title, "nll", "tokens", "nats", False, True, True, data.caveat),),
        measure=measure,
        depends_on_windows=False,
        vocabulary=vocabulary_sha256(data.tokenizer),
        corpus=corpus_identity(data.manifest.corpus),
    )


def validation_text_task(data: PreparedData, stride: int | None) -> Task:
    """The validation split as text, for models with different vocabularies."""
    documents = [Document(text, text) for text in data.texts() if text.strip()]

    def measure(model: Any, tokenizer: Any, accelerator: Accelerator, settings: WindowSettings) -> Columns:
        return text_columns(measure_documents(model, tokenizer, documents, accelerator, settings, data.title))

    title = f"held-out bits a byte ({data.title})"
    metric = Metric("validation_bits_per_byte", title, "nll", "bytes", "bits", False, True)
    return Task(
        name="validation_text",
        title=title,
        method=f"the split decoded to text, since not all models have its vocabulary; {window_method(stride)}",
        version=1,
        units=data.units if len(documents) > 1 else f"blocks of {BLOCK_CHARACTERS:,} characters",
        data=data.describe(),
        metrics=(metric,),
        measure=measure,
    )
