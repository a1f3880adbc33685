"""Deduplication before tokenization, with datatrove: exact URL (the first is kept), then MinHash.

datatrove's blocks do the work and its executors run them, on this machine or on a cluster; the documents are read as
corpora.py reads them. Tasks follow from the input files alone, so the result is the same for every executor and number
of workers. The output directory holds

    documents/00000.parquet ...      what is kept, in corpus order: text, id (file/row), url, bytes, cluster
    removed/url/, removed/minhash/   what is not, likewise
    report.md, statistics.json       the second is written last: a directory without it is unfinished
    logs/                            datatrove's, a folder a stage; they also say which tasks are completed

and while it is unfinished work/ (952 bytes of signatures a document) and settings.json.

datatrove 0.10.1 needs care in four places: of documents with one hash it keeps the one of the lowest number within its
file, of a MinHash cluster any one (`document_priority` and `keep_first` make it the first of the corpus); its xxhash
fails on xxhash 4 (sha1 costs 4% more time); Ray's executor does not raise what tasks raise; and the workers of a local
executor that was killed go on writing (`die_with_parent`).
"""

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from gpt2repro.errors import UserError, first_line
from gpt2repro.files import write_json
from gpt2repro.prepare.corpora import NOTES, Piece, open_corpus


METHODS = ("url", "minhash")
EXECUTORS = ("local", "slurm", "ray")
TRACKING = ("utm_", "gclid=", "fbclid=")  # how the query parameters begin that say whence a visitor came
DEFAULT_PORTS = {"http": ":80", "https": ":443"}
MAX_TASKS = 500  # a task that merges opens the signatures of all, and 1024 open files are a usual limit
SETTINGS, STATISTICS, REPORT = "settings.json", "statistics.json", "report.md"
EXAMPLES = 3  # of each method, in the report


def deduplicate(
    source: str | Path | Sequence[str | Path | Piece],
    output_dir: Path,
    methods: Sequence[str] = METHODS,
    executor: str = "local",
    num_workers: int = 1,
    text_column: str = "text",
    url_column: str = "url",
    n_grams: int = 5,
    num_buckets: int = 14,
    hashes_per_bucket: int = 8,
    slurm_partition: str | None = None,
    slurm_time: str = "24:00:00",
) -> dict | None:
    """Write the documents of `source` that repeat no earlier one into `output_dir`/documents.

    What an interruption left is finished by the same call; what is finished is not repeated.

    Args:
        source: a file, or a folder whose files are taken in their order, or several of them; or the pieces of a corpus.
            They are read as prepare_data.py reads them. Each file, or run of files where there are more than MAX_TASKS,
            is one task.
        methods: one or both of METHODS; URLs come first.
        executor: of EXECUTORS. Ray joins the cluster of RAY_ADDRESS, or starts one on this machine.
        num_workers: tasks at a time.
        text_column, url_column: of the input. Documents without a URL all pass the first method.
        n_grams, num_buckets, hashes_per_bucket: of MinHash. Documents of fewer words than n_grams all pass it.
        slurm_partition, slurm_time: Slurm's --partition and --time of each task.
    Returns:
        What statistics.json says (`statistics` describes it); None where Slurm's jobs are submitted but not done.
    Raises:
        UserError: a package, file or column is missing, the directory holds something else, or a task failed.
    """
    check_packages(methods, executor)
    files = find_files(source, text_column, url_column if "url" in methods else None)
    settings = {
        "methods": [method for method in METHODS if method in methods],
        "text_column": text_column,
        "url_column": url_column,
        "minhash": {"n_grams": n_grams, "num_buckets": num_buckets, "hashes_per_bucket": hashes_per_bucket}
        if "minhash" in methods
        else None,
        "files": [{"name": name, "bytes": sum(piece.bytes for piece in pieces)} for name, pieces in files],
    }
    output_dir = Path(output_dir).resolve()  # Slurm's and Ray's tasks may run in another folder
    if (finished := begin(output_dir, settings)) is not None:
        return finished
    check_columns(files[0][1][0])
    write_json(output_dir / SETTINGS, settings)

    stages = build_stages(files, output_dir, settings)
    with console_to(output_dir / "logs" / "console.log"):
        if executor != "slurm":
            run_here(stages, output_dir, executor, num_workers)
        elif not run_on_slurm(stages, output_dir, num_workers, slurm_partition, slurm_time):
            return None

    result = statistics(output_dir, settings)
    (output_dir / REPORT).write_text(report(output_dir, result))
    write_json(output_dir / STATISTICS, result)
    clean(output_dir)
    return result


