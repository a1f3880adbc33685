"""The Hub, through its real client against the server in hub_server.py: pushes, loading elsewhere, revisions, refusals.
The client's side is in hub_client.py, that of a user without the checkout in stranger.py."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hub_server import HubServer
from pytest import approx
from support import PATIENCE, ROOT, contents, prepare
from tiny_models import tiny_model
from transformers import AutoTokenizer

from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.hub.model_card import model_card
from gpt2repro.models.folder import save_model_folder
from modeling_gpt2repro import GPT2ReproForCausalLM


pytestmark = pytest.mark.slow  # its clients are processes
ADA, BOB = "token_of_ada", "token_of_bob"
TEXT = "A cat sat on a mat and had a nap. " * 300
RECIPE = """
corpus: files
max_steps: 2
sequence_length: 16
global_batch_tokens: 64
micro_batch_size: 4
warmup_steps: 0
sample_prompts: ["A cat"]
sample_tokens: 4
num_workers: 0
model: {n_positions: 16, n_layer: 1, n_head: 1, n_embd: 8}
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer({ADA: "ada", BOB: "bob"}) as server:
        yield server


@pytest.fixture(scope="module")
def python(hub, tmp_path_factory):
    """Run an interpreter as a client of the hub, with empty caches; returns the finished process."""

    def run(*arguments, token="", cwd=ROOT, check=True):
        environment = os.environ | hub.environment(tmp_path_factory.mktemp("home"), token)
        environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def client(python):
    """Call a function of hub_client.py."""
    return lambda *call, **options: python(ROOT / "tests" / "hub_client.py", *call, **options)


