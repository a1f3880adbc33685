"""The Hub, by its real client against the server in hub_server.py: push, load elsewhere, revisions, refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer

import prepare_data
from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.hub.model_card import model_card
from gpt2repro.models.folder import save_model_folder
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM


pytestmark = pytest.mark.slow  # its clients are processes
ROOT = Path(__file__).resolve().parents[2]
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
        environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        environment.pop("PYTHONPATH", None)
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


STRANGER = f"""
import sys
sys.path = [entry for entry in sys.path if entry not in ("", {str(ROOT)!r})]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

def logits(model):
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits
"""


@pytest.fixture(scope="module")
def stranger(python, tmp_path_factory):
    """Run code elsewhere, in an interpreter that cannot see the checkout; returns what it assigns to `result`."""

    def run(code):
        folder = tmp_path_factory.mktemp("elsewhere")
        end = "\nassert 'modeling_gpt2repro' not in sys.modules\ntorch.save(result, 'result.pt')"
        python("-c", STRANGER + code + end, cwd=folder)
        return torch.load(folder / "result.pt")

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model folder, as a finished run leaves one."""
    folder = tmp_path_factory.mktemp("model") / "model"
    tokenizer = build_tokenizer("char", [TEXT]).fast
    sizes = dict(vocab_size=64, unpadded_vocab_size=len(tokenizer), n_positions=32, n_embd=32, n_layer=2, n_head=2)
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**sizes, bos_token_id=None, eos_token_id=None))
    save_model_folder(folder, model, tokenizer, model_card(model, "tiny", "ada/tiny"))
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pushed(hub, folder, python, tmp_path_factory):
    """ada/tiny, pushed by push_to_hub; then a tag and a branch; then pushed again with other weights and other code.

    Returns: the shas of the two versions, and the logits that the pushing process had for them.
    """
    code = """
import sys
import torch
from huggingface_hub import HfApi
from transformers import AutoTokenizer
from modeling_gpt2repro import GPT2ReproForCausalLM

def logits(model):
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits

model = GPT2ReproForCausalLM.from_pretrained(sys.argv[1])
model.push_to_hub("ada/tiny")
AutoTokenizer.from_pretrained(sys.argv[1]).push_to_hub("ada/tiny")
first = logits(model)
HfApi().create_tag("ada/tiny", tag="v1")
HfApi().create_branch("ada/tiny", branch="release/1")
with torch.no_grad():
    model.transformer.wte.weight.mul_(2)
model.push_to_hub("ada/tiny", commit_message="Other weights")
torch.save([first, logits(model)], sys.argv[2])
"""
    saved = tmp_path_factory.mktemp("logits") / "logits.pt"
    python("-c", code, folder, saved, token=ADA)
    files = hub.files("ada/tiny")
    files["modeling_gpt2repro.py"] += b"\nVERSION = 2\n"
    second = hub.repos["ada/tiny"].commit("Other code", files)
    return {"first": hub.repos["ada/tiny"].tags["v1"].sha, "second": second.sha, "logits": torch.load(saved)}


# ---- the server itself ----