# ---- what is asked for ----


def check_packages(methods: Sequence[str], executor: str) -> None:
    if not methods or not set(methods) <= set(METHODS):
        raise UserError(f"deduplication by {', '.join(methods) or 'nothing'}: use some of {', '.join(METHODS)}")
    if executor not in EXECUTORS:
        raise UserError(f"executor {executor!r}: use one of {', '.join(EXECUTORS)}")
    needed = ["datatrove", "orjson"] + ["spacy"] * ("minhash" in methods) + ["ray"] * (executor == "ray")
    if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
        install = '"gpt2repro[dedup]"' + (" ray" if "ray" in missing else "")
        raise UserError(f"deduplication needs {', '.join(missing)}; pip install {install}")


def find_files(
    source: str | Path | Sequence[str | Path | Piece], text_column: str, url_column: str | None
) -> list[tuple[str, list[Piece]]]:
    """(name, pieces) of each file, in corpus order; the name is its path in the folder that holds them all."""
    pieces: list[Piece] = []
    for item in [source] if isinstance(source, str | Path) else source:
        pieces += [item] if isinstance(item, Piece) else open_corpus("files", str(item), text_column).pieces
    by_path: dict[str, list[Piece]] = {}
    for piece in pieces:  # Slurm's and Ray's tasks may run in another folder
        path = piece.path if "://" in piece.path else os.path.abspath(piece.path)
        by_path.setdefault(path, []).append(replace(piece, path=path, url_column=url_column))
    if not by_path:
        raise UserError("the corpus has no document to deduplicate; add files to it, or leave --dedup out")
    root = os.path.commonpath([os.path.dirname(path) for path in by_path])
    return [(os.path.relpath(path, root), pieces) for path, pieces in by_path.items()]