@pytest.fixture(scope="module")
def stranger(python, tmp_path_factory):
    """Call a function of stranger.py in a folder of its own; returns what it saves in its last argument."""

    def call(*arguments, **options):
        folder = tmp_path_factory.mktemp("elsewhere")
        python(ROOT / "tests" / "stranger.py", *arguments, "result.pt", cwd=folder, **options)
        return torch.load(folder / "result.pt")

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model folder, as a finished run leaves one."""
    folder = tmp_path_factory.mktemp("model") / "model"
    tokenizer = build_tokenizer("char", [TEXT]).fast
    model = tiny_model(unpadded_vocab_size=len(tokenizer))
    save_model_folder(folder, model, tokenizer, model_card(model, "tiny", "ada/tiny"))
    return folder


@pytest.fixture(scope="module")
def pushed(hub, folder, client, tmp_path_factory):
    """ada/tiny, pushed by push_to_hub; then a tag and a branch; then pushed again with other weights and other code.

    Returns: the shas of the two versions, and the logits of both in the process that pushed them.
    """
    saved = tmp_path_factory.mktemp("logits") / "logits.pt"
    client("push_versions", folder, "ada/tiny", saved, token=ADA)
    files = hub.files("ada/tiny")
    files["modeling_gpt2repro.py"] += b"\nVERSION = 2\n"
    second = hub.repos["ada/tiny"].commit("Other code", files)
    return {"first": hub.repos["ada/tiny"].tags["v1"].sha, "second": second.sha, "logits": torch.load(saved)}


# ---- the server itself ----


def test_the_client_understands_the_server(hub, client, tmp_path):
    """Calls that the other tests do not make; a new huggingface_hub that asks otherwise fails here first."""
    (tmp_path / "weights.bin").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a")
    hub.fail("GET /ada/files/resolve/main/weights.bin", None)  # the client tries again
    client("make_every_call", token=ADA, cwd=tmp_path)
    assert hub.requests.count("GET /ada/files/resolve/main/weights.bin") == 3
    assert hub.files("ada/files", "v1")["weights.bin"] == (tmp_path / "weights.bin").read_bytes()


# ---- push_to_hub and from_pretrained ----


def test_push_to_hub_uploads_what_the_model_folder_holds(pushed, hub, folder):
    titles = [commit.title for commit in hub.commits("ada/tiny")]
    assert titles == [
        "initial commit",
        "Upload GPT2ReproForCausalLM",
        "Upload tokenizer",
        "Other weights",
        "Other code",
    ]
    remote, local = hub.files("ada/tiny", "v1"), contents(folder)
    assert remote.keys() - {".gitattributes"} == local.keys()
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        assert remote[name] == local[name]
    assert remote["modeling_gpt2repro.py"] == (ROOT / "modeling_gpt2repro.py").read_bytes()
    assert "GPT2ReproForCausalLM" in remote["config.json"].decode()


def test_a_stranger_loads_it_by_its_name(pushed, stranger):
    """With the logits of the process that pushed it, bit for bit; through every Auto class that the config names."""
    logits, by_hand, text = stranger("load_by_name", "ada/tiny")
    assert torch.equal(logits, pushed["logits"][1])
    torch.testing.assert_close(logits[..., : by_hand.shape[-1]], by_hand)
    assert text.startswith("A cat ") and len(text) == len("A cat ") + 5


def test_revisions_pin_weights_and_code(pushed, stranger):
    """A sha, a tag and a branch lead to the first version; code_revision selects the code apart from the weights."""
    result = stranger("load_revisions", "ada/tiny", pushed["first"], pushed["second"])
    versions = {}
    for name, (logits, code) in result.items():
        weights = [torch.equal(logits, version) for version in pushed["logits"]].index(True) + 1
        versions[name] = (weights, code)
    assert versions == {
        "main": (2, 2),
        "sha": (1, 1),
        "tag": (1, 1),
        "branch": (1, 1),
        "old weights, new code": (1, 2),
        "new weights, old code": (2, 1),
    }


def test_two_processes_load_the_code_at_once(pushed, client, tmp_path):
    """Pairs of processes that begin together, each pair with an empty cache of code. transformers alone copies the code
    to where the other process may be importing it."""
    client("load_in_pairs", "ada/tiny", tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == [[0, 0, 2, 2]] * 5


# ---- what a user is told ----


@pytest.fixture(scope="module")
def attempt(client, tmp_path_factory):
    """Run a script once for each list of a token and flags, all in one process; returns exit codes and stderr."""

    def run(script, attempts, cwd=ROOT):
        result = tmp_path_factory.mktemp("attempts") / "result.json"
        client("attempt", script, json.dumps([list(map(str, words)) for words in attempts]), result, cwd=cwd)
        return json.loads(result.read_text())

    return run


def error_line(code, stderr):
    """The one line that the user gets."""
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in stderr, stderr
    return lines[0]


REFUSED_MODELS = {  # whose token, which model, what the line must say
    "private, no token": ("", "ada/private", "hf auth login"),
    "private, another's token": (BOB, "ada/private", "hf auth login"),
    "gated, no token": ("", "ada/gated", "hf auth login"),
    "gated, not granted": (BOB, "ada/gated", "ask for access"),
    "missing": (ADA, "ada/missing", "hf auth login"),
    "expired token": ("expired", "ada/public", "hf auth login"),
    "no weights": (ADA, "ada/weightless", "model.safetensors"),
    "empty": (ADA, "ada/empty", "config.json"),
}


@pytest.fixture(scope="module")
def models(hub, folder):
    """Copies of the model folder that may be read, that may not be, and that are incomplete."""
    files = contents(folder)
    hub.create("ada/empty")
    hub.create("ada/public").commit("Upload model", files)
    hub.create("ada/private", private=True).commit("Upload model", files)
    hub.create("ada/gated", gated=True).commit("Upload model", files)
    hub.create("ada/granted", gated=True, readers={"bob"}).commit("Upload model", files)
    hub.create("ada/weightless").commit("Upload", {n: c for n, c in files.items() if n != "model.safetensors"})


@pytest.fixture(scope="module")
def opened(models, attempt):
    """Outcomes of sample.py; the permitted ones come last, because they leave the files in the cache."""
    flags = ("--num_samples", 1, "--max_new_tokens", 2, "--prompt", "A cat", "--trust_remote_code")
    cases = REFUSED_MODELS | {"owner": (ADA, "ada/private"), "granted": (BOB, "ada/granted")}
    outcomes = attempt("sample", [(token, name, *flags) for token, name, *_ in cases.values()])
    return dict(zip(cases, outcomes))


@pytest.mark.parametrize("case", REFUSED_MODELS)
def test_a_model_that_cannot_be_opened_is_one_line_with_a_remedy(opened, case):
    _, name, expected = REFUSED_MODELS[case]
    nowhere = "" if case == "no weights" else "no such file or folder, and no model can be loaded from the Hub"
    line = error_line(*opened[case])
    assert line.startswith(f"error: {name}: {nowhere}") and expected in line


@pytest.mark.parametrize("case", ["owner", "granted"])
def test_private_and_gated_models_open_with_the_right_token(opened, case):
    code, stderr = opened[case]
    assert code == 0, stderr


# ---- train_accelerate.py --push_to_hub ----


@pytest.fixture(scope="module")
def run_flags(tmp_path_factory):
    """Recipe and data of a run of two steps."""
    root = tmp_path_factory.mktemp("run")
    (root / "text.txt").write_text(TEXT)
    (root / "recipe.yaml").write_text(RECIPE)
    data = root / "data"
    prepare("files", "--source", root / "text.txt", "--tokenizer", "char", "--output_dir", data)
    return "--config", root / "recipe.yaml", "--data_dir", data, "--push_to_hub"


def test_a_run_is_pushed_in_one_commit_even_after_the_hub_failed(hub, python, run_flags, tmp_path):
    run = tmp_path / "run"
    command = ("train_accelerate.py", *run_flags, "--output_dir", run, "--hub_model_id", "ada/run")
    hub.fail("POST /api/models/ada/run/commit", 500)
    done = python(*command, token=ADA, check=False)
    line = error_line(done.returncode, done.stderr)
    assert "500" in line and f"{run / 'model'} is complete" in line and "repeat the command" in line
    assert f"hf upload ada/run {run / 'model'}" in line
    assert [commit.title for commit in hub.commits("ada/run")] == ["initial commit"]
    metrics = (run / "metrics.jsonl").read_bytes()

    done = python(*command, token=ADA)
    assert [commit.title for commit in hub.commits("ada/run")] == ["initial commit", "Upload model"]
    files = hub.files("ada/run")
    del files[".gitattributes"]
    assert files == contents(run / "model") and 'from_pretrained("ada/run"' in files["README.md"].decode()
    assert f"pushed to {hub.url}/ada/run" in done.stdout
    assert (run / "metrics.jsonl").read_bytes() == metrics  # nothing was trained again


REFUSED_REPOS = {  # whose token, which repository, what the line must say
    "no token": ("", "ada/mine", "hf auth login"),
    "expired token": ("expired", "ada/mine", "hf auth login"),
    "another's name": (BOB, "ada/mine", "ada/mine"),
    "another's repository": (BOB, "ada/theirs", "ada/theirs"),
    "no owner": (ADA, "mine", "owner/name"),
}


@pytest.fixture(scope="module")
def unpushed(hub, attempt, run_flags, tmp_path_factory):
    """Outcome and output directory of runs whose model could not be pushed at the end."""
    hub.create("ada/theirs")
    root = tmp_path_factory.mktemp("unpushed")
    runs = {case: root / str(number) for number, case in enumerate(REFUSED_REPOS)}
    attempts = [
        (token, *run_flags, "--hub_model_id", name, "--output_dir", runs[case])
        for case, (token, name, _) in REFUSED_REPOS.items()
    ]
    outcomes = attempt("train_accelerate", attempts)
    return {case: (outcome, runs[case]) for case, outcome in zip(REFUSED_REPOS, outcomes)}


@pytest.mark.parametrize("case", REFUSED_REPOS)
def test_a_run_that_may_not_push_is_refused_before_training(unpushed, case):
    outcome, run = unpushed[case]
    assert REFUSED_REPOS[case][2] in error_line(*outcome)
    assert not run.exists()


# ---- publish.py ----


def test_publish_makes_one_commit_on_a_branch_of_a_private_repository(hub, folder, python, stranger, tmp_path):
    """When the Hub fails, the folder is there to be uploaded by hand."""
    flags = ("--to", "ada/plain", "--format", "gpt2", "--private", "--revision", "v2")
    command = (ROOT / "publish.py", folder, *flags)
    hub.fail("POST /api/models/ada/plain/commit", 500)
    done = python(*command, token=ADA, check=False, cwd=tmp_path)
    line = error_line(done.returncode, done.stderr)
    (kept,) = (tmp_path / "publish").iterdir()
    place = f"publish/{kept.name}"
    assert f"{place} is complete" in line and f"hf upload ada/plain {place} --revision v2" in line
    left = contents(kept)

    done = python(*command, token=ADA, cwd=tmp_path)
    assert "pushed to" in done.stdout and [*(tmp_path / "publish").iterdir()] == [kept] and contents(kept) == left
    assert hub.repos["ada/plain"].private
    assert [commit.title for commit in hub.commits("ada/plain", "v2")] == ["initial commit", "Upload model"]
    files = hub.files("ada/plain", "v2")
    del files[".gitattributes"]
    assert files == left and "modeling_gpt2repro.py" not in files

    name, tokens, logits = stranger("load_plain", "ada/plain", "v2", token=ADA)
    ours = GPT2ReproForCausalLM.from_pretrained(folder)
    assert name == "GPT2LMHeadModel" and len(tokens) == 5
    torch.testing.assert_close(logits, ours(torch.arange(8)[None]).logits[..., : ours.config.unpadded_vocab_size])


def test_publish_leaves_what_its_user_has_on_the_hub(hub, folder, attempt, tmp_path):
    """Only weights of an older model go, which some libraries would read instead of the new ones."""
    theirs = {"README.md": b"mine", "train.py": b"mine", "adapter.safetensors": b"mine", "model_card.bin": b"mine"}
    older = ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "pytorch_model.bin"]
    hub.create("ada/hers").commit("Upload", theirs | dict.fromkeys(older, b"{}"))
    (mine := tmp_path / "publish" / "ada--hers").mkdir(parents=True)
    (mine / "notes").write_text("mine")
    command = (ADA, folder, "--to", "ada/hers")
    ((code, stderr),) = attempt("publish", [command], cwd=tmp_path)
    assert code == 0 and "ada/hers keeps its README.md; publish.py --overwrite_readme" in stderr
    files = hub.files("ada/hers")
    assert files.items() >= theirs.items() and not files.keys() & set(older)
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert contents(tmp_path / "publish") == {"ada--hers/notes": b"mine"}

    attempt("publish", [(*command, "--overwrite_readme")], cwd=tmp_path)
    assert b"gpt2repro" in hub.files("ada/hers")["README.md"]


def test_a_gguf_file_joins_the_weights_that_are_there(hub, attempt, tmp_path):
    theirs = {"README.md": b"mine", "model.safetensors.index.json": b"{}", "model-00001-of-00002.safetensors": b"mine"}
    hub.create("ada/both").commit("Upload", theirs)
    tokenizer = build_tokenizer("bpe:257", [TEXT]).fast
    model = tiny_model(vocab_size=320, unpadded_vocab_size=257)
    save_model_folder(tmp_path / "model", model, tokenizer, model_card(model, "tiny"))
    attempt("publish", [(ADA, tmp_path / "model", "--to", "ada/both", "--format", "gguf")], cwd=tmp_path)
    files = hub.files("ada/both")
    assert files.items() >= theirs.items() and files["both-F16.gguf"].startswith(b"GGUF")


def test_publish_refuses_at_once_what_it_may_not_or_cannot_do(hub, folder, attempt, tmp_path):
    """Writing to another's repository; keeping a model private in a public one."""
    hub.create("ada/not-bobs")
    hub.create("ada/seen-by-all")
    attempts = [
        (BOB, folder, "--to", "ada/not-bobs"),
        (ADA, folder, "--to", "ada/seen-by-all", "--private"),
    ]
    forbidden, public = attempt("publish", attempts, cwd=tmp_path)
    assert "ada/not-bobs" in error_line(*forbidden) and not (tmp_path / "publish").exists()
    assert "public" in error_line(*public)
    assert [commit.title for commit in hub.commits("ada/seen-by-all")] == ["initial commit"]


