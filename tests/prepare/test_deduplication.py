"""Deduplication of real paragraphs with planted duplicates; every executor, interruptions, mistakes."""

import dataclasses
import gzip
import importlib.util
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pyarrow.parquet
import pytest
from support import PATIENCE, ROOT, wait_until
from support import contents as all_contents

from gpt2repro.errors import UserError
from gpt2repro.prepare import deduplication, executors
from gpt2repro.prepare.corpora import CorpusQuery, open_corpus
from gpt2repro.prepare.deduplication import METHODS, DedupOptions
from gpt2repro.prepare.deduplication_report import match_probability
from gpt2repro.prepare.request import Execution
from gpt2repro.prepare.urls import normalized_url


installed = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("datatrove", "spacy", "orjson")),
    reason='deduplication needs pip install "gpt2repro[dedup]"',
)


EXECUTION = {field.name for field in dataclasses.fields(Execution)}


def deduplicate(source, output_dir, methods=METHODS, **options):
    """Takes the fields of DedupOptions and of Execution as keywords."""
    execution = {name: options.pop(name) for name in EXECUTION & options.keys()}
    options = DedupOptions(tuple(methods), **options)
    paths = [source] if isinstance(source, Path) else source
    corpora = [open_corpus(CorpusQuery("files", str(path), options.text_column)) for path in paths]
    pieces = [piece for corpus in corpora for piece in corpus.pieces]
    return deduplication.deduplicate(pieces, output_dir, options, Execution(**execution))


def five_grams(text):
    words = text.lower().split()
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


@pytest.fixture(scope="module")
def paragraphs(topics):
    """Real paragraphs of 40 words or more; no two share more than a tenth of their 5-grams."""
    chosen = []
    for text in dict.fromkeys(paragraph for topic in topics for paragraph in topic.split("\n\n")):
        grams = five_grams(text)
        if len(grams) >= 36 and all(len(grams & other) < 0.1 * len(grams | other) for _, other in chosen):
            chosen.append((text, grams))
    return [text for text, _ in chosen]


def edited(text, words, number=1):
    """`text` with this many words replaced, starting after the third."""
    old = text.split()
    return " ".join(old[:3] + [f"replaced{number}x{i}" for i in range(words)] + old[3 + words :])


@pytest.fixture(scope="module")
def corpus(paragraphs):
    """Rows of three files, and the ids to be removed: by URL, by MinHash."""
    unique = iter(paragraphs)
    first, second, third = (
        [{"text": next(unique), "url": f"https://docs.org/{f}/{i}"} for i in range(40)] for f in "abc"
    )
    # An earlier row of a later file: the order of the files counts.
    second.insert(0, {"text": next(unique), "url": "HTTPS://Docs.org:443/a/7/?utm_source=feed#top"})
    third.insert(0, {"text": next(unique), "url": "https://docs.org/a/7"})
    second.append({"text": edited(first[3]["text"], 1), "url": "https://docs.org/b/new"})
    second.append({"text": first[5]["text"].upper(), "url": None})
    third += [{"text": second[9]["text"], "url": None}, {"text": ""}, {"text": None}, {"text": "half \ud83d"}]
    third += [{"text": "too few words", "url": None}] * 2  # for 5-grams
    by_url = ["b.parquet/0", "c.jsonl/0"]
    by_minhash = ["b.parquet/41", "b.parquet/42", "c.jsonl/41"]
    return {"a.jsonl.gz": first, "b.parquet": second, "c.jsonl": third}, by_url, by_minhash