def begin(output_dir: Path, settings: dict) -> dict | None:
    """Create the directory, or check that it is ours; the statistics where it is already finished."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in (STATISTICS, SETTINGS):
        if (output_dir / name).exists():
            found = json.loads((output_dir / name).read_text())
            recorded = found.get("settings", {}) if name == STATISTICS else found
            if differences := [key for key in settings if recorded.get(key) != settings[key]]:
                raise UserError(
                    f"{output_dir} holds a deduplication with other settings ({', '.join(differences)}); "
                    "choose another directory, or delete it"
                )
            if name == STATISTICS:
                clean(output_dir)
                return found
            return None
    if not {path.name for path in output_dir.iterdir()} <= {SETTINGS + ".tmp"}:
        raise UserError(f"{output_dir} is not empty and was not made by deduplication; choose another directory")
    return None


def clean(output_dir: Path) -> None:
    shutil.rmtree(output_dir / "work", ignore_errors=True)
    (output_dir / SETTINGS).unlink(missing_ok=True)


def check_columns(piece: Piece) -> None:
    """The first row of the first file must have the columns; later rows may lack the URL."""
    next(piece.documents(), None)
    row = next(piece.rows(), None)
    if row is not None and piece.url_column and piece.url_column not in row:
        raise UserError(
            f"{piece.path} has no column {piece.url_column!r} but {', '.join(sorted(row))}; choose with --url_column"
        )


# ---- the steps of the pipelines that datatrove has no block for ----


def read_documents(data, rank: int, world_size: int, files: list[tuple[str, list[Piece]]], notes: str) -> Iterator:
    """The documents of one task: an equal share of the files, in order, so that tasks follow corpus order. What they
    have of notes is counted in a file of the folder `notes`."""
    from datatrove.data import Document

    counts = dict.fromkeys(NOTES, 0)
    for name, pieces in files[len(files) * rank // world_size : len(files) * (rank + 1) // world_size]:
        documents = (document for piece in pieces for document in piece.documents())
        for number, document in enumerate(documents):
            if document.note:
                counts[document.note] += 1
            if document.text is not None:
                yield Document(document.text, f"{name}/{number}", metadata={"url": document.url, "task": rank})
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


def normalized_url(url: str) -> str:
    """Equal for URLs that lead to one page: scheme and host in lower case; no default port, fragment, trailing slash
    or tracking parameter (TRACKING). What is no URL stays as it is."""
    try:
        parts = urlsplit(url.strip())
    except ValueError:
        return url.strip()
    user, at, host = parts.netloc.rpartition("@")
    host = host.lower().removesuffix(DEFAULT_PORTS.get(parts.scheme, ":"))
    query = "&".join(parameter for parameter in parts.query.split("&") if not parameter.startswith(TRACKING))
    return urlunsplit((parts.scheme, user + at + host, parts.path.rstrip("/"), query, ""))


def url_key(document) -> str:
    return normalized_url(document.metadata["url"]) if document.metadata["url"] else f"no URL: {document.id}"


def document_priority(document) -> int:
    """Highest for the first file; without it ties between files go to the lowest row number."""
    return MAX_TASKS - document.metadata["task"]


def keep_first(data, rank: int, world_size: int, folder: str) -> None:
    """Let every cluster keep the first of its documents; MinhashDedupCluster keeps the root of its union-find tree.

    It rewrites the `.remove` files (row numbers, uint32) from the `.clusters` files (row and cluster number).
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
    """End this worker with the process that started it; else it would write what the repeated command writes too."""
    watch_parent()


@cache
def watch_parent() -> None:
    import multiprocess

    if (parent := multiprocess.parent_process()) is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def build_stages(files: list[tuple[str, list[Piece]]], output_dir: Path, settings: dict) -> list[tuple[str, int, list]]:
    """(name, tasks, pipeline) of each stage, each to start when the one before is complete."""
    import pyarrow
    from datatrove.pipeline import dedup
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.writers import ParquetWriter
    from datatrove.utils.hashing import HashConfig

    columns = {"text": "string", "id": "string", "url": "string", "bytes": "int64", "cluster": "int64"}
    schema = pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in columns.items()])

    def work(name: str) -> str:
        return str(output_dir / "work" / name)

    def writer(name: str) -> ParquetWriter:
        return ParquetWriter(
            str(output_dir / name), compression="zstd", adapter=as_row, schema=schema, max_file_size=-1
        )

    hash_config = HashConfig(hash_fc="sha1")
    read = partial(read_documents, files=files, notes=work("notes"))
    tasks = min(len(files), MAX_TASKS)
    stages, without_urls, filters = [], [], []
    if "url" in settings["methods"]:
        config = dedup.ExactDedupConfig(url_key, document_priority, hash_config)
        signature = dedup.ExactDedupSignature(work("url_signatures"), config)
        stages += [
            ("url_signatures", tasks, [read, signature]),
            ("url_duplicates", 1, [dedup.ExactFindDedups(work("url_signatures"), work("url_duplicates"), config)]),
        ]
        without_urls = [dedup.ExactDedupFilter(work("url_duplicates"), config)]
        filters = [dedup.ExactDedupFilter(work("url_duplicates"), config, writer("removed/url"))]
    if "minhash" in settings["methods"]:
        config = MinhashConfig(**settings["minhash"], hash_config=hash_config)
        signature = dedup.MinhashDedupSignature(work("minhash_signatures"), config)
        buckets = dedup.MinhashDedupBuckets(work("minhash_signatures"), work("minhash_pairs"), config=config)
        clusters = dedup.MinhashDedupCluster(
            work("minhash_pairs"), work("minhash_clusters"), config, save_cluster_id=True
        )
        keep = partial(keep_first, folder=work("minhash_clusters"))
        stages += [
            ("minhash_signatures", tasks, [read, *without_urls, signature]),
            ("minhash_pairs", config.num_buckets, [buckets]),
            ("minhash_clusters", 1, [clusters, keep]),
        ]
        filters.append(
            dedup.MinhashDedupFilter(work("minhash_clusters"), writer("removed/minhash"), load_cluster_ids=True)
        )
    stages.append(("documents", tasks, [read, *filters, writer("documents")]))
    return [(name, tasks, [die_with_parent, *pipeline]) for name, tasks, pipeline in stages]


