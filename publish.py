"""Publish a trained model: to a Hugging Face Hub repository, or to a folder.

    python publish.py runs/gpt2-124m-fineweb-edu --to owner/name                # weights with our model code
    python publish.py runs/gpt2-124m-fineweb-edu --to owner/name --format gpt2  # plain GPT2LMHeadModel, no remote code
    python publish.py runs/gpt2-124m-fineweb-edu --to owner/name --format gguf  # one file, for llama.cpp
    python publish.py runs/demo/checkpoints/step_00000500 --to ./exported       # a folder, starting with . or / or ~
    python publish.py nanogpt/out/ckpt.pt --to ./converted                      # nanoGPT, build-nanogpt, llm.c
    python publish.py owner/name --space owner/demo                             # a demo of a model that is on the Hub
    python publish.py runs/demo --space ./try-it                                # a demo with its model, in a folder

A published model consists of the weights as safetensors, the tokenizer, generation defaults and a model card with what
the run measured. A demo is a Gradio app that continues a prompt and shows the probabilities of the next token and the
attention of each head; on the Hub it is a Space. --to and --space may be given together. An upload is one commit.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from gpt2repro.errors import Parser, UserError, check_before_imports, problems_of, refuse, run_script
from gpt2repro.files import write_problem
from gpt2repro.models.find import find_model


GGUF_TYPES = ("f16", "f32", "bf16", "q8_0")
FOLDER_PREFIXES = (".", "/", "~")  # of --to; any other value is a Hub repository


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("source", help="run, checkpoint, model or adapter folder, Hub id, or another trainer's file")
    parser.add_argument("--to", metavar="REPO_OR_FOLDER", help="owner/name, or a new folder ./name")
    parser.add_argument(
        "--space", metavar="REPO_OR_FOLDER", help="write a demo to owner/name, or to a new folder ./name"
    )
    parser.add_argument(
        "--format",
        choices=("gpt2repro", "gpt2", "gguf"),
        default="gpt2repro",
        help="gpt2repro: with our model code; gpt2: transformers' own class, loads anywhere; gguf: one file for "
        "llama.cpp; docs/formats.md has others (default: %(default)s)",
    )
    parser.add_argument(
        "--gguf_type", choices=GGUF_TYPES, help=f"of the weights in a GGUF file (default: {GGUF_TYPES[0]})"
    )
    parser.add_argument("--tokenizer", help="folder, run, prepared directory or Hub id, if SOURCE has none")
    parser.add_argument("--drop_heads", action="store_true", help="leave out value heads and other trainers' extras")
    parser.add_argument("--scorecard", help="scorecard.json for the model card (default: the run's, if it has one)")
    parser.add_argument("--license", help="license of the weights, for the model card (default: the run's recipe's)")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--revision", help="branch to push to, created if missing (default: main)")
    parser.add_argument("--overwrite_readme", action="store_true", help="replace the README.md that is on the Hub")
    args = parser.parse_args(argv)
    args.to = Destination("--to", args.to) if args.to else None
    args.space = Destination("--space", args.space) if args.space else None
    given = [destination for destination in (args.to, args.space) if destination]
    if not given:
        raise UserError("nothing to write; add --to for the model, --space for a demo of it, or both")
    problems = [destination.problem() for destination in given]
    folders = [destination.path for destination in given if destination.is_folder]
    if len(set(folders)) < len(folders):
        problems.append(f"--to and --space are both {args.to.value}; choose a folder for each")
    to_hub = [destination.flag for destination in given if not destination.is_folder]
    if (args.private and not to_hub) or ((args.revision or args.overwrite_readme) and "--to" not in to_hub):
        flags = "--private, --revision and --overwrite_readme"
        problems.append(f"{flags} are for the Hub; drop them, or pass --to owner/name")
    if args.format == "gguf" and args.space:
        problems.append("--space is a demo of a model that transformers opens, --format gguf is not; drop one of them")
    if args.format != "gguf" and args.gguf_type:
        problems.append(f"--gguf_type {args.gguf_type} is for --format gguf; drop it, or add that")
    args.gguf_type = args.gguf_type or GGUF_TYPES[0]
    refuse([problem for problem in problems if problem] + problems_of(find_model, args.source))
    return args


@dataclass(frozen=True)
class Destination:
    """A new folder or a repository on the Hub, as a flag names it."""

    flag: str
    value: str

    @property
    def is_folder(self) -> bool:
        return self.value.startswith(FOLDER_PREFIXES)

    @property
    def path(self) -> Path:
        """The folder; of a repository, a name for what is written before it is uploaded."""
        if self.is_folder:
            return Path(self.value).expanduser().resolve()
        return Path("publish", self.value.split("/")[-1])

    @property
    def title(self) -> str:
        return self.path.name

    def problem(self) -> str | None:
        """Why nothing can be written there; None if it can, as far as is known without asking the Hub."""
        if self.is_folder:
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                return f"{self} exists already; choose a new folder, or delete it"
        else:
            from huggingface_hub.utils import HFValidationError, validate_repo_id

            try:
                validate_repo_id(self.value)
            except HFValidationError as error:
                return f"{self} is not owner/name ({error}); a folder starts with ./"
            if self.value.count("/") != 1:
                return f"{self} is not owner/name; a folder starts with ./"
        unwritable = write_problem(self.path.parent)
        remedy = f"choose another {self.flag}" if self.is_folder else "run the command in a folder that can be written"
        return f"{self}: {unwritable}; {remedy}" if unwritable else None

    def __str__(self) -> str:
        return f"{self.flag} {self.value}"


if __name__ == "__main__":
    check_before_imports(parse_arguments)  # mistakes end here, before the seconds that the imports below take

import os
import shutil
from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from gpt2repro.data.tokenization import tokenizer_folder
from gpt2repro.errors import first_line, os_error_number
from gpt2repro.evaluation.score_cache import model_folder, model_sha256
from gpt2repro.evaluation.scorecard import public_part, read_scorecard
from gpt2repro.files import SCRATCH, scratch_folder, write_bytes
from gpt2repro.hub.model_card import THIS_MODEL, model_card
from gpt2repro.hub.upload import create_repository, create_space, needs_token, upload, upload_space
from gpt2repro.models.errors import explained
from gpt2repro.models.folder import check_tokenizer, load_tokenizer, save_model_folder, tokenizer_for
from gpt2repro.models.gguf_file import check_gguf, write_gguf
from gpt2repro.models.openai_weights import from_gpt2, to_gpt2
from gpt2repro.processes import note
from gpt2repro.recipe import Recipe
from gpt2repro.run_folder import RunFolder
from gpt2repro.show.logged_run import LoggedRun
from gpt2repro.show.pictures import loss_picture
from gpt2repro.show.space import MODEL_FOLDER, Space, write_space
from gpt2repro.train.checkpoint_files import STATE, find_damage, read_state, weights_file
from gpt2repro.train.metrics import read_metrics


CARD_FILE = "scorecard.json"  # in a run's folder, where `scorecard.py RUN --output RUN` writes it


@dataclass(frozen=True)
class Export:
    """A model with what is published beside it.

    run: that trained it; None: there is no record of one.
    last_step: the checkpoint's; None: the model is what the run exported.
    scorecard: what is published of it; None: there is none.
    gguf_type: one of GGUF_TYPES: written as a GGUF file; None: as a folder for transformers.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    run: RunFolder | None
    last_step: int | None
    license: str | None
    scorecard: dict[str, Any] | None
    gguf_type: str | None

    def write(self, folder: Path, title: str, repo_id: str | None = None) -> None:
        """Write the folder that is published.

        Args:
            repo_id: where it will lie on the Hub; None: nowhere.
        """
        file = f"{title}-{self.gguf_type.upper()}.gguf" if self.gguf_type else None
        card = model_card(self.model, title, repo_id, self.run, self.last_step, self.license, self.scorecard, file)
        if self.gguf_type and file:
            folder.mkdir()
            write_gguf(folder / file, self.model, self.tokenizer, self.gguf_type, title)
            card.save(folder / "README.md")
        else:
            save_model_folder(folder, self.model, self.tokenizer, card)
        if self.run is not None:
            draw_losses(self.run, self.last_step, folder / "loss.png", title)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    to, space = args.to, args.space
    source = find_model(args.source)
    model_id = id_on_hub(source, to)
    if space and not space.is_folder and model_id is None:
        raise UserError(f"{space}: a Space on the Hub loads its model from there; add --to owner/name")
    export = None
    if to or model_id is None:
        export = open_source(source, args)
    else:
        check_hub_model(source)
    if to and not to.is_folder:
        create_repository(to.value, private=args.private or None, revision=args.revision)
    if space and not space.is_folder:
        create_space(space.value, private=args.private or None)

    if export and to:
        repo_id = None if to.is_folder else to.value
        deliver(
            to,
            write=lambda folder: export.write(folder, to.title, repo_id),
            push=lambda folder, kept: upload(folder, to.value, args.revision, args.overwrite_readme, keep_as=kept),
        )
    if space:
        deliver(
            space,
            write=lambda folder: write_demo(folder, space, model_id, export, args),
            push=lambda folder, kept: upload_space(folder, space.value, keep_as=kept),
        )
        if model_id and needs_token(model_id):
            note(f"{model_id} is not public: give {space.value} a token that may read it, as its secret HF_TOKEN")


