"""What tests do as a client of the Hub, each in an interpreter whose environment says which Hub and whose token:
`hub_client.py FUNCTION ARGUMENT ...`. The libraries read those variables when they are imported."""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi, get_session, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, dynamic_module_utils

from gpt2repro.errors import run_script
from gpt2repro.models import folder as model_folder
from gpt2repro.models.openai_weights import from_gpt2, to_gpt2
from modeling_gpt2repro import GPT2ReproForCausalLM


# ---- push_to_hub ----


def push_versions(folder: str, repo: str, result: str) -> None:
    """Push a model folder, tag it v1, branch it, and push other weights; save the logits of both versions."""

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(torch.arange(8)[None]).logits

    model = GPT2ReproForCausalLM.from_pretrained(folder)
    model.push_to_hub(repo)
    AutoTokenizer.from_pretrained(folder).push_to_hub(repo)
    first = logits()
    HfApi().create_tag(repo, tag="v1")
    HfApi().create_branch(repo, branch="release/1")
    with torch.no_grad():
        model.transformer.wte.weight.mul_(2)
    model.push_to_hub(repo, commit_message="Other weights")
    torch.save([first, logits()], result)


def convert_revisions(repo: str) -> None:
    """Push a GPT2LMHeadModel, tag it v1, push other weights, and those in shards; from_gpt2 reads each of them."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=90, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    model.push_to_hub(repo)
    HfApi().create_tag(repo, tag="v1")
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.nn.init.normal_(model.transformer.wte.weight)
    model.push_to_hub(repo)
    model.push_to_hub(f"{repo}-shards", max_shard_size="8KB")
    second = model.state_dict()
    for name, revision, expected in ((repo, "v1", first), (repo, None, second), (f"{repo}-shards", None, second)):
        again = to_gpt2(from_gpt2(name, revision=revision)).state_dict()
        assert all(torch.equal(again[key], tensor) for key, tensor in expected.items()), (name, revision)


# ---- the client's own calls ----


def refused(call, *args, **kwargs) -> tuple[str, int]:
    """The error of a call that the server refuses."""
    try:
        call(*args, **kwargs)
    except HfHubHTTPError as error:
        return type(error).__name__, error.response.status_code
    raise AssertionError(f"{call} was not refused")


def make_every_call() -> None:
    """Calls of HfApi that no other test makes, on a repository of the files in the working directory."""
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

    tree = [entry.path for entry in api.list_repo_tree(repo, revision="v1")]
    assert tree == [".gitattributes", "notes", "weights.bin"]
    assert "notes/a.txt" in api.list_repo_files(repo, revision="v1")
    assert "notes/a.txt" not in api.list_repo_files(repo)
    (info,) = api.get_paths_info(repo, ["weights.bin", "none"])
    assert info.size == info.lfs.size == 10240
    assert api.file_exists(repo, "weights.bin") and not api.file_exists(repo, "none")

    assert refused(hf_hub_download, repo, "none") == ("RemoteEntryNotFoundError", 404)
    assert refused(hf_hub_download, repo, "weights.bin", revision="none") == ("RevisionNotFoundError", 404)
    assert Path(hf_hub_download(repo, "weights.bin")).read_bytes() == Path("weights.bin").read_bytes()
    part = get_session().get(hf_hub_url(repo, "weights.bin"), headers={"Range": "bytes=254-257"})
    assert (part.status_code, part.content) == (206, b"\xfe\xff\x00\x01")

    late = {"path_or_fileobj": b"", "path_in_repo": "b.txt", "repo_id": repo, "parent_commit": first.oid}
    assert refused(api.upload_file, **late) == ("HfHubHTTPError", 412)
    try:
        api.upload_file(path_or_fileobj=b"---\nno metadata\n---\n", path_in_repo="README.md", repo_id=repo)
    except ValueError as error:
        assert "Invalid metadata" in str(error)
    else:
        raise AssertionError("a model card without metadata was accepted")


# ---- two processes at once ----


def load_in_pairs(repo: str, folder: str) -> None:
    """Five times, two processes load a repository's code into one empty cache at the same moment; write their exit
    codes and the code's VERSION to result.json."""
    model_folder.register_auto_classes = lambda: None  # so that the repository's copy of the code is run, not ours
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8))  # imports once what each process would import
    processes = multiprocessing.get_context("fork")

    def load(number: int, barrier, versions) -> None:
        dynamic_module_utils.HF_MODULES_CACHE = f"{folder}/modules{number}"
        barrier.wait()
        model, _ = model_folder.open_model(repo, trust_remote_code=True)
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
            process.join(250)
        result.append([process.exitcode for process in pair] + [versions.get(timeout=60) for _ in pair])
    Path(folder, "result.json").write_text(json.dumps(result))


# ---- scripts ----


def attempt(script: str, attempts: str, result: str) -> None:
    """Run a script's main once for each [token, *flags] of a JSON list; write each exit code and stderr as JSON."""
    main = importlib.import_module(script).main
    outcomes = []
    for token, *argv in json.loads(attempts):
        os.environ["HF_TOKEN"] = token
        sys.argv = [script, *argv]
        code = 0
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            try:
                run_script(main)
            except SystemExit as end:
                code = end.code
        outcomes.append([code, stderr.getvalue()])
    Path(result).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    _, function, *arguments = sys.argv
    globals()[function](*arguments)
