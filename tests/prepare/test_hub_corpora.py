"""`prepare_data.py owner/dataset` with the real client, against the server in hub_server.py: what is read, the messages
when it is unavailable, and the cost of a server that fails, stalls or drops connections."""

import io
import json
from functools import partial

import preparer_faults as faults
import pyarrow
import pyarrow.parquet
import pytest
from hub_server import HubServer
from preparer import Preparer, documents_of, manifest_of
from support import contents
from support import prepare as prepare_here


TEXTS = [f"document {number} " + "some words " * (number % 9) for number in range(120)]
CARD = """---
configs:
- config_name: default
  default: true
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
- config_name: small
  data_files: small/*.parquet
---
"""
IMPATIENT = partial(faults.impatient_hub_client, part_bytes=1500)
OPENED = {"ada/tables": 1, "ada/lines": 0}  # requests for a file before a part begins: for a table's footer
CLIENT_TRIES = 6  # after which http_backoff of huggingface_hub gives up


def parquet(texts):
    buffer = io.BytesIO()
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, buffer, row_group_size=15)
    return buffer.getvalue()


def jsonl(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


FILES = {
    "README.md": CARD.encode(),
    "data/train-00000-of-00002.parquet": parquet(TEXTS[:60]),
    "data/train-00001-of-00002.parquet": parquet(TEXTS[60:]),
    "data/test-00000-of-00001.parquet": parquet(["a test", "another"]),
    "small/a.parquet": parquet(["small", "smaller"]),
}


@pytest.fixture(scope="module")
def hub():
    with HubServer({"hf_ada": "ada", "hf_bob": "bob"}) as server:
        server.create("datasets/ada/tables").commit("data", FILES)
        lines = {"train-0.jsonl": jsonl(TEXTS[:60]), "train-1.jsonl": jsonl(TEXTS[60:])}
        server.create("datasets/ada/lines").commit("data", lines)
        gated = server.create("datasets/ada/gated", gated=True, readers={"bob"})
        gated.commit("data", {"train.parquet": parquet(TEXTS)})
        server.create("datasets/ada/private", private=True).commit("data", {"train.parquet": parquet(TEXTS)})
        yield server


@pytest.fixture(autouse=True)
def healed(hub):
    yield
    hub.heal()


@pytest.fixture(scope="module")
def preparer(hub, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    environment = hub.environment(home) | {
        "HF_DATASETS_OFFLINE": "0",
        "HF_DATASETS_CACHE": f"{home}/datasets",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_ETAG_TIMEOUT": "1",
    }
    with Preparer(tmp_path_factory.mktemp("printed"), environment) as preparer:
        yield preparer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A small tokenizer that loads at once."""
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "a.jsonl").write_bytes(jsonl(TEXTS))
    command = ["files", "--source", folder / "a.jsonl", "--output_dir", folder / "out", "--tokenizer", "bpe:300"]
    prepare_here(*command, "--val_fraction", 0.2)
    return folder / "out" / "tokenizer"


@pytest.fixture(scope="module")
def prepare(preparer, tokenizer):
    """Run prepare_data.py; returns the finished command."""

    def run(*args, before=(IMPATIENT,)):
        return preparer.run("--tokenizer", tokenizer, "--val_tokens", 400, *args, before=before)

    return run


@pytest.fixture(scope="module", params=["tables", "lines"])
def dataset(request):
    return f"ada/{request.param}"


@pytest.fixture(scope="module")
def undisturbed(hub, prepare, dataset, tmp_path_factory):
    """The output with a healthy server, and how often it requests each file."""
    directory = tmp_path_factory.mktemp("undisturbed")
    hub.requests.clear()
    command = prepare(dataset, "--output_dir", directory)
    assert command.status == 0, command.lines
    return contents(directory), downloads(hub)


def downloads(hub):
    """How often each data file was requested."""
    names = [request.rpartition("/")[2] for request in hub.requests if request.startswith("GET /datasets/")]
    return {name: names.count(name) for name in names if name.startswith("train-")}


def error_of(command):
    """The one line that a failed command ends with; the client's own warnings come before it."""
    errors = [line for line in command.lines if line.startswith("error: ")]
    assert command.status == 2 and len(errors) == 1 and command.lines[-1] == errors[0], command.lines
    assert not [line for line in command.lines if "Traceback" in line]
    return errors[0]


# ---- what is read ----


def test_a_dataset_is_prepared(hub, prepare, dataset, undisturbed, tmp_path):
    command = prepare(dataset, "--output_dir", tmp_path)
    assert command.status == 0, command.lines
    val, train = documents_of(tmp_path, "val"), documents_of(tmp_path, "train")
    assert val + train == TEXTS and len(val) > 5
    commit = hub.commits(f"datasets/{dataset}")[-1].sha
    corpus = {"hub_id": dataset, "config": None, "split": "train", "revision": commit, "text_column": "text"}
    assert manifest_of(tmp_path)["corpus"] == {"name": dataset} | corpus
    assert contents(tmp_path) == undisturbed[0]


def test_tables_are_cut_between_row_groups(prepare, tmp_path):
    """15 documents of about 80 bytes make a part of 1500 bytes."""
    prepare("ada/tables", "--output_dir", tmp_path, "--shard_tokens", 10**6)
    assert len(manifest_of(tmp_path)["splits"]["train"]["shards"]) > 4


@pytest.mark.parametrize(
    "options, texts", [(["--hub_config", "small"], ["small", "smaller"]), (["--split", "test"], ["a test", "another"])]
)
def test_a_configuration_and_a_split(prepare, tmp_path, options, texts):
    command = prepare("ada/tables", *options, "--output_dir", tmp_path, "--val_tokens", 1)
    assert command.status == 0, command.lines
    assert documents_of(tmp_path, "val") + documents_of(tmp_path, "train") == texts
    corpus = manifest_of(tmp_path)["corpus"]
    assert options[1] in (corpus["config"], corpus["split"])


def test_a_branch_is_pinned_to_its_commit(hub, prepare, tmp_path):
    repo = hub.repos["datasets/ada/tables"]
    branch = repo.commit("another branch", FILES | {"data/train-00000-of-00002.parquet": parquet(["new"] * 9)}, "next")
    command = prepare("ada/tables", "--revision", "next", "--output_dir", tmp_path)
    assert command.status == 0, command.lines
    assert manifest_of(tmp_path)["corpus"]["revision"] == branch.sha
    assert documents_of(tmp_path, "val")[:9] == ["new"] * 9
    assert documents_of(tmp_path, "val") + documents_of(tmp_path, "train") == ["new"] * 9 + TEXTS[60:]


def test_a_preparation_resumes_on_the_commit_that_it_began_with(hub, prepare, tmp_path):
    repo = hub.create("datasets/ada/moves")
    first = repo.commit("data", FILES)
    hub.fail("GET /datasets/.*train-00001", 500, times=1000, after=2)
    assert prepare("ada/moves", "--output_dir", tmp_path).status == 2
    assert list(tmp_path.glob("parts/part_*.json"))
    hub.heal()
    repo.commit("other data", {"data/train-00000-of-00001.parquet": parquet(["new"] * 99)})
    command = prepare("ada/moves", "--output_dir", tmp_path)
    assert command.status == 0, command.lines
    assert documents_of(tmp_path, "val") + documents_of(tmp_path, "train") == TEXTS
    assert manifest_of(tmp_path)["corpus"]["revision"] == first.sha
    repeated = prepare("ada/moves", "--output_dir", tmp_path)
    assert repeated.lines[-1].startswith("already prepared: ")


def test_worker_processes_read_the_hub(hub, prepare, undisturbed, dataset, tmp_path):
    """Worker processes recover from a dropped connection, too."""
    hub.fail("GET /datasets/.*train-(00001|1)", "cut", after=3 * OPENED[dataset])
    command = prepare(dataset, "--output_dir", tmp_path, "--num_workers", 2)
    assert command.status == 0, command.lines
    assert contents(tmp_path) == undisturbed[0]


# ---- what is unavailable ----


@pytest.mark.parametrize(
    "dataset, options, words",
    [
        ("ada/tables", ["--text_column", "content"], "no column 'content' but id, text; choose with --text_column"),
        ("ada/lines", ["--text_column", "content"], "no column 'content' but text; choose with --text_column"),
        ("ada/tables", ["--text_column", "id"], "column 'id' holds int64, not text; choose with --text_column"),
        ("ada/tables", ["--split", "dev"], "ada/tables has no split 'dev' but train, test; choose one with --split"),
        ("ada/tables", ["--hub_config", "large"], "'large' not found. Available: ['default', 'small']"),
        ("ada/tables", ["--revision", "v9"], "cannot read ada/tables: the Hub says 404: Invalid rev id: v9"),
        ("ada/nothing", [], "cannot read ada/nothing: the Hub says 401: "),
        ("ada/private", [], "cannot read ada/private: the Hub says 401: "),
        ("ada/gated", [], "cannot read ada/gated: Dataset 'ada/gated' is a gated dataset on the Hub."),
    ],
)
def test_anything_unavailable_is_one_line(prepare, tmp_path, dataset, options, words):
    line = error_of(prepare(dataset, *options, "--output_dir", tmp_path / "out"))
    assert words in line and len(line) < 600
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_gated_dataset_with_access(prepare, tmp_path):
    log_in = partial(faults.log_in, "hf_bob")
    command = prepare("ada/gated", "--output_dir", tmp_path, before=[log_in, IMPATIENT])
    assert command.status == 0, command.lines
    assert documents_of(tmp_path, "val") + documents_of(tmp_path, "train") == TEXTS


# ---- faults ----


@pytest.mark.parametrize(
    "status, times",
    [(503, 2), (None, 2), ("cut", 2), ("stall", 1), (503, CLIENT_TRIES + 1), ("cut", CLIENT_TRIES + 1)],
)
def test_a_temporary_fault(hub, prepare, dataset, undisturbed, tmp_path, status, times):
    """The client retries a few failures by itself; more of them cost one part, not the run."""
    expected, counts = undisturbed
    hub.requests.clear()
    hub.fail("GET /datasets/.*/train-(00001|1)", status, times, after=OPENED[dataset])
    command = prepare(dataset, "--output_dir", tmp_path)
    assert command.status == 0, command.lines
    assert contents(tmp_path) == expected
    more = {name: count - counts[name] for name, count in downloads(hub).items()}
    first, second = sorted(more)
    assert more[first] == 0 and times <= more[second] <= times + 3


@pytest.mark.parametrize("status", [503, None, 404])
def test_a_permanent_fault(hub, prepare, dataset, undisturbed, tmp_path, status):
    """One line after the last attempt; finished parts stay, and the same command resumes when the server is back."""
    expected, counts = undisturbed
    hub.fail("GET /datasets/.*/train-(00001|1)", status, 10**6, after=OPENED[dataset])
    line = error_of(prepare(dataset, "--output_dir", tmp_path))
    assert "cannot read hf://datasets/ada/" in line
    assert line.endswith("tried 3 times. Finished parts are kept: repeat the command")
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("part_*.json")}
    assert finished and not (tmp_path / "manifest.json").exists()

    hub.heal()
    hub.requests.clear()
    command = prepare(dataset, "--output_dir", tmp_path)
    assert command.status == 0, command.lines
    assert contents(tmp_path) == expected
    first, second = sorted(counts)
    again = downloads(hub)
    assert again.get(first, 0) < counts[first]
    assert counts[second] <= again[second] <= counts[first]  # the first table of a process may take one more


def test_a_hub_that_is_gone_when_the_command_is_repeated(hub, prepare, tmp_path):
    hub.fail("GET /datasets/.*/train-00001", 404, 10**6, after=1)
    error_of(prepare("ada/tables", "--output_dir", tmp_path))
    before = contents(tmp_path)
    hub.fail(".*", None, 10**6)
    assert error_of(prepare("ada/tables", "--output_dir", tmp_path)).startswith("error: cannot read ada/tables: ")
    assert contents(tmp_path) == before
