"""Documents in a file of lines: where one ends and the next begins.

Two kinds of data need it: a text file that holds many documents, and datasets whose rows are lines of an article
(WikiText). The lines of one file are joined; a document never continues in the next file.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from gpt2repro.errors import UserError


BLANK = "blank"  # --document_separator blank: blank lines
WIKITEXT_TITLE = r" = (?!=).*(?<!=) = $"  # " = Robert Boulter = "; sections have " = = Career = = "

Line = TypeVar("Line")


@dataclass(frozen=True)
class Boundary:
    """What separates documents: one of the two.

    separator: this text, wherever it occurs in a line; or BLANK. It is not part of the documents.
    title: pattern of a line that begins a document if a blank line precedes it.
    """

    separator: str | None = None
    title: str | None = None

    def __post_init__(self):
        if self.separator is not None and (not self.separator or "\n" in self.separator or "\\n" in self.separator):
            raise UserError(
                f"--document_separator {self.separator!r}: give text that stands in a line, such as '<|endoftext|>', "
                f"or {BLANK} for blank lines"
            )

    def documents(self, lines: Iterator[Line], text_of: Callable[[Line], str]) -> Iterator[tuple[str, list[Line]]]:
        """Each document, without the line ends around it, and the lines that it comes from; no empty documents."""
        texts: list[str] = []
        sources: list[Line] = []
        after_blank = True
        for line in lines:
            text = text_of(line)
            first, *later = self._split(text, after_blank)
            texts.append(first)
            sources.append(line)
            for beginning in later:
                yield from _document(texts, sources)
                texts, sources = [beginning], [line]
            after_blank = not text.strip()
        yield from _document(texts, sources)

    def _split(self, line: str, after_blank: bool) -> list[str]:
        """The line, cut where a document ends."""
        line = line if line.endswith("\n") else line + "\n"  # rows of a table need not end like lines
        if self.title is not None:
            return ["", line] if after_blank and re.match(self.title, line) else [line]
        if self.separator == BLANK:
            return [line] if line.strip() else ["", ""]
        return line.split(self.separator)


def _document(texts: list[str], sources: list[Line]) -> Iterator[tuple[str, list[Line]]]:
    text = "".join(texts).strip("\r\n")
    if text.strip():
        yield text, sources
