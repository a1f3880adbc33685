"""The data of a run: one directory of tokens, or several mixed by weight. It is opened once and passed on."""

import math
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from gpt2repro.data.manifest import Manifest, States, TokenizerRecord
from gpt2repro.data.order import MIXTURE_BLOCK, count_windows, mixture_slots
from gpt2repro.data.shards import SPLITS, Split
from gpt2repro.data.token_stream import TokenStream
from gpt2repro.errors import UserError, refuse


@dataclass(frozen=True)
class Mixture:
    """One split of the data: a token stream per source.

    names: the directories' names, for reports.
    slots: how many of every MIXTURE_BLOCK samples come from each source.
    """

    names: tuple[str, ...]
    streams: tuple[TokenStream, ...]
    slots: tuple[int, ...]

    @property
    def shares(self) -> list[float]:
        """Each source's share of the samples; they sum to 1."""
        return [slots / MIXTURE_BLOCK for slots in self.slots]

    def frequencies(self, vocab_size: int) -> np.ndarray:
        """(vocab_size,) float64: each token's share of the mixture."""
        counts = [stream.counts(vocab_size) for stream in self.streams]
        return sum(share * count / count.sum() for share, count in zip(self.shares, counts))


@dataclass(frozen=True)
class Source:
    """One directory of a run's data.

    slots: how many of every MIXTURE_BLOCK samples come from it.
    """

    directory: str
    slots: int
    manifest: Manifest

    @property
    def name(self) -> str:
        return source_name(self.directory)

    @property
    def weight(self) -> float:
        return self.slots / MIXTURE_BLOCK

    def windows_problems(self, sequence_length: int) -> list[str]:
        """One line for each split that is shorter than one window."""
        return [
            f"the {name} split of {self.directory} has {split.tokens} tokens, fewer than a window of "
            f"sequence_length + 1 = {sequence_length + 1}; use more text, or lower sequence_length"
            for name, split in self.manifest.splits.items()
            if not count_windows(split.tokens, sequence_length)
        ]


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    sources: the directories, in the recipe's order.
    tokenizer: the one that all sources share.
    train, val: the splits, opened.
    """

    sources: tuple[Source, ...]
    tokenizer: TokenizerRecord
    train: Mixture
    val: Mixture

    @classmethod
    def open(cls, weights: dict[str, float]) -> "RunData":
        """Open directories, each with its weight in the mixture.

        Raises:
            UserError: a weight is too small, two directories have the same name or different tokenizers, a shard is
                missing or of the wrong length; one line for each directory that cannot be opened.
        """
        slots = _checked_slots(weights)
        manifests = _open_manifests(list(weights))
        sources = tuple(
            Source(directory, n_slots, manifest) for directory, n_slots, manifest in zip(weights, slots, manifests)
        )
        _refuse_equal_names(sources)
        tokenizer = _common_tokenizer(sources)
        train, val = (_open_split(sources, split) for split in SPLITS)
        return cls(sources, tokenizer, train, val)

    @property
    def name(self) -> str:
        """The corpus, for titles: `fineweb-edu`, or `70% web + 30% code`."""
        if len(self.sources) == 1:
            return self.sources[0].manifest.corpus["name"]
        return " + ".join(f"{100 * source.weight:g}% {source.name}" for source in self.sources)

    @property
    def fingerprint(self) -> str:
        """A hash of contents, weights and order, by which a resumed run recognizes its data wherever it is stored."""
        if len(self.sources) == 1:
            return self.sources[0].manifest.fingerprint
        lines = [f"{source.manifest.fingerprint} {source.slots}\n" for source in self.sources]
        return sha256("".join(lines).encode()).hexdigest()

    def totals(self, split: str) -> Split:
        """The size of a split. A mixture has no document and byte counts: its bits per byte would need the loss of each
        source."""
        if len(self.sources) == 1:
            return self.sources[0].manifest.splits[split]
        tokens = sum(source.manifest.splits[split].tokens for source in self.sources)
        return Split(tokens, documents=None, bytes=None)

    def record(self) -> dict[str, Any]:
        """What recipe.yaml records of the data."""
        if len(self.sources) == 1:
            return self.sources[0].manifest.record()
        of_sources = [{"directory": s.directory, "weight": s.weight, **s.manifest.record()} for s in self.sources]
        return {
            "manifest_sha256": self.fingerprint,
            "corpus": {"name": self.name},
            "tokenizer": self.tokenizer.to_dict(),
            "sources": of_sources,
            "splits": {name: self.totals(name).totals() for name in SPLITS},
        }

    def tokenizer_folder(self) -> Path | None:
        """The tokenizer of the first source that has one; None if no source has."""
        for source in self.sources:
            if source.manifest.tokenizer.sha256:
                return Path(source.directory) / "tokenizer"
        return None

    def verify_changed(self, verified: States, all_shards: bool = False) -> States:
        """`Manifest.verify_changed` for all sources."""
        states: States = {}
        for source in self.sources:
            states |= source.manifest.verify_changed(source.directory, verified, all_shards)
        return states


def source_name(directory: str) -> str:
    return Path(directory).absolute().name


def _checked_slots(weights: dict[str, float]) -> list[int]:
    are_positive = all(weight > 0 for weight in weights.values()) and math.isfinite(sum(weights.values()))
    slots = mixture_slots(list(weights.values())).tolist() if are_positive else [0]
    if 0 in slots:
        raise UserError(f"data={weights}: each weight must be at least a thousandth of their sum; drop the others")
    return slots


def _open_manifests(directories: list[str]) -> list[Manifest]:
    manifests, problems = [], []
    for directory in directories:
        try:
            manifests.append(Manifest.open(directory))
        except UserError as error:
            problems.append(str(error))
    refuse(problems)
    return manifests


def _refuse_equal_names(sources: tuple[Source, ...]) -> None:
    names = [source.name for source in sources]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise UserError(f"data has two directories named {min(repeated)}, but losses are logged by name; rename one")


def _common_tokenizer(sources: tuple[Source, ...]) -> TokenizerRecord:
    """The tokenizer of the first source that has one; the others' is assumed to be GPT-2's."""
    first = next((source for source in sources if source.manifest.tokenizer.sha256), sources[0])
    for source in sources:
        if not source.manifest.tokenizer.is_same_as(first.manifest.tokenizer):
            raise UserError(
                f"{first.directory} has tokens of {first.manifest.tokenizer}, but {source.directory} of "
                f"{source.manifest.tokenizer}; prepare them with the same --tokenizer"
            )
    return first.manifest.tokenizer


def _open_split(sources: tuple[Source, ...], split: str) -> Mixture:
    return Mixture(
        names=tuple(source.name for source in sources),
        streams=tuple(TokenStream.open(source.directory, split, source.manifest) for source in sources),
        slots=tuple(source.slots for source in sources),
    )