# ---- the executors ----


@contextlib.contextmanager
def console_to(path: Path) -> Iterator[None]:
    """Append to a file what this process and those that it starts write to stderr: datatrove's many pages."""
    path.parent.mkdir(exist_ok=True)
    console = os.dup(2)
    with path.open("a") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(console, 2)
        os.close(console)


def run_here(stages: list[tuple], output_dir: Path, executor: str, num_workers: int) -> None:
    """Run the stages one after another on this machine or on Ray, skipping the tasks that are completed."""
    import multiprocess
    from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor

    # Imported once, by the process that the workers are forked from.
    multiprocess.set_forkserver_preload(["__main__", __name__, "datatrove.pipeline.dedup", "spacy"])
    if executor == "ray":
        import ray

        ray.init(ignore_reinit_error=True, log_to_driver=False)
    kind = RayPipelineExecutor if executor == "ray" else LocalPipelineExecutor
    for number, (name, tasks, pipeline) in enumerate(stages, start=1):
        print(f"deduplication {number}/{len(stages)}: {name}, {tasks} tasks", flush=True)
        logs = output_dir / "logs" / name
        run = kind(pipeline, tasks=tasks, workers=min(num_workers, tasks), logging_dir=str(logs))
        reason = "Ray does not say why"
        try:
            run.run()
        except Exception as error:  # whatever a task met: a damaged file, a full disk
            reason = first_line(error)
        if left := run.get_incomplete_ranks():
            raise UserError(
                f"deduplication: {len(left)} of {tasks} tasks of {name} are not completed ({reason}); see {logs}/logs, "
                "mend the cause and repeat the command, which resumes there"
            )


def run_on_slurm(stages: list[tuple], output_dir: Path, num_workers: int, partition: str | None, time: str) -> bool:
    """Whether all stages are completed; if not, submit what is left, unless it is submitted already."""
    executors = slurm_executors(stages, output_dir, num_workers, partition, time)
    if not any(executor.get_incomplete_ranks() for executor in executors):
        return True
    if partition is None:
        raise UserError("executor slurm needs --slurm_partition")
    if missing := [command for command in ("sbatch", "squeue") if shutil.which(command) is None]:
        raise UserError(f"{' and '.join(missing)} not found: executor slurm must be started where Slurm's commands are")

    jobs_file = output_dir / "logs" / "slurm_jobs"
    jobs = jobs_file.read_text() if jobs_file.exists() else ""
    if jobs and subprocess.run(["squeue", "--noheader", f"--jobs={jobs}"], capture_output=True).stdout.strip():
        state = f"are in the queue: wait for them, or end them with `scancel {jobs.replace(',', ' ')}`"
    else:
        try:
            executors[-1].run()  # submits those it depends on first
        except subprocess.CalledProcessError as error:
            raise UserError(f"Slurm refused a job ({first_line(error)}); see {output_dir}/logs/console.log") from error
        jobs = ",".join(str(executor.job_id) for executor in executors if executor.job_id != -1)  # completed before
        jobs_file.write_text(jobs)
        state = "are submitted"
    print(f"deduplication: Slurm jobs {jobs} {state}; when they are done, repeat this command")
    return False


