"""How validation is split off: which documents, and which fraction suits a small corpus."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b


HASHES = 2**64
FITTING_SHARE = 10  # a fraction is made to fit so that one document of so many goes to validation, but at least one


@dataclass(frozen=True)
class ValidationSplit:
    """How validation is split off: by one of the two numbers, the other is 0.

    tokens: the first documents, until they have this many tokens.
    fraction: this fraction of the documents, chosen by hash; of a single text, its end.
    """

    tokens: int = 0
    fraction: float = 0.0

    def to_dict(self) -> dict[str, int | float]:
        """What the manifest records."""
        return {"val_tokens": self.tokens} if self.tokens else {"val_fraction": self.fraction}

    def __str__(self) -> str:
        return f"--val_tokens {self.tokens}" if self.tokens else f"--val_fraction {self.fraction}"


DEFAULT_SPLIT = ValidationSplit(fraction=0.005)
SMALL_CORPUS_SPLIT = ValidationSplit(fraction=0.1)  # as nanoGPT's data/shakespeare*/prepare.py


def takes_document(fraction: float, text: str) -> bool:
    """Whether a document goes to validation. It depends on its text alone, so that it keeps its split when the corpus
    grows, and exact copies go where it goes."""
    return _hash(text) < fraction * HASHES


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


def fitting_fraction(texts: Iterable[str]) -> float | None:
    """The shortest fraction that takes one of FITTING_SHARE documents, but at least one and not all of them.

    Returns:
        None if there are no two different documents.
    """
    hashes = sorted({_hash(text) for text in texts if text})
    if len(hashes) < 2:
        return None
    count = max(1, len(hashes) // FITTING_SHARE)
    taken, left = hashes[count - 1], hashes[count]
    for digits in range(1, 20):
        fraction = math.ceil(taken / HASHES * 10**digits) / 10**digits
        if taken < fraction * HASHES <= left:
            return fraction
    return left / HASHES


def fitting_tokens(lengths: list[int]) -> int | None:
    """The --val_tokens that takes about one of FITTING_SHARE tokens, and leaves at least the last document.

    Args:
        lengths: tokens of each document, in order.
    Returns:
        None if there is only one document.
    """
    if len(lengths) < 2:
        return None
    return max(1, min(sum(lengths) // FITTING_SHARE, sum(lengths[:-1])))