def id_on_hub(source: str, to: Destination | None) -> str | None:
    """The repository on the Hub that holds the model once this command has ended; None: none does."""
    if to and not to.is_folder:
        return to.value
    return None if Path(source).exists() else source


def open_source(source: str, args: argparse.Namespace) -> Export:
    """The model to publish, in the format that is asked for, with its tokenizer."""
    last_step = checkpoint_step_of(Path(source))
    model = from_gpt2(source, drop_heads=args.drop_heads)
    tokenizer = choose_tokenizer(args.tokenizer, source, model)
    check_tokenizer(source, tokenizer, model.config)
    gguf_type = args.gguf_type if args.format == "gguf" else None
    if gguf_type:
        check_gguf(model, tokenizer, gguf_type)
    if args.format == "gpt2":
        model = to_gpt2(model)
    run = RunFolder.around(Path(source))
    scorecard = find_scorecard(args.scorecard, source, run)
    return Export(model, tokenizer, run, last_step, args.license, scorecard, gguf_type)


def check_hub_model(model_id: str) -> None:
    """Refuse a repository on the Hub whose model the demo could not open."""
    tokenizer = load_tokenizer(model_id)
    with explained(f"{model_id}: the demo cannot load it", "publish it with this command's --to, and add --space"):
        config = AutoConfig.from_pretrained(model_id)
    check_tokenizer(model_id, tokenizer, config)


