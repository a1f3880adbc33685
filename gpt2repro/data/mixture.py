"""The data of a run: one directory of tokens, or several that are mixed by weight."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from gpt2repro.data.order import MIXTURE_BLOCK, mixture_slots
from gpt2repro.data.shards import SPLITS, TokenStream, find_manifest
from gpt2repro.errors import UserError


@dataclass(frozen=True)
class Mixture:
    """One split of the data: a token stream for each source.

    names: of the directories, for reports.
    slots: how many of MIXTURE_BLOCK samples come from each.
    """

    names: tuple[str, ...]
    streams: tuple[TokenStream, ...]
    slots: tuple[int, ...]

    @classmethod
    def open(cls, weights: dict[str, float], split: str) -> "Mixture":
        """The `split` ("train" or "val") of directories with weights.

        Raises:
            UserError: what TokenStream.open refuses.
        """
        streams = tuple(TokenStream.open(directory, split) for directory in weights)
        return cls(tuple(map(source_name, weights)), streams, tuple(mixture_slots([*weights.values()]).tolist()))

    @property
    def shares(self) -> list[float]:
        return [slots / MIXTURE_BLOCK for slots in self.slots]

    def frequencies(self, vocab_size: int) -> np.ndarray:
        """(vocab_size,) float64, 1 in all: how frequent each token is in the mixture."""
        counts = [stream.counts(vocab_size) for stream in self.streams]
        return sum(share * count / count.sum() for share, count in zip(self.shares, counts))


def source_name(directory: str) -> str:
    return Path(directory).absolute().name


def data_manifest(weights: dict[str, float]) -> dict:
    """The manifest of the directory; of several, a manifest with their totals that has a record of each as `sources`.

    Raises:
        UserError: a weight that is too small; one line for each directory that cannot be read; two of the same name, or
            of different tokenizers.
    """
    positive = all(weight > 0 for weight in weights.values()) and math.isfinite(sum(weights.values()))
    if not positive or not mixture_slots([*weights.values()]).all():
        raise UserError(f"data={weights}: each weight must be at least a thousandth of their sum; leave the others out")
    manifests, problems = {}, []
    for directory in weights:
        try:
            manifests[directory] = find_manifest(directory)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    if len(manifests) == 1:
        return manifests.popitem()[1]

    names = [source_name(directory) for directory in weights]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"data has two directories named {min(twice)}, the name of their losses; rename one")
    tokenizers = {directory: manifest["tokenizer"] for directory, manifest in manifests.items()}
    first = max(tokenizers, key=lambda directory: tokenizers[directory]["sha256"] is not None)
    for directory, tokenizer in tokenizers.items():
        if not _same_tokenizer(tokenizer, tokenizers[first]):
            raise UserError(
                f"{first} has tokens of {_describe(tokenizers[first])}, {directory} of {_describe(tokenizer)}; "
                "prepare them with the same --tokenizer"
            )
    slots = mixture_slots([*weights.values()]).tolist()
    sources = [
        {"directory": directory, "weight": count / MIXTURE_BLOCK} | data_record(manifest)
        for (directory, manifest), count in zip(manifests.items(), slots)
    ]
    hashes = [f"{source['manifest_sha256']} {count}\n" for source, count in zip(sources, slots)]
    return {
        "corpus": {"name": " + ".join(f"{100 * count / MIXTURE_BLOCK:g}% {name}" for count, name in zip(slots, names))},
        "tokenizer": dict(tokenizers[first]),
        "splits": {
            split: {
                "tokens": sum(source["splits"][split]["tokens"] for source in sources),
                "documents": None,
                "bytes": None,  # bits per byte would need the losses of each
            }
            for split in SPLITS
        },
        "manifest_sha256": sha256("".join(hashes).encode()).hexdigest(),
        "sources": sources,
    }


def each_source(weights: dict[str, float], manifest: dict) -> Iterator[tuple[str, dict]]:
    """The directories of `data_manifest(weights)`, with what it records of each."""
    return zip(weights, manifest.get("sources", [manifest]))


def data_record(manifest: dict) -> dict:
    """What a run records of its data: the manifest without the shards."""
    splits = {
        name: {unit: split[unit] for unit in ("tokens", "documents", "bytes")}
        for name, split in manifest["splits"].items()
    }
    kept = {key: manifest[key] for key in ("manifest_sha256", "corpus", "tokenizer", "sources") if key in manifest}
    return kept | {"splits": splits}


def _same_tokenizer(a: dict, b: dict) -> bool:
    """By their definitions; where another trainer's files bring none along, by name and size."""
    keys = ("sha256",) if a["sha256"] and b["sha256"] else ("name", "vocab_size")
    return all(a[key] == b[key] for key in keys)


def _describe(tokenizer: dict) -> str:
    definition = f", sha256 {tokenizer['sha256'][:8]}..." if tokenizer["sha256"] else ""
    return f"{tokenizer['name']} ({tokenizer['vocab_size']} ids{definition})"
