"""Deduplication before tokenization, with datatrove: by exact URL (the first document is kept), then by MinHash.

datatrove's blocks do the work, and its executors run them on this machine or on a cluster (executors.py); documents are
read by readers.py. Tasks follow from the input files alone, so the result is the same for every executor and number of
workers. The output directory holds

    documents/00000.parquet ...      what is kept, in corpus order: text, id (file/row), url, bytes, cluster
    removed/url/, removed/minhash/   what is removed, likewise
    report.md, statistics.json       the latter is written last: a directory without it is unfinished
    logs/                            datatrove's, one folder per stage; they also record which tasks are completed

and, while it is unfinished, work/ (952 bytes of signatures per document) and settings.json.

datatrove 0.10.1 needs workarounds in four places. Of documents with one hash it keeps the one with the lowest number
within its file, and of a MinHash cluster any one (`document_priority` and `keep_first` make it the first of the
corpus). Its xxhash fails with xxhash 4 (sha1 takes 4% longer). Ray's executor does not raise what tasks raise. The
workers of a killed local executor keep writing (`die_with_parent`).
"""

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np

from gpt2repro.errors import UserError, first_line
from gpt2repro.files import holds_only, write_json
from gpt2repro.prepare.deduplication_report import report, statistics
from gpt2repro.prepare.executors import Stage, run_stages
from gpt2repro.prepare.readers import DOCUMENT_NOTES, URL_FLAG, Piece
from gpt2repro.prepare.request import Execution, refuse_other_settings
from gpt2repro.prepare.urls import url_key
from gpt2repro.processes import end_with_parent


METHODS = ("url", "minhash")
# Of datatrove's MinhashConfig, whose defaults these are. Documents of fewer than n_grams words all pass.
MINHASH = {"n_grams": 5, "num_buckets": 14, "hashes_per_bucket": 8}
MAX_TASKS = 500  # a merging task opens the signature files of all tasks, and 1024 open files are a common limit
SETTINGS, STATISTICS, REPORT = "settings.json", "statistics.json", "report.md"


@dataclass(frozen=True)
class InputFile:
    """A file to deduplicate.

    name: its path within the folder that holds all of them.
    pieces: its pieces, in order.
    """

    name: str
    pieces: list[Piece]


@dataclass(frozen=True)
class DedupOptions:
    """What the result depends on, besides the documents.

    methods: one or both of METHODS; URLs come first.
    text_column, url_column: of the input. Documents without a URL all pass the first method.
    """

    methods: tuple[str, ...]
    text_column: str = "text"
    url_column: str = "url"

    def settings(self, files: list[InputFile]) -> dict:
        """What settings.json records, and by which an unfinished or finished deduplication is recognized."""
        return {
            "methods": [method for method in METHODS if method in self.methods],
            "text_column": self.text_column,
            "url_column": self.url_column,
            "minhash": MINHASH if "minhash" in self.methods else None,
            "files": [{"name": file.name, "bytes": sum(piece.bytes for piece in file.pieces)} for file in files],
        }


def deduplicate(pieces: list[Piece], output_dir: Path, options: DedupOptions, execution: Execution) -> dict:
    """Write the documents that repeat no earlier one into `output_dir`/documents.

    The same call resumes an interrupted deduplication, and returns at once if it is already finished.

    Args:
        pieces: of a corpus, in order. Each of its files is one task, or each run of files if there are more than
            MAX_TASKS.
    Returns:
        The content of statistics.json, see `statistics`.
    Raises:
        UserError: a package or column is missing, the directory holds something else, or a task failed.
    """
    check_methods(options.methods)
    check_packages(options.methods)
    files = group_by_file(pieces, options.url_column if "url" in options.methods else None)
    settings = options.settings(files)
    output_dir = output_dir.resolve()  # Slurm's and Ray's tasks may run in another folder
    finished = open_or_create(output_dir, settings)
    if finished is not None:
        return finished
    check_columns([piece for file in files for piece in file.pieces])
    write_json(output_dir / SETTINGS, settings)

    run_stages(build_stages(files, output_dir, options.methods), output_dir, execution)
    result = statistics(output_dir, settings)
    (output_dir / REPORT).write_text(report(output_dir, result))
    write_json(output_dir / STATISTICS, result)
    remove_work(output_dir)
    return result


