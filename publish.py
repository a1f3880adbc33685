"""Publish a trained model: to a Hugging Face Hub repository, or to a folder.

    python publish.py runs/gpt2-124m-fineweb-edu --to owner/name                # weights with our model code
    python publish.py runs/gpt2-124m-fineweb-edu --to owner/name --format gpt2  # plain GPT2LMHeadModel, no remote code
    python publish.py runs/demo/checkpoints/step_00000500 --to ./exported       # a folder, starting with . or / or ~
    python publish.py nanogpt/out/ckpt.pt --to ./converted                      # nanoGPT, build-nanogpt, llm.c

A published model consists of the weights as safetensors, the tokenizer, generation defaults and a model card with what
the run measured. An upload is one commit.
"""

import argparse
import os
import shutil
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gpt2repro.data.tokenization import tokenizer_folder
from gpt2repro.errors import Parser, UserError, first_line, os_error_number, run_script
from gpt2repro.files import SCRATCH, scratch_folder, write_bytes, write_problem
from gpt2repro.hub.model_card import model_card
from gpt2repro.hub.upload import create_repository, upload
from gpt2repro.models.folder import check_tokenizer, find_model, load_tokenizer, save_model_folder, tokenizer_for
from gpt2repro.models.openai_weights import from_gpt2, to_gpt2
from gpt2repro.run_folder import RunFolder
from gpt2repro.show.logged_run import LoggedRun
from gpt2repro.show.pictures import loss_picture
from gpt2repro.train import checkpoint
from gpt2repro.train.metrics import read_metrics


FOLDER_PREFIXES = (".", "/", "~")  # of --to; any other value is a Hub repository


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    source = find_model(args.source)
    last_step = checkpoint_step_of(Path(source))
    is_folder = args.to.startswith(FOLDER_PREFIXES)
    target = Path(args.to).expanduser().resolve() if is_folder else None
    name = target.name if target else args.to.split("/")[-1]
    parent = target.parent if target else Path("publish")

    unwritable = write_problem(parent)
    if unwritable:
        remedy = "choose another --to" if is_folder else "run the command in a folder that can be written"
        raise UserError(f"--to {args.to}: {unwritable}; {remedy}")
    model = from_gpt2(source, drop_heads=args.drop_heads)
    tokenizer = choose_tokenizer(args.tokenizer, source, model)
    check_tokenizer(source, tokenizer, model.config)
    if not is_folder:
        create_repository(args.to, private=args.private or None, revision=args.revision)
    if args.format == "gpt2":
        model = to_gpt2(model)

    run = RunFolder.around(Path(source))
    card = model_card(model, name, None if is_folder else args.to, run, last_step, args.license)
    parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(parent) as scratch:
        folder, picture = scratch / name, scratch / "loss.png" if run is not None else None
        try:
            if run is not None and picture is not None:
                draw_losses(run, last_step, picture, name)
            save_model_folder(folder, model, tokenizer, card, picture)
        except Exception as error:  # safetensors and tokenizers do not raise OSError
            if os_error_number(error) is None:
                raise
            raise UserError(f"--to {args.to} cannot be written ({first_line(error)}); make room for it") from error
        if target is None:
            kept = parent / scratch.name.replace(SCRATCH, args.to.replace("/", "--") + "_")
            print(f"pushed to {upload(folder, args.to, args.revision, args.overwrite_readme, keep_as=kept)}")
            return
        try:
            folder.rename(target)
        except OSError as error:  # rename replaces an empty folder only
            raise UserError(f"--to {args.to} is no longer empty ({error.strerror}); choose a new folder") from error
        print(f"written to {args.to}")


def choose_tokenizer(asked: str | None, source: str, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The one that is asked for, in a folder, run or prepared directory or on the Hub; else that of the source."""
    if asked is None:
        return tokenizer_for(source, model, "add --tokenizer FOLDER to this command")
    name = os.path.expanduser(asked)
    return load_tokenizer(tokenizer_folder(Path(name)) or name)


def checkpoint_step_of(source: Path) -> int | None:
    """The step of a checkpoint; None if the source is not one.

    Raises:
        UserError: a file that is published of it is damaged.
    """
    if not (source / checkpoint.STATE).is_file():
        return None
    for name in (checkpoint.STATE, "config.json", checkpoint.MODEL):
        problem = checkpoint.find_damage(source, name)
        if problem:
            raise UserError(f"{source} is damaged ({problem}); publish another checkpoint of the run")
    return checkpoint.read_state(source)["step"]


def draw_losses(run: RunFolder, last_step: int | None, path: Path, name: str) -> None:
    """The run's own picture; for a checkpoint one up to its step, with the name that it is published under."""
    if last_step is None and run.picture.is_file():
        shutil.copy(run.picture, path)
        return
    rows = [row for row in read_metrics(run.metrics) if last_step is None or row["step"] <= last_step]
    write_bytes(path, loss_picture([LoggedRun(name, run.read_record(), rows)]))


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("source", help="run, checkpoint, model folder, Hub id, or another trainer's checkpoint")
    parser.add_argument("--to", required=True, metavar="REPO_OR_FOLDER", help="owner/name, or a new folder ./name")
    parser.add_argument(
        "--format",
        choices=("gpt2repro", "gpt2"),
        default="gpt2repro",
        help="gpt2repro: with our model code; gpt2: transformers' own class, loads anywhere (default: %(default)s)",
    )
    parser.add_argument("--tokenizer", help="folder, run, prepared directory or Hub id, if SOURCE has none")
    parser.add_argument("--drop_heads", action="store_true", help="leave out value heads and other trainers' extras")
    parser.add_argument("--license", help="license of the weights, for the model card (default: the run's recipe's)")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--revision", help="branch to push to, created if missing (default: main)")
    parser.add_argument("--overwrite_readme", action="store_true", help="replace the README.md that is on the Hub")
    args = parser.parse_args(argv)
    if args.to.startswith(FOLDER_PREFIXES):
        folder = Path(args.to).expanduser()
        if args.private or args.revision or args.overwrite_readme:
            flags = "--private, --revision and --overwrite_readme"
            raise UserError(f"{flags} are for the Hub; drop them, or pass --to owner/name")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--to {args.to} exists already; choose a new folder, or delete it")
    else:
        try:
            validate_repo_id(args.to)
        except HFValidationError as error:
            raise UserError(f"--to {args.to} is not owner/name ({error}); a folder starts with ./") from error
        if args.to.count("/") != 1:
            raise UserError(f"--to {args.to} is not owner/name; a folder starts with ./")
    return args


if __name__ == "__main__":
    run_script(main)