def test_the_client_understands_the_server(hub, python, tmp_path):
    """What the other tests do not ask of it; a new huggingface_hub that asks otherwise fails here first."""
    (tmp_path / "weights.bin").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a")
    code = r"""
from huggingface_hub import HfApi, get_session, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError

def refused(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except HfHubHTTPError as error:
        return type(error).__name__, error.response.status_code

api, repo = HfApi(), "ada/files"
assert api.whoami()["name"] == "ada"
assert api.create_repo("files").repo_id == api.create_repo(repo, exist_ok=True).repo_id == repo
assert refused(api.create_repo, repo) == ("HfHubHTTPError", 409)
first = api.upload_folder(repo_id=repo, folder_path=".", commit_message="First")
assert api.upload_folder(repo_id=repo, folder_path=".", commit_message="The same").oid == first.oid
api.create_tag(repo, tag="v1")
api.delete_file("notes/a.txt", repo, commit_message="Delete")
assert [commit.title for commit in api.list_repo_commits(repo)] == ["Delete", "First", "initial commit"]
assert api.model_info(repo, revision="v1").sha == first.oid == api.list_repo_refs(repo).tags[0].target_commit
assert [entry.path for entry in api.list_repo_tree(repo, revision="v1")] == [".gitattributes", "notes", "weights.bin"]
assert "notes/a.txt" in api.list_repo_files(repo, revision="v1") and "notes/a.txt" not in api.list_repo_files(repo)
(info,) = api.get_paths_info(repo, ["weights.bin", "none"])
assert info.size == info.lfs.size == 10240
assert api.file_exists(repo, "weights.bin") and not api.file_exists(repo, "none")
assert refused(hf_hub_download, repo, "none") == ("RemoteEntryNotFoundError", 404)
assert refused(hf_hub_download, repo, "weights.bin", revision="none") == ("RevisionNotFoundError", 404)
assert open(hf_hub_download(repo, "weights.bin"), "rb").read() == open("weights.bin", "rb").read()
part = get_session().get(hf_hub_url(repo, "weights.bin"), headers={"Range": "bytes=254-257"})
assert (part.status_code, part.content) == (206, b"\xfe\xff\x00\x01")
late = dict(path_or_fileobj=b"", path_in_repo="b.txt", repo_id=repo, parent_commit=first.oid)
assert refused(api.upload_file, **late) == ("HfHubHTTPError", 412)
try:
    api.upload_file(path_or_fileobj=b"---\nno metadata\n---\n", path_in_repo="README.md", repo_id=repo)
except ValueError as error:
    assert "Invalid metadata" in str(error)
else:
    raise AssertionError("a model card without metadata was taken")
"""
    hub.fail("GET /ada/files/resolve/main/weights.bin", None)  # the client tries again
    python("-c", code, token=ADA, cwd=tmp_path)
    assert hub.requests.count("GET /ada/files/resolve/main/weights.bin") == 3
    assert hub.files("ada/files", "v1")["weights.bin"] == (tmp_path / "weights.bin").read_bytes()


# ---- push_to_hub and from_pretrained ----


def test_push_to_hub_uploads_what_the_model_folder_has(pushed, hub, folder):
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
    """The logits are those of the process that pushed, bit for bit; of all Auto classes that the config names."""
    result = stranger("""
name = "ada/tiny"
config = AutoConfig.from_pretrained(name, trust_remote_code=True)
trunk = AutoModel.from_pretrained(name, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(name)
assert all("transformers_modules.ada.tiny" in type(thing).__module__ for thing in (config, trunk, model))
ids = tokenizer("A cat ", return_tensors="pt").input_ids
text = tokenizer.decode(model.generate(ids, max_new_tokens=5, do_sample=False)[0])
with torch.no_grad():
    by_hand = trunk(torch.arange(8)[None]).last_hidden_state @ trunk.wte.weight[: config.unpadded_vocab_size].T
result = [logits(model), by_hand, text]
""")
    logits, by_hand, text = result
    assert torch.equal(logits, pushed["logits"][1])
    torch.testing.assert_close(logits[..., : by_hand.shape[-1]], by_hand)
    assert text.startswith("A cat ") and len(text) == len("A cat ") + 5


def test_revisions_pin_weights_and_code(pushed, stranger):
    """A sha, a tag and a branch lead to the first version; code_revision chooses the code apart from the weights."""
    result = stranger(f"""
first, second = {pushed["first"]!r}, {pushed["second"]!r}
revisions = {{
    "main": {{}},
    "sha": {{"revision": first}},
    "tag": {{"revision": "v1"}},
    "branch": {{"revision": "release/1"}},
    "old weights, new code": {{"revision": first, "code_revision": second}},
    "new weights, old code": {{"code_revision": "v1"}},
}}
result = {{}}
for name, revision in revisions.items():
    model = AutoModelForCausalLM.from_pretrained("ada/tiny", trust_remote_code=True, **revision)
    code = sys.modules[type(model).__module__]
    result[name] = [logits(model), getattr(code, "VERSION", 1)]
""")
    versions = {
        name: ([torch.equal(logits, of_version) for of_version in pushed["logits"]].index(True) + 1, code)
        for name, (logits, code) in result.items()
    }
    assert versions == {
        "main": (2, 2),
        "sha": (1, 1),
        "tag": (1, 1),
        "branch": (1, 1),
        "old weights, new code": (1, 2),
        "new weights, old code": (2, 1),
    }


