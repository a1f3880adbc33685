"""Parallel preparation with exact limits: which part is prepared next, and under which quota.

The corpus is cut into parts, which processes prepare side by side. Three limits run through the corpus as a whole:
validation takes the first documents until it has val_tokens, and max_tokens or max_documents ends the corpus. Whatever
the number of processes, they fall on exactly the document where a plain loop over all documents meets them.

    part          0             1             2             3             4
             +-------------+-------------+-------------+-------------+-------------+
             | v v v v v v | v v t t t t | t t t t t t | t t         |             |   v: validation, t: train
             +-------------+-------------+-------------+-------------+-------------+
                                ^ val_tokens reached         ^ max_tokens reached: the corpus ends, part 4 is not used

How much of a limit is left for a part, its Quota, depends on all parts before it, so only the first missing part has a
known quota. The other processes do not wait: they make later parts speculatively, under the most likely quota, namely
that validation is full by then and no limit is reached. Once the parts before are made, the guess is checked; if the
outcome would differ, the part is made again. With val_tokens = 10, parts of 8 tokens and four processes:

    part         0                1                2                3                4
    at first     known: val 10                     guess: val 0     guess: val 0     guess: val 0
    then         made: 8 val      known: val 2     made             made             made
    at the end   made             made: 2 val      fits             fits             fits

With val_tokens and no other limit the guesses start at the end of the corpus, furthest from the validation documents. A
part is made at most twice: once speculatively, and once under its known quota. All that is stored is each part's record
with the quota it was made under, so a resumed preparation plans from the records alone.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gpt2repro.data.shards import Split


@dataclass(frozen=True)
class Quota:
    """What is left of the limits when a part begins.

    val_tokens: documents go to validation until it has this many more tokens.
    tokens, documents: upper limits over both splits; None: unlimited.
    """

    val_tokens: int = 0
    tokens: int | None = None
    documents: int | None = None

    @property
    def is_limited(self) -> bool:
        """Whether the corpus may end before its last document."""
        return self.tokens is not None or self.documents is not None

    @property
    def exhausted(self) -> bool:
        """Whether the corpus ends before the next document."""
        return self.tokens == 0 or self.documents == 0

    def after(self, record: "PartRecord") -> "Quota":
        """What is left after a part; below zero where a speculative part took too much."""
        return Quota(
            max(0, self.val_tokens - record.splits["val"].tokens),
            None if self.tokens is None else self.tokens - record.total("tokens"),
            None if self.documents is None else self.documents - record.total("documents"),
        )

    def fits(self, record: "PartRecord") -> bool:
        """Whether a part, perhaps made under another quota, would come out the same under this one."""
        if record.quota == self:
            return True
        left = self.after(record)
        overdrawn = (left.tokens or 0) < 0 or (left.documents or 0) < 0
        return record.quota.val_tokens == self.val_tokens and record.complete and not overdrawn


@dataclass(frozen=True)
class PartRecord:
    """What became of a part, as recorded in parts/part_00003.json.

    quota: the one it was made under.
    complete: whether it holds all its documents; False if a limit ended the corpus in it.
    notes: note -> documents, for all of readers.DOCUMENT_NOTES.
    val_lengths: tokens of each validation document, the opening id included.
    """

    quota: Quota
    complete: bool
    notes: dict[str, int]
    splits: dict[str, Split]
    val_lengths: list[int]

    @classmethod
    def read(cls, path: Path) -> "PartRecord | None":
        """None if the file is damaged."""
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except PermissionError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    @classmethod
    def from_dict(cls, content: dict) -> "PartRecord":
        quota = Quota(**content["quota"])
        splits = {name: Split.from_dict(split) for name, split in content["splits"].items()}
        return cls(quota, content["complete"], content["notes"], splits, content["val_lengths"])

    def to_dict(self) -> dict:
        return {
            "quota": dataclasses.asdict(self.quota),
            "complete": self.complete,
            "notes": self.notes,
            "splits": {name: split.to_dict() for name, split in self.splits.items()},
            "val_lengths": self.val_lengths,
        }

    def total(self, unit: str) -> int:
        """The size of both splits in one of shards.UNITS."""
        return sum(split.totals()[unit] or 0 for split in self.splits.values())


class Plan(NamedTuple):
    """What is still to be done.

    used: how many parts the prepared data consists of, as far as is known.
    todo: parts to make with their quotas, most urgent first; empty: all is done.
    """

    used: int
    todo: list[tuple[int, Quota]]


def plan(n_parts: int, records: Mapping[int, PartRecord], quota: Quota) -> Plan:
    """What to do next, see above.

    Args:
        records: of the parts that are made, by number.
        quota: of the whole corpus.
    """
    for number in range(n_parts):
        if quota.exhausted:
            return Plan(number, [])
        record = records.get(number)
        if record is None or not quota.fits(record):
            return Plan(n_parts, [(number, quota), *_speculative(range(number + 1, n_parts), records, quota)])
        if not record.complete:
            return Plan(number + 1, [])
        quota = quota.after(record)
    return Plan(n_parts, [])


def _speculative(later: range, records: Mapping[int, PartRecord], quota: Quota) -> list[tuple[int, Quota]]:
    """The missing parts among the later ones, under the quota they most likely have."""
    missing = [number for number in later if number not in records]
    validation_only = quota.val_tokens > 0 and not quota.is_limited
    if validation_only:
        missing.reverse()
    guess = dataclasses.replace(quota, val_tokens=0)
    return [(number, guess) for number in missing]
