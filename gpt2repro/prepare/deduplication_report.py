"""What a deduplication removed and kept: statistics.json and report.md, from its output files."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from gpt2repro.prepare.readers import DOCUMENT_NOTES
from gpt2repro.prepare.urls import normalized_url


EXAMPLES = 3  # of each method, in the report
EXCERPT = 300  # characters of an example
LABELS = {"in": "input", "removed_url": "same URL", "removed_minhash": "near-duplicate", "out": "kept"}


# ---- reading the output ----


def read_rows(folder: Path, columns: list[str]) -> Iterator[dict]:
    """The rows of a folder's Parquet files, in corpus order."""
    for path in sorted(folder.glob("*.parquet")):
        yield from _rows_of_file(path, columns)


def _rows_of_file(path: Path, columns: list[str]) -> Iterator[dict]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        for batch in file.iter_batches(columns=columns):
            yield from batch.to_pylist()


def cluster_of(method: str, row: dict) -> str | int:
    """What a removed document shares with the one that was kept, and with no other."""
    return normalized_url(row["url"]) if method == "url" else row["cluster"]


# ---- statistics ----


class Count(NamedTuple):
    """Documents, and bytes of their texts in UTF-8."""

    documents: int
    bytes: int


def statistics(output_dir: Path, settings: dict) -> dict:
    """Everything that statistics.json records.

    Returns:
        documents, bytes (UTF-8 of the texts): {"in", "removed_url", "removed_minhash", "out"};
        notes: how many of the documents read have each of DOCUMENT_NOTES;
        cluster_sizes: for each method {size: clusters}, counting the kept document, from 2;
        datatrove: its version; settings: what was asked for, with the input files and the bytes of text in them.
    """
    folders = {f"removed_{method}": f"removed/{method}" for method in settings["methods"]} | {"out": "documents"}
    counts = {part: _count(output_dir / folder) for part, folder in folders.items()}
    documents = {part: count.documents for part, count in counts.items()}
    text_bytes = {part: count.bytes for part, count in counts.items()}
    return {
        "documents": {"in": sum(documents.values())} | documents,
        "bytes": {"in": sum(text_bytes.values())} | text_bytes,
        "notes": _notes(output_dir / "work" / "notes"),
        "cluster_sizes": {method: _cluster_sizes(output_dir, method) for method in settings["methods"]},
        "datatrove": version("datatrove"),
        "settings": settings,
    }


def _count(folder: Path) -> Count:
    documents = text_bytes = 0
    for row in read_rows(folder, ["bytes"]):
        documents += 1
        text_bytes += row["bytes"]
    return Count(documents, text_bytes)


def _notes(folder: Path) -> dict[str, int]:
    """The sum of what the tasks counted."""
    total = Counter(dict.fromkeys(DOCUMENT_NOTES, 0))
    for path in folder.glob("*.json"):
        total.update(json.loads(path.read_text()))
    return dict(total)


def _cluster_sizes(output_dir: Path, method: str) -> dict[str, int]:
    """size -> number of clusters of that many documents, in ascending order."""
    rows = read_rows(output_dir / "removed" / method, ["url", "cluster"])
    removed = Counter(cluster_of(method, row) for row in rows)
    clusters = Counter(removed.values())
    return {str(size + 1): clusters[size] for size in sorted(clusters)}


# ---- the report ----


def report(output_dir: Path, result: dict) -> str:
    """The statistics, with examples of what was removed, in Markdown."""
    lines = [*_counts_table(result), "", _notes_line(result["notes"])]
    if result["settings"]["minhash"]:
        lines += ["", _minhash_line(**result["settings"]["minhash"])]
    for method, sizes in result["cluster_sizes"].items():
        lines += ["", f"## {method}: cluster sizes", "", "| documents | clusters |", "| ---: | ---: |"]
        lines += [f"| {size} | {count:,} |" for size, count in binned(sizes).items()]
        lines += ["", f"## {method}: examples"]
        for example in examples(output_dir, method):
            lines += ["", *_example_lines(example)]
    return "\n".join(lines) + "\n"