# ---- the input and the output directory ----


def check_methods(methods: tuple[str, ...]) -> None:
    """Raise UserError for a method that is not one of METHODS."""
    if not set(methods) <= set(METHODS):
        raise UserError(f"--dedup {','.join(methods)}: use url, minhash, or url,minhash")


def check_packages(methods: tuple[str, ...]) -> None:
    """Raise UserError for missing packages."""
    needed = ["datatrove", "orjson"]
    if "minhash" in methods:
        needed.append("spacy")
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f'deduplication needs {", ".join(missing)}; pip install "gpt2repro[dedup]"')


def group_by_file(pieces: list[Piece], url_column: str | None) -> list[InputFile]:
    """The files that the pieces are cut from, in corpus order, with absolute paths.

    Args:
        url_column: the column to read URLs from; None: they are not needed.
    """
    by_path: dict[str, list[Piece]] = {}
    for piece in pieces:
        path = piece.path if "://" in piece.path else os.path.abspath(piece.path)
        by_path.setdefault(path, []).append(replace(piece, path=path, url_column=url_column))
    if not by_path:
        raise UserError("the corpus has no document to deduplicate; add files to it, or leave --dedup out")
    root = os.path.commonpath([os.path.dirname(path) for path in by_path])
    return [InputFile(os.path.relpath(path, root), pieces) for path, pieces in by_path.items()]


def _read_ours(path: Path) -> dict:
    """The JSON object in a file of this module."""
    try:
        return dict(json.loads(path.read_text()))
    except PermissionError:
        raise
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({first_line(error)}); delete {path.parent}, which then is made anew"
        ) from error