def write_demo(
    folder: Path, space: Destination, model_id: str | None, export: Export | None, args: argparse.Namespace
) -> None:
    """Write the Space's folder, with the model in it if it is not on the Hub."""
    record = export.run.read_record() if export and export.run else {}
    prompts = record.get("sample_prompts") or Recipe().sample_prompts
    license = args.license or record.get("license")
    folder.mkdir()
    write_space(folder, Space(space.title, model_id, args.revision, prompts, license))
    if model_id is None and export:
        export.write(folder / MODEL_FOLDER, space.title)


def deliver(destination: Destination, write: Callable[[Path], None], push: Callable[[Path, Path], str]) -> None:
    """Have `write` make a folder. Once it is complete, give it its name, or for the Hub `push` it and keep nothing.

    Args:
        push: takes the folder, and where to move it if the upload fails; returns the commit's URL.
    Raises:
        UserError: it cannot be written, somebody else has made it meanwhile, or the upload failed.
    """
    parent = destination.path.parent
    parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(parent) as scratch:
        folder = scratch / destination.title
        try:
            write(folder)
        except Exception as error:  # safetensors and tokenizers do not raise OSError
            if os_error_number(error) is None:
                raise
            raise UserError(f"{destination} cannot be written ({first_line(error)}); make room for it") from error
        if not destination.is_folder:
            kept = parent / scratch.name.replace(SCRATCH, destination.value.replace("/", "--") + "_")
            print(f"pushed to {push(folder, kept)}")
            return
        try:
            folder.rename(destination.path)
        except OSError as error:  # rename replaces an empty folder only
            raise UserError(f"{destination} is no longer empty ({error.strerror}); choose a new folder") from error
        print(f"written to {destination.value}")


def choose_tokenizer(asked: str | None, source: str, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The one that is asked for, in a folder, run or prepared directory or on the Hub; else that of the source."""
    if asked is None:
        return tokenizer_for(source, model, "add --tokenizer FOLDER to this command")
    name = os.path.expanduser(asked)
    return load_tokenizer(tokenizer_folder(Path(name)) or name)


def find_scorecard(asked: str | None, source: str, run: RunFolder | None) -> dict[str, Any] | None:
    """What is published of the scorecard that is asked for, else of the run's, if there is one and it is of this model.

    Raises:
        UserError: the one asked for is not of this model, or is damaged.
    """
    if asked is not None:
        path = Path(asked).expanduser()
    elif run is not None and (run.path / CARD_FILE).is_file():
        path = run.path / CARD_FILE
    else:
        return None
    folder = model_folder(source)
    part = public_part(read_scorecard(path), model_sha256(folder), THIS_MODEL) if folder else None
    if part is None and asked is not None:
        raise UserError(f"--scorecard {asked} does not hold {source}, or holds it with other weights; make it again")
    if part is None:
        note(f"{path} is of other weights than {source}; the model card leaves it out")
    return part


def checkpoint_step_of(source: Path) -> int | None:
    """The step of a checkpoint; None if the source is not one.

    Raises:
        UserError: a file that is published of it is damaged.
    """
    if not (source / STATE).is_file():
        return None
    for name in (STATE, "config.json", weights_file(source).name):
        problem = find_damage(source, name)
        if problem:
            raise UserError(f"{source} is damaged ({problem}); publish another checkpoint of the run")
    return read_state(source)["step"]


def draw_losses(run: RunFolder, last_step: int | None, path: Path, name: str) -> None:
    """The run's own picture; for a checkpoint one up to its step, with the name that it is published under."""
    if last_step is None and run.picture.is_file():
        shutil.copy(run.picture, path)
        return
    rows = [row for row in read_metrics(run.metrics) if last_step is None or row["step"] <= last_step]
    write_bytes(path, loss_picture([LoggedRun(name, run.read_record(), rows)]))


if __name__ == "__main__":
    run_script(main)
