"""Uploading a model folder, or the demo of a model, to the Hugging Face Hub."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi

from gpt2repro.errors import UserError, first_line
from gpt2repro.processes import note


README = "README.md"
MADE_BY_THE_HUB = {README, ".gitattributes"}  # what a new Space holds
WEIGHTS = "model.safetensors"  # as we write them
OTHER_WEIGHTS = [
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model-*-of-*.bin",
]


def create_repository(repo_id: str, private: bool | None = None, revision: str | None = None) -> None:
    """Make sure that the repository and its branch `revision` exist and are writable.

    Raises:
        UserError: no network, no permission, an invalid name, or the repository is public although `private` was asked.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)  # succeeds for anybody's public repository
        api.auth_check(repo_id, write=True)
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        public = private and not api.repo_info(repo_id).private
    except Exception as error:  # network, permission and name errors share no base class
        raise UserError(
            f"cannot push to {repo_id} ({first_line(error)}); check the network, and log in with `hf auth login` to an "
            "account with write access"
        ) from error
    if public:
        raise UserError(f"{repo_id} already exists and is public; omit --private, or choose another name")


def create_space(repo_id: str, private: bool | None = None) -> None:
    """Make sure that a Space for a Gradio app exists, is writable and holds no app yet.

    Raises:
        UserError: no network, no permission, an invalid name, or the Space holds an app.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True, repo_type="space", space_sdk="gradio")
        api.auth_check(repo_id, repo_type="space", write=True)
        files = set(api.list_repo_files(repo_id, repo_type="space"))
    except Exception as error:  # as in create_repository
        raise UserError(
            f"cannot push to the Space {repo_id} ({first_line(error)}); check the network, and log in with "
            "`hf auth login` to an account with write access"
        ) from error
    if files - MADE_BY_THE_HUB:
        raise UserError(f"the Space {repo_id} exists already; choose another name, or delete it")


def needs_token(model_id: str) -> bool:
    """Whether a Space cannot read a model without a token: it is private or gated.

    Raises:
        UserError: the Hub does not say.
    """
    try:
        model = HfApi().model_info(model_id)
    except Exception as error:
        raise UserError(f"cannot look up {model_id} ({first_line(error)}); check the network") from error
    return bool(model.private or model.gated)


def upload_space(folder: Path, repo_id: str, keep_as: Path) -> str:
    """Upload a Space's folder to a Space without an app, as one commit.

    Args:
        keep_as: where the folder is moved if the upload fails.
    Returns:
        The commit's URL.
    Raises:
        UserError: the upload failed; the message says where the folder is.
    """
    try:
        return HfApi().upload_folder(
            repo_id=repo_id, repo_type="space", folder_path=folder, commit_message="Upload the demo"
        )
    except Exception as error:
        place = folder.rename(keep_as)
        raise UserError(
            f"the upload to the Space {repo_id} failed ({first_line(error)}); {place} is complete: repeat the "
            f"command, or run `hf upload {repo_id} {shlex.quote(str(place))} --repo-type space`"
        ) from error


def upload(
    folder: Path,
    repo_id: str,
    revision: str | None = None,
    overwrite_readme: bool = False,
    keep_as: Path | None = None,
) -> str:
    """Upload a model folder as one commit. Of the files that are there it touches only those of the same names, and, if
    it brings weights for transformers, those of an older model in other files, which some libraries would read instead.
    A line says that README.md stays.

    Args:
        overwrite_readme: replace a README.md that is there; its owner may have written it.
        keep_as: where the folder is moved if the upload fails; None: it stays where it is.
    Returns:
        The commit's URL.
    Raises:
        UserError: the upload failed; the message says where the folder is.
    """
    api = HfApi()
    try:
        keeps_readme = not overwrite_readme and api.file_exists(repo_id, README, revision=revision)
        url = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message="Upload model",
            ignore_patterns=[README] if keeps_readme else None,
            delete_patterns=OTHER_WEIGHTS if (folder / WEIGHTS).exists() else None,
        )
    except Exception as error:  # of any type, as in create_repository
        branch = f" --revision {revision}" if revision else ""
        place = folder.rename(keep_as) if keep_as else folder
        raise UserError(
            f"the upload to {repo_id} failed ({first_line(error)}); {place} is complete: repeat the command, or run "
            f"`hf upload {repo_id} {shlex.quote(str(place))}{branch}`"
        ) from error
    if keeps_readme:
        note(f"{repo_id} keeps its {README}; publish.py --overwrite_readme replaces it by the new model card")
    return url