AT_ONCE = """
import json, multiprocessing, sys
from transformers import GPT2Config, GPT2LMHeadModel, dynamic_module_utils
from gpt2repro.models import folder

folder.register_auto_classes = lambda: None  # so that the repository's copy of the code is run, not ours
GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8))  # imports once what each process would import
processes = multiprocessing.get_context("fork")

def load(number, barrier, versions):
    dynamic_module_utils.HF_MODULES_CACHE = f"{sys.argv[1]}/modules{number}"
    barrier.wait()
    model, _ = folder.open_model("ada/tiny", trust_remote_code=True)
    code = sys.modules[type(model).__module__]
    assert f"/modules{number}/" in code.__file__
    versions.put(code.VERSION)

result = []
for number in range(5):
    barrier, versions = processes.Barrier(2), processes.Queue()
    pair = [processes.Process(target=load, args=(number, barrier, versions)) for _ in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(60)
    result.append([process.exitcode for process in pair] + [versions.get(timeout=1) for _ in pair])
json.dump(result, open(sys.argv[1] + "/result.json", "w"))
"""


def test_two_processes_load_the_code_at_once(pushed, python, tmp_path):
    """Pairs of processes that begin together, each pair with an empty cache of code. transformers alone copies the code
    to where the other process may just be importing it."""
    python("-c", AT_ONCE, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == [[0, 0, 2, 2]] * 5


# ---- what a user is told ----

ATTEMPTS = """
import contextlib
import importlib
import io
import json
import os
import sys
from gpt2repro.errors import run_script

_, script, attempts, results = sys.argv
script = importlib.import_module(script)
outcomes = []
for token, *argv in json.loads(attempts):
    os.environ["HF_TOKEN"] = token
    sys.argv = [script.__name__, *argv]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            run_script(script.main)
            code = 0
        except SystemExit as end:
            code = end.code
    outcomes.append([code, said.getvalue()])
with open(results, "w") as file:
    json.dump(outcomes, file)
"""


@pytest.fixture(scope="module")
def attempt(python, tmp_path_factory):
    """Run a script once for each list of a token and flags; one process, so that they are cheap."""

    def run(script, attempts):
        results = tmp_path_factory.mktemp("attempts") / "results.json"
        python("-c", ATTEMPTS, script, json.dumps([list(map(str, words)) for words in attempts]), results)
        return json.loads(results.read_text())

    return run


def error_line(code, stderr):
    """The only line that a user is told."""
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in stderr, stderr
    return lines[0]


REFUSED_MODELS = {  # whose token, which model, what the line must say
    "private, no token": ("", "ada/private", "hf auth login"),
    "private, another's token": (BOB, "ada/private", "hf auth login"),
    "gated, no token": ("", "ada/gated", "hf auth login"),
    "gated, not granted": (BOB, "ada/gated", "ask for access"),
    "missing": (ADA, "ada/missing", "hf auth login"),
    "token that is no more": ("expired", "ada/public", "hf auth login"),
    "no weights": (ADA, "ada/weightless", "model.safetensors"),
    "nothing in it": (ADA, "ada/empty", "config.json"),
}


@pytest.fixture(scope="module")
def models(hub, folder):
    """Copies of the model folder that may be read, that may not, and that are not whole."""
    files = contents(folder)
    hub.create("ada/empty")
    hub.create("ada/public").commit("Upload model", files)
    hub.create("ada/private", private=True).commit("Upload model", files)
    hub.create("ada/gated", gated=True).commit("Upload model", files)
    hub.create("ada/granted", gated=True, readers={"bob"}).commit("Upload model", files)
    hub.create("ada/weightless").commit("Upload", {n: c for n, c in files.items() if n != "model.safetensors"})


@pytest.fixture(scope="module")
def opened(models, attempt):
    """Outcomes of sample.py; those that may read come last, since they leave the files in the cache."""
    flags = ("--num_samples", 1, "--max_new_tokens", 2, "--prompt", "A cat", "--trust_remote_code")
    cases = REFUSED_MODELS | {"owner": (ADA, "ada/private"), "granted": (BOB, "ada/granted")}
    outcomes = attempt("sample", [(token, name, *flags) for token, name, *_ in cases.values()])
    return dict(zip(cases, outcomes))


@pytest.mark.parametrize("case", REFUSED_MODELS)
def test_a_model_that_cannot_be_opened_costs_one_line_with_a_remedy(opened, case):
    _, name, expected = REFUSED_MODELS[case]
    line = error_line(*opened[case])
    assert line.startswith(f"error: {name}: ") and expected in line


def test_sample_script_ends_with_exit_code_2(models, python):
    done = python("sample.py", "ada/private", check=False)
    assert "ada/private" in error_line(done.returncode, done.stderr) and not done.stdout


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
    prepare_data.main(["files", "--source", str(root / "text.txt"), "--tokenizer", "char", "--output_dir", str(data)])
    return "--config", root / "recipe.yaml", "--data_dir", data, "--push_to_hub"


def test_a_run_is_pushed_in_one_commit_also_after_the_hub_failed(hub, python, run_flags, tmp_path):
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
    "token that is no more": ("expired", "ada/mine", "hf auth login"),
    "another's name": (BOB, "ada/mine", "ada/mine"),
    "another's repository": (BOB, "ada/theirs", "ada/theirs"),
    "no owner": (ADA, "mine", "owner/name"),
}


