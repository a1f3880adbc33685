"""Uploading a model folder to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi

from gpt2repro.errors import UserError, first_line


def create_repository(repo_id: str, private: bool | None = None, revision: str | None = None) -> None:
    """Make sure that the repository, and the branch `revision`, are there and can be written to.

    Raises:
        UserError: no network, no permission, or not a repository's name.
    """
    try:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)  # which another's public repository passes
        api.auth_check(repo_id, write=True)
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    except Exception as error:  # network, permission and name errors share no base class
        raise UserError(
            f"cannot push to {repo_id} ({first_line(error)}); log in with `hf auth login` as one who may write there"
        ) from error


def upload(folder: Path, repo_id: str, revision: str | None = None) -> str:
    """Upload a model folder as one commit; returns the repository's URL.

    Raises:
        UserError: the upload failed; the folder is still there.
    """
    try:
        return HfApi().upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message="Upload model"
        )
    except Exception as error:  # as above
        branch = f" --revision {revision}" if revision else ""
        raise UserError(
            f"the upload to {repo_id} failed ({first_line(error)}); {folder} is complete: repeat the command, or run "
            f"`hf upload {repo_id} {folder}{branch}`"
        ) from error
