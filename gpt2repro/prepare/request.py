"""What the user asks prepare_data.py for."""

import dataclasses
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from gpt2repro.errors import UserError
from gpt2repro.prepare.corpora import Corpus, CorpusQuery
from gpt2repro.prepare.validation import ValidationSplit, fitting_fraction, takes_document


EXECUTORS = ("local", "slurm", "ray")


@dataclass(frozen=True)
class Request:
    """The flags that the result depends on, by their own names; None where the corpus decides or nothing limits."""

    corpus: str
    source: str | None
    tokenizer: str | None
    shard_tokens: int
    val_tokens: int | None
    val_fraction: float | None
    text_column: str
    hub_config: str | None
    split: str
    revision: str | None
    max_tokens: int | None
    max_documents: int | None
    tokenizer_documents: int
    dedup: str | None
    url_column: str
    document_separator: str | None
    special_tokens: str

    def settings(self) -> dict:
        """The manifest's record of the request, under "settings"."""
        return dataclasses.asdict(self)

    def deduplication_settings(self) -> dict:
        """The part of it that the deduplication depends on."""
        names = ("corpus", "source", "text_column", "hub_config", "split", "revision", "dedup", "url_column")
        return {name: getattr(self, name) for name in (*names, "document_separator")}

    @property
    def dedup_methods(self) -> tuple[str, ...]:
        return tuple(self.dedup.split(",")) if self.dedup else ()

    def tokenizer_of(self, corpus: Corpus) -> str:
        """The name of the tokenizer, as build_tokenizer understands it."""
        return self.tokenizer or corpus.default_tokenizer

    def corpus_query(self, recorded_revision: str | None = None) -> CorpusQuery:
        """The corpus to open.

        Args:
            recorded_revision: the commit that an earlier attempt read; --revision has precedence.
        """
        return CorpusQuery(
            name=self.corpus,
            source=self.source,
            text_column=self.text_column,
            hub_config=self.hub_config,
            split=self.split,
            revision=self.revision or recorded_revision,
            document_separator=self.document_separator,
        )

    def validation_split(self, corpus: Corpus) -> ValidationSplit:
        """The split that is asked for, or the corpus's own.

        Raises:
            UserError: val_tokens, which takes whole documents, of a corpus that is a single one.
        """
        if self.val_fraction is not None:
            return ValidationSplit(fraction=self.val_fraction)
        if self.val_tokens is None:
            return corpus.default_split
        if corpus.single_text:
            raise UserError(f"--val_tokens {self.val_tokens}: one long text is split by position; use --val_fraction F")
        return ValidationSplit(tokens=self.val_tokens)

    def fitted_split(self, corpus: Corpus, split: ValidationSplit) -> ValidationSplit:
        """The split, unless it is a default fraction that takes no document of a small corpus: then one that does."""
        by_default = self.val_fraction is None and self.val_tokens is None
        if not by_default or corpus.single_text or not split.fraction:
            return split
        if any(takes_document(split.fraction, text) for text in islice(corpus.texts(), self.max_documents)):
            return split
        fraction = fitting_fraction(islice(corpus.texts(), self.max_documents))
        return split if fraction is None else ValidationSplit(fraction=fraction)


def refuse_other_settings(directory: Path, recorded: dict, asked: dict) -> None:
    """Raise UserError if work in a directory was recorded with other settings than those that are asked for.

    A setting that is not recorded did not exist yet, and is not compared; but without a recorded separator, none was
    used.
    """
    recorded = {"document_separator": None} | recorded
    differences = [key for key in asked if key in recorded and recorded[key] != asked[key]]
    if differences:
        raise UserError(
            f"{directory} holds data prepared with other settings ({', '.join(differences)}); "
            "choose another --output_dir, or delete it"
        )


@dataclass(frozen=True)
class Execution:
    """How the work is run, which changes nothing in the result.

    num_workers: processes; tasks at a time on a cluster.
    executor: one of EXECUTORS, for deduplication and tokenization. Ray joins the cluster of RAY_ADDRESS, or starts one
        on this machine.
    slurm_partition, slurm_time: Slurm's --partition and --time of each task.
    """

    num_workers: int = 1
    executor: str = "local"
    slurm_partition: str | None = None
    slurm_time: str = "24:00:00"