def slurm_executors(stages: list[tuple], output_dir: Path, num_workers: int, partition: str | None, time: str) -> list:
    """datatrove's executor of each stage, which depends on the one before."""
    from datatrove.executor import SlurmPipelineExecutor

    paths = {"PATH": Path(sys.executable).parent, "PYTHONPATH": Path(__file__).resolve().parents[2]}
    environment = " ".join(f"{name}={shlex.quote(str(path))}:${name}" for name, path in paths.items())
    executors: list = []
    for name, tasks, pipeline in stages:
        executor = SlurmPipelineExecutor(
            pipeline,
            tasks=tasks,
            workers=num_workers,
            partition=partition,
            time=time,
            qos=None,
            job_name=f"dedup_{name}",
            env_command=f"export {environment}",
            logging_dir=str(output_dir / "logs" / name),
            depends=executors[-1] if executors else None,
        )
        executors.append(executor)
    return executors


# ---- what came of it ----


def statistics(output_dir: Path, settings: dict) -> dict:
    """Counts, from the output itself.

    Returns:
        documents and bytes (UTF-8 of the texts): {"in", "removed_url", "removed_minhash", "out"};
        cluster_sizes: for each method {size: clusters}, the kept document included, from 2 on;
        notes: how many documents were repaired, and rows left out, of what was read (corpora.Document has the names);
        datatrove: its version; settings: what was asked for, with the input files and the bytes of text in them.
    """
    folders = {**{f"removed_{method}": f"removed/{method}" for method in settings["methods"]}, "out": "documents"}
    counts = {part: count_rows(output_dir / folder) for part, folder in folders.items()}
    notes: Counter = Counter(dict.fromkeys(NOTES, 0))
    for path in (output_dir / "work" / "notes").glob("*.json"):
        notes.update(json.loads(path.read_text()))
    groups = {
        method: Counter(group_of(method, row) for row in rows(output_dir / "removed" / method, ["url", "cluster"]))
        for method in settings["methods"]
    }
    return {
        **{
            unit: {"in": sum(count[i] for count in counts.values())}
            | {part: count[i] for part, count in counts.items()}
            for i, unit in enumerate(("documents", "bytes"))
        },
        "notes": dict(notes),
        "cluster_sizes": {
            method: {str(size + 1): count for size, count in sorted(Counter(group.values()).items())}
            for method, group in groups.items()
        },
        "datatrove": version("datatrove"),
        "settings": settings,
    }


def count_rows(folder: Path) -> tuple[int, int]:
    """Documents, and bytes of their texts."""
    documents = text_bytes = 0
    for row in rows(folder, ["bytes"]):
        documents, text_bytes = documents + 1, text_bytes + row["bytes"]
    return documents, text_bytes


def rows(folder: Path, columns: list[str]) -> Iterator[dict]:
    """The rows of a folder's Parquet files, in corpus order."""
    for path in sorted(folder.glob("*.parquet")):
        yield from rows_of(path, columns)


def rows_of(path: Path, columns: list[str]) -> Iterator[dict]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        for batch in file.iter_batches(columns=columns):
            yield from batch.to_pylist()


def group_of(method: str, row: dict) -> str | int:
    """What a removed document has in common with the one that was kept, and with no other."""
    return normalized_url(row["url"]) if method == "url" else row["cluster"]


def match_probability(jaccard: float, num_buckets: int = 14, hashes_per_bucket: int = 8) -> float:
    """Probability that MinHash finds a pair whose sets of n-grams have this Jaccard similarity (intersection over
    union): that in one bucket or more all hashes agree. Source: Leskovec et al., Mining of Massive Datasets, 3.4.2."""
    return 1 - (1 - jaccard**hashes_per_bucket) ** num_buckets