def test_publish_writes_demos(hub, folder, attempt, stranger, tmp_path):
    """With the model in one command; of a branch; of a model that is on the Hub already. Never over another's app.

    The Space runs the code that lies in it, no other.
    """
    hub.create("spaces/ada/notes").commit("Upload", {"index.html": b"mine"})
    hub.fail("POST /api/spaces/ada/tried/commit", 500)
    both = (ADA, folder, "--to", "ada/tried", "--space", "ada/tried", "--private")
    attempts = [
        both,
        both,
        both,
        (ADA, "ada/tried", "--space", "./of-tried"),
        (ADA, folder, "--to", "ada/branched", "--revision", "v2", "--space", "ada/of-branch"),
        (BOB, folder, "--to", "bob/branched", "--space", "ada/of-bob"),
        (ADA, "ada/tried", "--space", "ada/notes"),
        (ADA, "ada/missing-model", "--space", "ada/unmade"),
        (ADA, folder, "--space", "ada/unmade"),
    ]
    failed, done, again, *others, forbidden, taken, missing, local = attempt("publish", attempts, cwd=tmp_path)
    (kept,) = (tmp_path / "publish").iterdir()
    assert f"hf upload ada/tried publish/{kept.name} --repo-type space" in error_line(*failed)
    assert [code for code, _ in (done, *others)] == [0, 0, 0], others
    assert "give ada/tried a token that may read it" in done[1] and hub.repos["spaces/ada/tried"].private
    files = hub.files("spaces/ada/tried")
    app = {"app.py", "language_model.py", "modeling_gpt2repro.py", "settings.json", "requirements.txt", "README.md"}
    assert files.keys() - {".gitattributes"} == app == contents(kept).keys() == contents(tmp_path / "of-tried").keys()
    assert b"\nmodels:\n- ada/tried\n" in files["README.md"]
    assert [commit.title for commit in hub.commits("spaces/ada/tried")] == ["initial commit", "Upload the demo"]
    assert json.loads(hub.files("spaces/ada/of-branch")["settings.json"])["revision"] == "v2"

    assert "the Space ada/tried exists already" in error_line(*again)
    assert "cannot push to the Space ada/of-bob" in error_line(*forbidden)
    assert "the Space ada/notes exists already" in error_line(*taken)
    assert hub.files("spaces/ada/notes") == {"index.html": b"mine"}
    assert "ada/missing-model" in error_line(*missing) and "add --to owner/name" in error_line(*local)
    assert "spaces/ada/unmade" not in hub.repos

    likeliest = stranger("open_space", tmp_path / "of-tried", token=ADA)
    ids = AutoTokenizer.from_pretrained(folder)("A cat ", return_tensors="pt").input_ids
    logits = GPT2ReproForCausalLM.from_pretrained(folder)(ids).logits[0, -1]
    assert [probability for _, probability in likeliest] == approx(logits.softmax(0).topk(4).values.tolist())


def test_from_gpt2_reads_a_revision_of_a_hub_repository(hub, client):
    client("convert_revisions", "ada/gpt2", token=ADA)
    assert any("model-00002" in name for name in hub.files("ada/gpt2-shards"))