def _counts_table(result: dict) -> list[str]:
    lines = ["# Deduplication", "", "| | documents | % | bytes | % |", "| --- | ---: | ---: | ---: | ---: |"]
    for part in result["documents"]:
        cells = [LABELS[part]]
        for unit in ("documents", "bytes"):
            count, total = result[unit][part], result[unit]["in"]
            cells += [f"{count:,}", f"{100 * count / max(total, 1):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _notes_line(notes: dict[str, int]) -> str:
    return (
        f"Left out: {notes['no text']:,} rows without text, {notes['no JSON']:,} lines that are not JSON. "
        f"Repaired: {notes['repaired']:,} documents with halves of surrogate pairs."
    )


def _minhash_line(n_grams: int, num_buckets: int, hashes_per_bucket: int) -> str:
    found = ", ".join(
        f"{100 * match_probability(jaccard, num_buckets, hashes_per_bucket):.1f}% at {jaccard}"
        for jaccard in (0.5, 0.8, 0.95)
    )
    return (
        f"MinHash compares sets of {n_grams}-grams of words, in {num_buckets} buckets of {hashes_per_bucket} hashes. "
        f"By the bucket formula it finds this share of the pairs at the given Jaccard similarity: {found}."
    )


def match_probability(jaccard: float, num_buckets: int = 14, hashes_per_bucket: int = 8) -> float:
    """Probability that MinHash finds a pair whose sets of n-grams have this Jaccard similarity (intersection over
    union): that all hashes agree in at least one bucket. Source: Leskovec et al., Mining of Massive Datasets, 3.4.2."""
    return 1 - (1 - jaccard**hashes_per_bucket) ** num_buckets


def binned(sizes: dict[str, int]) -> dict[str, int]:
    """Clusters by size in powers of two: 2, 3-4, 5-8, ..."""
    bins: Counter = Counter()
    for size, count in sizes.items():
        bins[(int(size) - 1).bit_length()] += count
    return {f"{2 ** (b - 1) + 1}-{2**b}" if b > 1 else "2": bins[b] for b in sorted(bins)}


class Example(NamedTuple):
    """Two rows of one cluster."""

    removed: dict
    kept: dict


def examples(output_dir: Path, method: str) -> list[Example]:
    """From the first clusters. MinHash may later have removed the document that the URL filter kept."""
    columns = ["text", "id", "url", "bytes", "cluster"]
    removed: dict = {}
    for row in read_rows(output_dir / "removed" / method, columns):
        removed.setdefault(cluster_of(method, row), row)
        if len(removed) == EXAMPLES:
            break
    folders = ["documents", "removed/minhash"] if method == "url" else ["documents"]
    paths = [path for folder in folders for path in (output_dir / folder).glob("*.parquet")]
    kept: dict = {}
    for path in sorted(paths, key=lambda path: path.name):  # the kept one is near, since tasks follow corpus order
        for row in _rows_of_file(path, columns):
            if len(kept) == len(removed):
                break
            if method == "url" and not row["url"]:
                continue
            cluster = cluster_of(method, row)
            if cluster in removed:
                kept[cluster] = row
    return [Example(row, kept[cluster]) for cluster, row in removed.items() if cluster in kept]


def _example_lines(example: Example) -> list[str]:
    """Both texts from shortly before they differ."""
    start = 0
    if example.removed["text"] != example.kept["text"]:
        start = max(0, len(os.path.commonprefix([example.removed["text"], example.kept["text"]])) - 80)
    return [_excerpt("removed", example.removed, start), _excerpt("kept", example.kept, start)]


def _excerpt(label: str, row: dict, start: int) -> str:
    text = " ".join(row["text"][start : start + EXCERPT].split())
    url = f" <{row['url']}>" if row["url"] else ""
    return f"- {label} `{row['id']}`{url}, {row['bytes']:,} bytes, from character {start}: {text}"