@pytest.fixture(scope="module")
def unpushed(hub, attempt, run_flags, tmp_path_factory):
    """Outcome and output directory of runs whose model could not be pushed at their end."""
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


def test_publish_makes_one_commit_on_a_branch_of_a_private_repository(hub, folder, python, tmp_path):
    """And after the Hub has failed, the folder is there to be uploaded."""
    flags = ("--to", "ada/plain", "--format", "gpt2", "--private", "--revision", "v2")
    command = (ROOT / "publish.py", folder, *flags)
    hub.fail("POST /api/models/ada/plain/commit", 500)
    done = python(*command, token=ADA, check=False, cwd=tmp_path)
    line = error_line(done.returncode, done.stderr)
    assert "publish/ada--plain is complete" in line and "hf upload ada/plain publish/ada--plain --revision v2" in line
    left = contents(tmp_path / "publish" / "ada--plain")

    done = python(*command, token=ADA, cwd=tmp_path)
    assert "pushed to" in done.stdout and not any((tmp_path / "publish").iterdir())
    assert hub.repos["ada/plain"].private
    assert [commit.title for commit in hub.commits("ada/plain", "v2")] == ["initial commit", "Upload model"]
    files = hub.files("ada/plain", "v2")
    del files[".gitattributes"]
    assert files == left and "modeling_gpt2repro.py" not in files

    code = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("ada/plain", revision="v2")
tokens = AutoTokenizer.from_pretrained("ada/plain", revision="v2")("A cat").input_ids
torch.save((type(model).__name__, tokens, model(torch.arange(8)[None]).logits.detach()), "result.pt")
"""
    python("-I", "-c", code, token=ADA, cwd=tmp_path)
    name, tokens, logits = torch.load(tmp_path / "result.pt")
    ours = GPT2ReproForCausalLM.from_pretrained(folder)
    assert name == "GPT2LMHeadModel" and len(tokens) == 5
    torch.testing.assert_close(logits, ours(torch.arange(8)[None]).logits[..., : ours.config.unpadded_vocab_size])


def test_publish_notices_at_once_that_it_may_not_write(hub, folder, python, tmp_path):
    hub.create("ada/not-bobs")
    done = python(ROOT / "publish.py", folder, "--to", "ada/not-bobs", token=BOB, check=False, cwd=tmp_path)
    assert "ada/not-bobs" in error_line(done.returncode, done.stderr) and not (tmp_path / "publish").exists()


def test_private_is_not_promised_of_a_public_repository(hub, folder, python, tmp_path):
    hub.create("ada/seen-by-all")
    command = (ROOT / "publish.py", folder, "--to", "ada/seen-by-all", "--private")
    done = python(*command, token=ADA, check=False, cwd=tmp_path)
    assert "public" in error_line(done.returncode, done.stderr)
    assert [commit.title for commit in hub.commits("ada/seen-by-all")] == ["initial commit"]


def test_from_gpt2_reads_a_revision_of_a_hub_repository(hub, python, tmp_path):
    """The first weights by their tag, the second by the branch; and a repository with shards."""
    code = """
import sys, torch
from transformers import GPT2Config, GPT2LMHeadModel
from huggingface_hub import HfApi
from gpt2repro.models.openai_weights import from_gpt2, to_gpt2
model = GPT2LMHeadModel(GPT2Config(vocab_size=90, n_positions=16, n_embd=16, n_layer=2, n_head=2))
model.push_to_hub("ada/gpt2")
HfApi().create_tag("ada/gpt2", tag="v1")
first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
torch.nn.init.normal_(model.transformer.wte.weight)
model.push_to_hub("ada/gpt2")
model.push_to_hub("ada/gpt2-shards", max_shard_size="8KB")
second = model.state_dict()
for name, revision, expected in (("gpt2", "v1", first), ("gpt2", None, second), ("gpt2-shards", None, second)):
    again = to_gpt2(from_gpt2(f"ada/{name}", revision=revision)).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
"""
    python("-c", code, token=ADA)
    assert any("model-00002" in name for name in hub.files("ada/gpt2-shards"))
