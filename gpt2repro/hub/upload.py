"""Uploading a model folder to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi

from gpt2repro.errors import UserError, first_line


def create_repository(repo_id: str, private: bool | None = None, revision: str | None = None) -> None:
    """Make sure that the repository and the branch `revision` exist and can be written to.

    Raises:
        UserError: no network, no permission, an invalid name, or a public repository though `private` was asked for.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)  # passes for somebody else's public one
        api.auth_check(repo_id, write=True)
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        public = private and not api.repo_info(repo_id).private
    except Exception as error:  # network, permission and name errors share no base class
        raise UserError(
            f"cannot push to {repo_id} ({first_line(error)}); check the network, and log in with `hf auth login` as "
            "one who may write there"
        ) from error
    if public:
        raise UserError(f"{repo_id} exists already and is public; leave --private out, or choose another name")


def upload(folder: Path, repo_id: str, revision: str | None = None) -> str:
    """Upload a model folder as one commit that replaces an older model; returns the commit's URL.

    Raises:
        UserError: the upload failed; the folder stays.
    """
    try:
        return HfApi().upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message="Upload model",
            delete_patterns=["*.py", "*.safetensors", "*.safetensors.index.json"],
        )
    except Exception as error:  # of any type, as above
        branch = f" --revision {revision}" if revision else ""
        raise UserError(
            f"the upload to {repo_id} failed ({first_line(error)}); {folder} is complete: repeat the command, or run "
            f"`hf upload {repo_id} {folder}{branch}`"
        ) from error