def report(output_dir: Path, result: dict) -> str:
    """The numbers, and examples of what was removed, in Markdown."""
    labels = {"in": "input", "removed_url": "same URL", "removed_minhash": "near-duplicate", "out": "kept"}
    lines = ["# Deduplication", "", "| | documents | % | bytes | % |", "| --- | ---: | ---: | ---: | ---: |"]
    for part in result["documents"]:
        cells = [labels[part]]
        for counts in (result["documents"], result["bytes"]):
            cells += [f"{counts[part]:,}", f"{100 * counts[part] / max(counts['in'], 1):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    notes = result["notes"]
    lines += [
        "",
        f"Left out: {notes['no text']:,} rows without text, {notes['no JSON']:,} lines that are no JSON. "
        f"Repaired: {notes['repaired']:,} documents with halves of surrogate pairs.",
    ]
    if minhash := result["settings"]["minhash"]:
        buckets, hashes = minhash["num_buckets"], minhash["hashes_per_bucket"]
        found = [
            f"{100 * match_probability(jaccard, buckets, hashes):.1f}% at {jaccard}" for jaccard in (0.5, 0.8, 0.95)
        ]
        lines += [
            "",
            f"MinHash compares sets of {minhash['n_grams']}-grams of words, in {buckets} buckets of {hashes} hashes. "
            f"By the bucket formula it finds, of pairs with a Jaccard similarity so high: {', '.join(found)}.",
        ]
    for method, sizes in result["cluster_sizes"].items():
        lines += ["", f"## {method}: cluster sizes", "", "| documents | clusters |", "| ---: | ---: |"]
        lines += [f"| {size} | {count:,} |" for size, count in binned(sizes)]
        lines += ["", f"## {method}: examples"]
        for removed, kept in examples(output_dir, method):
            same = len(os.path.commonprefix([removed["text"], kept["text"]]))
            start = 0 if removed["text"] == kept["text"] else max(0, same - 80)  # show where they differ
            lines.append("")
            for label, row in (("removed", removed), ("kept", kept)):
                excerpt = " ".join(row["text"][start : start + 300].split())
                url = f" <{row['url']}>" if row["url"] else ""
                lines.append(f"- {label} `{row['id']}`{url}, {row['bytes']:,} bytes, from character {start}: {excerpt}")
    return "\n".join(lines) + "\n"


def binned(sizes: dict[str, int]) -> list[tuple[str, int]]:
    """Clusters by size in powers of two: 2, 3-4, 5-8, ..."""
    bins: Counter = Counter()
    for size, count in sizes.items():
        bins[(int(size) - 1).bit_length()] += count
    return [(f"{2 ** (b - 1) + 1}-{2**b}" if b > 1 else "2", count) for b, count in sorted(bins.items())]


def examples(output_dir: Path, method: str) -> list[tuple[dict, dict]]:
    """(removed, kept) rows of the first clusters. What its URL kept may have fallen to MinHash then."""
    columns = ["text", "id", "url", "bytes", "cluster"]
    removed: dict = {}
    for row in rows(output_dir / "removed" / method, columns):
        removed.setdefault(group_of(method, row), row)
        if len(removed) == EXAMPLES:
            break
    folders = ["documents"] + (["removed/minhash"] if method == "url" else [])
    paths = [path for folder in folders for path in (output_dir / folder).glob("*.parquet")]
    kept: dict = {}
    for path in sorted(paths, key=lambda path: path.name):  # the kept one is near, since tasks follow corpus order
        for row in rows_of(path, columns):
            if len(kept) == len(removed):
                break
            if (method == "minhash" or row["url"]) and (group := group_of(method, row)) in removed:
                kept[group] = row
    return [(row, kept[group]) for group, row in removed.items() if group in kept]
