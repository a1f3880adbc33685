"""What a command line of train_accelerate.py asks for, and what is wrong with it as far as can be told without torch:
mistakes of this kind end a command within half a second. preflight.py checks the rest."""

import shlex
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gpt2repro.data.manifest import MANIFEST
from gpt2repro.data.mixture import RunData
from gpt2repro.errors import UserError, first_line, problems_of, refuse
from gpt2repro.evaluation.reference_curves import reference_problems
from gpt2repro.files import CHECKOUT, append_problem, write_problem
from gpt2repro.model_fields import model_fields
from gpt2repro.models.find import find_model, is_adapter
from gpt2repro.processes import world_size
from gpt2repro.recipe import Recipe
from gpt2repro.recipe_file import parse_recipe
from gpt2repro.run_folder import RunFolder
from gpt2repro.train.optimizers import optimizer_problems
from gpt2repro.train.recipe_change import RecipeChange, edit_problems


DEMO = CHECKOUT / "recipes" / "demo.yaml"


@dataclass(frozen=True)
class CommandLine:
    """A command line, read and checked.

    recipe: has the default in place of each value that cannot be read.
    flags: those that were given, e.g. --model.n_layer.
    folder: of the run; None with --eval_only, which has neither an output directory nor checkpoints of its own.
    data: opened, its hashes not yet verified; None: it cannot be, or is the demo's and not prepared yet.
    uses_demo: neither a recipe nor data was asked for.
    problems: one line for each mistake.
    """

    recipe: Recipe
    flags: set[str]
    folder: RunFolder | None
    data: RunData | None
    uses_demo: bool
    problems: list[str]


def check_command_line(argv: list[str]) -> None:
    """Raises UserError: with one line for each mistake that can be told without torch."""
    refuse(read_command_line(argv).problems)


def read_command_line(argv: list[str]) -> CommandLine:
    """Raises UserError: the recipe file cannot be read."""
    recipe, problems = parse_recipe(argv, DEMO, model_fields())
    is_read = not problems
    flags = {word.split("=")[0] for word in argv}
    uses_demo = not flags & {"--config", "--data_dir", "--data"}
    awaits_demo = uses_demo and not (Path(recipe.data_dir) / MANIFEST).exists()
    has_data = is_read or any(recipe.sources)  # otherwise what was given as data is refused
    folder = None if recipe.eval_only else RunFolder(recipe.output_dir)

    problems += recipe.problems(world_size()) + tracker_problems(recipe) + hub_problems(recipe)
    problems += reference_problems(recipe.reference_curve) + optimizer_problems(recipe)
    data = None
    if has_data and not awaits_demo:
        try:
            data = open_data(recipe)
        except (UserError, ValueError) as error:
            problems.append(str(error))
    problems += init_from_problems(recipe, folder) + lora_problems(recipe)
    if folder is not None:
        is_whole = is_read and recipe.init_from == "scratch"  # otherwise init_from decides on the model's sizes
        problems += output_problems(recipe if is_whole else None, folder, data)
    return CommandLine(recipe, flags, folder, data, uses_demo, problems)


# ---- checks ----


def open_data(recipe: Recipe) -> RunData:
    """The recipe's data. If it does not exist, the error names the command that prepares it, if there is one."""
    try:
        return RunData.open(recipe.sources)
    except UserError as error:
        name = recipe.corpus.split(" --")[0]  # flags may follow, as in recipes/gpt2-xl-fineweb-edu.yaml
        is_description = " " in name  # of a mixture or another trainer's tokens, in the record of a run
        if recipe.data or Path(recipe.data_dir).exists() or is_description:
            raise
        corpus = "files --source FOLDER" if recipe.corpus == "files" else recipe.corpus
        command = f"python prepare_data.py {corpus} --output_dir {shlex.quote(recipe.data_dir)}"
        raise UserError(f"{error}; `{command}` prepares this recipe's data") from error


def init_from_problems(recipe: Recipe, folder: RunFolder | None) -> list[str]:
    """One line if there is no model at init_from, and no checkpoint in its place; an adapter's needs the model."""
    resumes = folder is not None and folder.latest_checkpoint() is not None
    if recipe.init_from == "scratch" or (resumes and not recipe.lora_rank):
        return []
    return problems_of(find_model, recipe.init_from)


def lora_problems(recipe: Recipe) -> list[str]:
    """Why no adapter of init_from can be trained."""
    if not recipe.lora_rank:
        return []
    problems = []
    if find_spec("peft") is None:
        problems.append(f'lora_rank={recipe.lora_rank} needs PEFT; run `pip install "gpt2repro[lora]"`')
    if is_adapter(recipe.init_from):
        problems.append(
            f"init_from={recipe.init_from} is an adapter itself, and lora_rank trains one of a model; merge it with "
            f"`python publish.py {shlex.quote(recipe.init_from)} --to ./FOLDER` first"
        )
    return problems


def tracker_problems(recipe: Recipe) -> list[str]:
    if recipe.report_to == "none":
        return []
    package = find_spec(recipe.report_to)
    if package is not None and package.origin is not None:  # without an origin it is a folder, as wandb leaves one
        return []
    return [f"report_to={recipe.report_to} is not installed; run `pip install {recipe.report_to}`"]


def hub_problems(recipe: Recipe) -> list[str]:
    """One line if the Hub would not accept the repository's name; that it has an owner is checked with the recipe."""
    if not recipe.push_to_hub or recipe.hub_model_id.count("/") != 1:
        return []
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(recipe.hub_model_id)
    except HFValidationError as error:
        return [f"hub_model_id={recipe.hub_model_id!r} is no name of a repository ({first_line(error)}); change it"]
    return []


def output_problems(recipe: Recipe | None, folder: RunFolder, data: RunData | None) -> list[str]:
    """Why the run must not write to its output directory: it never overwrites another run's files.

    Args:
        recipe: None if it cannot be read as it was meant, and so not be compared with the directory's.
        data: None if it cannot be opened, which is reported elsewhere.
    """
    elsewhere = "choose another --output_dir, or delete it"
    misplaced = folder.layout_problem()
    if misplaced:
        return [f"output_dir={folder.path}: {misplaced}; {elsewhere}"]
    unwritable = write_problem(folder.path) or write_problem(folder.checkpoints) or append_problem(folder.metrics)
    if unwritable:
        return [f"output_dir={folder.path}: {unwritable}; correct that, or choose another --output_dir"]
    if folder.is_untouched():
        return []
    if not folder.recipe.is_file():
        return [f"output_dir={folder.path} exists and is not a run; {elsewhere}"]
    if recipe is None:
        return []
    if not recipe.resume:
        return [f"output_dir={folder.path} holds a run, and resume is off; pass --resume true, or {elsewhere}"]
    if folder.model.exists() and folder.latest_checkpoint() is None:
        return [
            f"output_dir={folder.path} holds a trained model, but no checkpoint to resume from, so this would train "
            f"it anew; to continue, set --init_from {folder.path} and another --output_dir, or delete it"
        ]
    try:
        recorded = folder.read_record()
    except UserError as error:
        return [str(error)]
    problems = edit_problems(recorded, folder)
    problems = problems or RecipeChange.between(recorded, recipe, folder).problems(recipe, recorded)
    if problems:
        return problems
    if data is not None and recorded.get("data", {}).get("manifest_sha256") != data.fingerprint:
        asked = f"data={recipe.data}" if recipe.data else f"data_dir={recipe.data_dir}"
        return [f"output_dir={folder.path} holds a run on other data than {asked}; {elsewhere}"]
    return []