@pytest.fixture(scope="module")
def source(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for name, rows in corpus[0].items():
        write(folder / name, rows)
    (folder / "notes.md").write_text("no corpus")
    return folder


def write(path, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.name == "c.jsonl":  # with a byte order mark, as some programs write it
        lines = b"\xef\xbb\xbf" + lines + b'{"text": "broken\n'
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


def table(directory):
    return [row for path in sorted(directory.glob("*.parquet")) for row in pyarrow.parquet.read_table(path).to_pylist()]


def contents(directory):
    """Everything but datatrove's logs, which contain times."""
    return {name: data for name, data in all_contents(directory).items() if not name.startswith("logs/")}


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """The output directory and result of a run with defaults, without a network."""
    output_dir = tmp_path_factory.mktemp("finished")
    connect = socket.socket.connect

    def local_only(self, address):
        assert self.family == socket.AF_UNIX, f"connects to {address}"
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        return output_dir, deduplicate(source, output_dir)


# ---- what is removed, what is kept ----


@pytest.mark.slow
@installed
def test_planted_duplicates_are_removed_and_nothing_else(corpus, finished):
    files, by_url, by_minhash = corpus
    output_dir, _ = finished
    rows = {f"{name}/{i}": row for name, rows in files.items() for i, row in enumerate(rows) if row["text"] is not None}
    assert [row["id"] for row in table(output_dir / "removed" / "url")] == by_url
    assert [row["id"] for row in table(output_dir / "removed" / "minhash")] == by_minhash
    kept = table(output_dir / "documents")
    assert [row["id"] for row in kept] == [name for name in rows if name not in by_url + by_minhash]
    for row in kept:
        expected = rows[row["id"]]
        assert (row["text"], row["url"]) == (expected["text"].replace("\ud83d", "\ufffd"), expected.get("url"))
        assert row["bytes"] == len(row["text"].encode())


@installed
def test_statistics_count_what_was_planted(corpus, finished):
    files, by_url, by_minhash = corpus
    output_dir, result = finished
    assert result == json.loads((output_dir / "statistics.json").read_text())
    texts = {f"{n}/{i}": row["text"] for n, rows in files.items() for i, row in enumerate(rows)}
    size = {name: len(text.encode(errors="replace")) for name, text in texts.items() if text is not None}
    size["c.jsonl/44"] += 2  # U+FFFD is longer than the question mark that Python puts there
    assert result["notes"] == {"repaired": 1, "no text": 1, "no JSON": 1}
    expected = {"in": list(size), "removed_url": by_url, "removed_minhash": by_minhash}
    expected["out"] = [name for name in size if name not in by_url + by_minhash]
    assert result["documents"] == {part: len(names) for part, names in expected.items()}
    assert result["bytes"] == {part: sum(size[name] for name in names) for part, names in expected.items()}
    assert result["cluster_sizes"] == {"url": {"3": 1}, "minhash": {"2": 3}}
    assert [file["name"] for file in result["settings"]["files"]] == list(files)


@installed
def test_the_report_shows_numbers_and_examples(corpus, finished):
    output_dir, result = finished
    report = (output_dir / "report.md").read_text()
    assert f"| input | {result['documents']['in']:,} | 100.00 | {result['bytes']['in']:,} | 100.00 |" in report
    assert "5.3% at 0.5, 92.4% at 0.8" in report
    for removed, kept in (("b.parquet/0", "a.jsonl.gz/7"), ("b.parquet/41", "a.jsonl.gz/3")):
        assert report.index(f"- removed `{removed}`") < report.index(f"- kept `{kept}`")


@pytest.mark.slow
@installed
def test_nothing_but_the_result_is_left(finished):
    assert {path.name for path in finished[0].iterdir()} == {
        *("documents", "removed", "report.md", "statistics.json", "logs")
    }


@pytest.mark.slow
@installed
def test_the_first_of_a_cluster_is_kept(paragraphs, tmp_path):
    """In datatrove's clusters, two later copies that are more similar to each other would displace the first."""
    long = [text for text in paragraphs if len(text.split()) >= 80][:30]
    write(tmp_path / "a.jsonl", [{"text": text} for text in long])
    copies = [edited(text, round(len(text.split()) * 0.12)) for text in long]
    write(tmp_path / "b.jsonl", [{"text": text} for text in copies + [text + " end" for text in copies]])
    deduplicate(tmp_path, tmp_path / "out", ["minhash"])
    removed, kept = (table(tmp_path / "out" / folder) for folder in ("removed/minhash", "documents"))
    clusters = [row["cluster"] for row in kept if row["cluster"] >= 0]
    assert len(set(clusters)) == len(clusters) == 30
    assert {row["cluster"] for row in removed} == set(clusters)
    assert [row["id"] for row in kept if row["id"].startswith("a.jsonl")] == [f"a.jsonl/{i}" for i in range(30)]


@pytest.mark.parametrize(
    "url, normalized",
    [
        ("HTTP://Example.ORG:80/A/?b=1#c", "http://example.org/A?b=1"),
        ("https://example.org:443", "https://example.org"),
        ("https://example.org:80/", "https://example.org:80"),
        ("https://Me@Example.org/", "https://Me@example.org"),
        ("https://a.org/?utm_source=x&id=2&utm_medium=y&gclid=z", "https://a.org?id=2"),
        (" https://a.org/x ", "https://a.org/x"),
        ("http://[::1", "http://[::1"),
        ("not a URL", "not a URL"),
    ],
)
def test_normalized_url(url, normalized):
    assert normalized_url(url) == normalized
    assert normalized_url(normalized) == normalized


def test_the_bucket_formula():
    assert match_probability(0.8) == pytest.approx(0.924, abs=5e-4)  # as datatrove's minhash.py says
    assert match_probability(0.5) == pytest.approx(0.0533, abs=5e-5)
    assert match_probability(1.0) == 1 and match_probability(0.0) == 0


# ---- the executors ----


@pytest.mark.slow
@installed
def test_workers_change_nothing(source, finished, tmp_path):
    files = [source / name for name in ("a.jsonl.gz", "b.parquet", "c.jsonl")]
    assert deduplicate(files, tmp_path / "out", num_workers=2) == finished[1]
    assert contents(tmp_path / "out") == contents(finished[0])


@installed
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs pip install ray")
@pytest.mark.slow
def test_ray_on_one_machine_gives_the_same(source, tmp_path):
    files = [source / "b.parquet", source / "c.jsonl"]
    expected = deduplicate(files, tmp_path / "local", ["minhash"])
    options = {"methods": ["minhash"], "num_workers": 2, "executor": "ray"}
    process = start(tmp_path / "ray", files, tmp_path / "console", **options)
    assert process.wait(PATIENCE) == 0, (tmp_path / "console").read_text()
    assert expected["documents"]["removed_minhash"] == 1
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


SBATCH = """#!/bin/bash
# Runs every task of the job at once, and prints what Slurm prints.
script="${@: -1}"
echo "$*" >> calls
grep -q merge_stats "$script" && { echo "Submitted batch job 1"; exit; }
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for task in $(seq 0 $last); do
    SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=node bash "$script" >> job_output 2>&1 || exit 1
done
echo "Submitted batch job $((100 + $(wc -l < calls)))"
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Slurm's commands for one machine; returns the folder where they log their calls."""
    scripts = {
        "sbatch": SBATCH,
        "scontrol": "#!/bin/bash\necho node\n",
        "squeue": "#!/bin/bash\n",
    }
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(folder)
    return folder


@installed
@pytest.mark.slow
def test_slurm_runs_the_job_scripts(corpus, slurm, tmp_path):
    write(tmp_path / "in.jsonl", corpus[0]["c.jsonl"] * 2)
    call = {
        "methods": ["url"],
        "executor": "slurm",
        "num_workers": 4,
        "slurm_partition": "cpu",
        "slurm_time": "1:30:00",
    }
    result = deduplicate([tmp_path / "in.jsonl"], tmp_path / "out", **call)
    script = (tmp_path / "out" / "logs" / "url_signatures" / "launch_script.slurm").read_text()
    for line in ("partition=cpu", "time=1:30:00", "array=0-0%4", "kill-on-invalid-dep=yes", "cpus-per-task=1"):
        assert f"#SBATCH --{line}\n" in script
    assert f"\nlaunch_pickled_pipeline {tmp_path}/out/logs/url_signatures/executor.pik" in script
    assert f"PYTHONPATH={ROOT}:$PYTHONPATH" in script
    calls = [line for line in (slurm / "calls").read_text().splitlines() if "RUN_OFFSET" in line]
    assert len(calls) == 3
    assert "--dependency" not in calls[0]
    assert "--dependency=afterok:101" in calls[1] and "--dependency=afterok:103" in calls[2]

    assert deduplicate([tmp_path / "in.jsonl"], tmp_path / "local", ["url"]) == result
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    assert result["documents"]["removed_url"] == 41


@pytest.mark.slow
@installed
def test_slurm_is_not_asked_twice(source, slurm, tmp_path, monkeypatch):
    """Jobs that are pending or running are not submitted again: two would write the same files. Those that failed are,
    and fail again."""
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.1)
    (slurm / "sbatch").write_text("#!/bin/bash\necho x >> calls\necho Submitted batch job 7\n")
    # In the queue for two looks of the first command and two of the second.
    looks = "echo look >> looks\n(( $(wc -l < looks) % 3 )) && echo 7\nexit 0\n"
    (slurm / "squeue").write_text(f"#!/bin/bash\n{looks}")
    call = {"executor": "slurm", "slurm_partition": "cpu"}
    with pytest.raises(UserError, match="3 of 3 tasks of url_signatures are not completed .* repeat the command"):
        deduplicate(source, tmp_path / "out", **call)
    jobs = tmp_path / "out" / "logs" / executors.SLURM_JOBS
    assert not jobs.exists()
    submitted = len((slurm / "calls").read_text())
    jobs.write_text("url_signatures_1")  # as if that command had been killed while it waited
    with pytest.raises(UserError, match="3 of 3 tasks of url_signatures"):
        deduplicate(source, tmp_path / "out", **call)
    assert (slurm / "looks").read_text().count("look") == 9 and len((slurm / "calls").read_text()) == 2 * submitted
    scripts = sorted((tmp_path / "out" / "logs").glob("*/launch_script.slurm"))
    assert len(scripts) == 6
    arrays = [line for path in scripts for line in path.read_text().splitlines() if "--array" in line]
    assert sorted(arrays) == sorted(f"#SBATCH --array=0-{last}%1" for last in (2, 2, 2, 0, 0, 13))


# ---- interruptions ----


def start(output_dir, sources, console, **options):
    """Start deduplicator.py in a process group of its own.

    Args:
        console: what it prints; a file, because datatrove's idle helpers would hold a pipe open.
    """
    script = ROOT / "tests" / "deduplicator.py"
    command = [sys.executable, script, output_dir, json.dumps(options), *sources]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with console.open("w") as file:
        return subprocess.Popen(
            list(map(str, command)), env=environment, stdout=file, stderr=file, start_new_session=True
        )


@pytest.mark.slow
@installed
@pytest.mark.parametrize(
    "file, number",
    [
        ("url_signatures/0000/00001.c4_sig", 1),
        ("bucket_001/00001.minhash.sig", 2),  # the second time it is written, sorted
        ("documents/00001.parquet", 1),
    ],
)
def test_a_killed_run_is_finished_by_the_same_call(source, finished, tmp_path, file, number):
    console = tmp_path / "console"
    process = start(tmp_path / "out", [source], console, die_writing=[file, number])
    assert process.wait(PATIENCE) == -signal.SIGKILL, console.read_text()
    os.killpg(process.pid, signal.SIGKILL)  # the helpers
    assert not (tmp_path / "out" / "statistics.json").exists()
    assert deduplicate(source, tmp_path / "out") == finished[1]
    assert contents(tmp_path / "out") == contents(finished[0])


@pytest.mark.slow
@installed
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_workers_end_with_a_killed_run(source, tmp_path):
    """They would continue its tasks, and write the same files as the repeated call. So do the servers between them."""
    os.mkfifo(tmp_path / "endless.jsonl")  # its reader waits forever
    sources = [source / "c.jsonl", tmp_path / "endless.jsonl"]
    process = start(tmp_path / "out", sources, tmp_path / "console", methods=["url"], num_workers=2)
    logs = tmp_path / "out" / "logs" / "url_signatures"
    try:
        wait_until(lambda: (logs / "completions" / "00000").exists() and (logs / "logs" / "task_00001.log").exists())
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if child.ppid() != process.pid]  # started by multiprocess's fork server
        process.kill()
        process.wait()
        assert len(workers) == 2
        wait_until(lambda: all(not child.is_running() or child.status() == "zombie" for child in children))
    finally:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@installed
