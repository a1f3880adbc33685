"""From a benchmark's tokenized text back to text as people write it.

WikiText and the Penn Treebank come as words separated by blanks: `a 5 @-@ year , " big " deal`. A model that was
trained on ordinary text loses much on these marks. The GPT-2 paper (section 3.1) therefore used "invertible
de-tokenizers which remove as many of these tokenization / pre-processing artifacts as possible" and reports gains of
2.5 to 5 perplexity. It does not publish their rules, so nobody's numbers with such rules are exactly the paper's.

The rules here are those in use since: for WikiText those of lm-evaluation-harness (lm_eval/tasks/wikitext/
preprocess_wikitext.py), so that both print the same perplexity; for the Penn Treebank those of Megatron-LM
(tasks/zeroshot_gpt/detokenizer.py), but that every N becomes a number, and none is joined to the word before it. Most
are invertible. Not invertible are, in WikiText, `s '` (a plural's apostrophe or an opening quotation mark?) and ` N `,
which becomes ` 1 ` also where it is a name's initial; and blanks at the ends of lines. Perplexities a word and bits a
byte are therefore normalised by the words and bytes of the text as published.
"""

import re
from collections.abc import Callable


def wikitext(text: str) -> str:
    """Pages of WikiText; the order of the rules matters."""
    text = text.replace("s '", "s'")
    for separator in "-,.":  # within a number or a compound
        text = text.replace(f" @{separator}@ ", separator)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    for opening, closing in ("()", "[]", "{}", '""', "''"):
        text = _without_inner_blanks(text, opening, closing)
    for level in (4, 3, 2):  # headings
        text = text.replace(" ".join("=" * level), "=" * level)
    text = text.replace(" ° ", "°")
    text = _without_blanks_at_line_ends(text)
    text = text.replace(" N ", " 1 ")
    return text.replace(" 's", "'s")


def penn_treebank(text: str) -> str:
    """Lines of the Penn Treebank in Mikolov's form: lower case, every number an N, rare words <unk>."""
    text = text.replace(" '", "'")
    text = _without_blanks_at_line_ends(text)
    text = text.replace(" n't", "n't")
    text = re.sub(r"\bN\b", "1", text)
    for sign in "$#":
        text = text.replace(f"{sign} 1", f"{sign}1")
    return text


def unchanged(text: str) -> str:
    return text


DETOKENIZERS: dict[str, Callable[[str], str]] = {"none": unchanged, "wikitext": wikitext, "ptb": penn_treebank}


def _without_inner_blanks(text: str, opening: str, closing: str) -> str:
    """`( so )` -> `(so)`."""
    start, end = re.escape(opening), re.escape(closing)
    return re.sub(rf"{start}\s*([^{end}]*?)\s*{end}", lambda found: opening + found[1] + closing, text)


def _without_blanks_at_line_ends(text: str) -> str:
    return text.replace(" \n", "\n").replace("\n ", "\n")