def open_or_create(output_dir: Path, settings: dict) -> dict | None:
    """The statistics if the deduplication is finished; None if it can start or resume here.

    Raises:
        UserError: the directory holds a deduplication with other settings, or other files.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    if (output_dir / STATISTICS).exists():
        result = _read_ours(output_dir / STATISTICS)
        refuse_other_settings(output_dir, result.get("settings", {}), settings)
        remove_work(output_dir)  # in case it was killed just before
        return result
    if (output_dir / SETTINGS).exists():
        refuse_other_settings(output_dir, _read_ours(output_dir / SETTINGS), settings)
        return None
    if not holds_only(output_dir, {SETTINGS + ".tmp"}):
        raise UserError(f"{output_dir} is not empty and was not made by deduplication; choose another directory")
    return None


def remove_work(output_dir: Path) -> None:
    """Remove what only an unfinished deduplication needs."""
    shutil.rmtree(output_dir / "work", ignore_errors=True)
    (output_dir / SETTINGS).unlink(missing_ok=True)


def check_columns(pieces: list[Piece]) -> None:
    """Raise UserError if the first row of the first table lacks a column; later rows may lack the URL."""
    piece = next((piece for piece in pieces if piece.has_columns), pieces[0])
    next(piece.documents(), None)
    if not piece.url_column:
        return
    if not piece.has_columns:
        print("note: text files have no URLs, so all their documents pass --dedup url", flush=True)
        return
    row = next((row for row in piece.rows() if isinstance(row, dict) and piece.column in row), None)
    if row is not None and piece.url_column not in row:
        names = ", ".join(sorted(row))
        raise UserError(f"{piece.path} has no column {piece.url_column!r} but {names}; choose with {URL_FLAG}")


# ---- pipeline steps that datatrove has no block for ----


def read_documents(data, rank: int, world_size: int, files: list[InputFile], notes: str) -> Iterator:
    """The documents of one task: an equal share of the files, in order, so that tasks follow corpus order. Counts the
    documents' notes in a file in the folder `notes`."""
    from datatrove.data import Document

    counts = dict.fromkeys(DOCUMENT_NOTES, 0)
    for file in files[len(files) * rank // world_size : len(files) * (rank + 1) // world_size]:
        documents = (document for piece in file.pieces for document in piece.documents())
        for number, document in enumerate(documents):
            if document.note:
                counts[document.note] += 1
            if document.text is not None:
                yield Document(document.text, f"{file.name}/{number}", metadata={"url": document.url, "task": rank})
    Path(notes).mkdir(parents=True, exist_ok=True)
    write_json(Path(notes) / f"{rank:05d}.json", counts)


def as_row(writer, document) -> dict:
    return {
        "text": document.text,
        "id": document.id,
        "url": document.metadata["url"],
        "bytes": len(document.text.encode()),
        "cluster": document.metadata.get("minhash_cluster_id", -1),
    }


def document_priority(document) -> int:
    """Highest for the first file; without it, ties between files go to the lowest row number."""
    return MAX_TASKS - document.metadata["task"]


def keep_first(data, rank: int, world_size: int, folder: str) -> None:
    """Make every cluster keep its first document; MinhashDedupCluster keeps the root of its union-find tree.

    Rewrites the `.remove` files (row numbers, uint32) from the `.clusters` files (row and cluster number).
    """
    seen: set[int] = set()
    for path in sorted(Path(folder).glob("*.clusters")):
        removed = []
        for row, cluster in np.fromfile(path, "<u4").reshape(-1, 2).tolist():
            if cluster in seen:
                removed.append(row)
            seen.add(cluster)
        np.array(removed, "<u4").tofile(path.with_suffix(".remove"))


def die_with_parent(data, rank: int, world_size: int) -> None:
    """End this worker with the process that started it, or it would write the same files as the repeated command."""
    _watch_parent()


@cache  # one thread, however many tasks this worker runs
def _watch_parent() -> None:
    import multiprocess

    parent = multiprocess.parent_process()
    if parent is not None:
        end_with_parent(parent)


# ---- the stages ----


def build_stages(files: list[InputFile], output_dir: Path, methods: tuple[str, ...]) -> list[Stage]:
    """The pipelines of the deduplication, in order."""
    from datatrove.pipeline import dedup
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    def work(name: str) -> str:
        return str(output_dir / "work" / name)

    hash_config = HashConfig(hash_fc="sha1")
    read = partial(read_documents, files=files, notes=work("notes"))
    tasks = min(len(files), MAX_TASKS)
    stages: list[Stage] = []
    without_url_duplicates: list = []  # the first filter, without a writer: for the signatures of the second method
    filters: list = []
    if "url" in methods:
        config = dedup.ExactDedupConfig(url_key, document_priority, hash_config)
        signatures = dedup.ExactDedupSignature(work("url_signatures"), config)
        duplicates = dedup.ExactFindDedups(work("url_signatures"), work("url_duplicates"), config)
        stages += [
            Stage("url_signatures", tasks, [read, signatures]),
            Stage("url_duplicates", 1, [duplicates]),
        ]
        without_url_duplicates = [dedup.ExactDedupFilter(work("url_duplicates"), config)]
        removed = _parquet_writer(output_dir / "removed" / "url")
        filters.append(dedup.ExactDedupFilter(work("url_duplicates"), config, removed))
    if "minhash" in methods:
        config = MinhashConfig(**MINHASH, hash_config=hash_config)
        signatures = dedup.MinhashDedupSignature(work("minhash_signatures"), config)
        buckets = dedup.MinhashDedupBuckets(work("minhash_signatures"), work("minhash_pairs"), config=config)
        clusters = dedup.MinhashDedupCluster(
            work("minhash_pairs"), work("minhash_clusters"), config, save_cluster_id=True
        )
        keep = partial(keep_first, folder=work("minhash_clusters"))
        stages += [
            Stage("minhash_signatures", tasks, [read, *without_url_duplicates, signatures]),
            Stage("minhash_pairs", config.num_buckets, [buckets]),
            Stage("minhash_clusters", 1, [clusters, keep]),
        ]
        removed = _parquet_writer(output_dir / "removed" / "minhash")
        filters.append(dedup.MinhashDedupFilter(work("minhash_clusters"), removed, load_cluster_ids=True))
    stages.append(Stage("documents", tasks, [read, *filters, _parquet_writer(output_dir / "documents")]))
    return [replace(stage, pipeline=[die_with_parent, *stage.pipeline]) for stage in stages]


def _parquet_writer(folder: Path):
    """datatrove's writer of as_row's columns, one file per task."""
    import pyarrow
    from datatrove.pipeline.writers import ParquetWriter

    columns = {"text": "string", "id": "string", "url": "string", "bytes": "int64", "cluster": "int64"}
    schema = pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in columns.items()])
    return ParquetWriter(str(folder), compression="zstd", adapter=as_row, schema=schema, max_file_size=-1)