def test_a_finished_run_is_not_repeated(source, finished, monkeypatch):
    monkeypatch.setattr(deduplication, "build_stages", None)
    assert deduplicate(source, finished[0], executor="local", num_workers=3) == finished[1]


@pytest.mark.slow
@installed
def test_a_failed_task_is_named_and_resumed(corpus, source, finished, tmp_path):
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-8] + b"damaged!")
    with pytest.raises(UserError, match=r" of 3 tasks of url_signatures are not completed \(cannot read .*repeat"):
        deduplicate(tmp_path, tmp_path.parent / "resumed")
    (tmp_path / "a.jsonl.gz").write_bytes(whole)
    assert deduplicate(tmp_path, tmp_path.parent / "resumed") == finished[1]
    assert contents(tmp_path.parent / "resumed") == contents(finished[0])


# ---- mistakes ----


def test_missing_packages_are_named(source, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs datatrove, orjson, spacy; pip install \"gpt2repro\[dedup\]\"$"):
        deduplicate(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_method(source, tmp_path):
    with pytest.raises(UserError, match="--dedup urls,minhash: use url, minhash, or url,minhash"):
        deduplicate(source, tmp_path / "out", ["urls", "minhash"])


@installed
@pytest.mark.parametrize("name", ["a.jsonl.gz", "b.parquet", "c.jsonl"])
def test_a_missing_column_lists_the_columns(source, tmp_path, name):
    with pytest.raises(UserError, match="has no column 'link' but text, url; choose with --url_column"):
        deduplicate([source / name], tmp_path / "out", url_column="link")
    with pytest.raises(UserError, match="has no column 'content' but text, url; choose with --text_column"):
        deduplicate([source / name], tmp_path / "out", text_column="content")
    assert not list((tmp_path / "out").iterdir())


@installed
def test_unusable_sources(source, tmp_path):
    with pytest.raises(UserError, match="holds no file that ends in"):
        deduplicate(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="no document to deduplicate"):
        deduplicate([], tmp_path / "out")
    (tmp_path / "notes.pdf").write_text("no corpus")
    with pytest.raises(UserError, match="notes.pdf holds no file that ends in"):
        deduplicate([source / "a.jsonl.gz", tmp_path / "notes.pdf"], tmp_path / "out")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), tmp_path / "empty.parquet")
    with pytest.raises(UserError, match="no document to deduplicate"):
        deduplicate([tmp_path / "empty.parquet"], tmp_path / "out")
    (tmp_path / "bad.parquet").write_text("no Parquet")
    with pytest.raises(UserError, match="cannot read .*bad.parquet"):
        deduplicate([tmp_path / "bad.parquet"], tmp_path / "out")


@installed
@pytest.mark.parametrize("change", [{"minhash": {"num_buckets": 9}}, {"methods": ["url"]}, {"text_column": "url"}])
def test_other_settings_are_refused(source, finished, change, monkeypatch):
    options = dict(change)
    monkeypatch.setattr(deduplication, "MINHASH", deduplication.MINHASH | options.pop("minhash", {}))
    before = contents(finished[0])
    with pytest.raises(UserError, match="other settings"):
        deduplicate(source, finished[0], **options)
    assert contents(finished[0]) == before


@installed
def test_the_order_of_files_is_a_setting(source, finished):
    files = [source / name for name in ("c.jsonl", "b.parquet", "a.jsonl.gz")]
    with pytest.raises(UserError, match=r"other settings \(files\)"):
        deduplicate(files, finished[0])


@installed
def test_a_foreign_directory_is_refused(source, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="was not made by deduplication"):
        deduplicate(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
