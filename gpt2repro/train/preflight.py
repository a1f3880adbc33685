"""What is settled before a run starts: recipe, data, model and tokenizer, checked against each other. All of the user's
mistakes are told at once, before anything expensive."""

import contextlib
import subprocess
import sys
from pathlib import Path

import yaml
from accelerate import PartialState
from accelerate.tracking import get_available_trackers
from transformers import PreTrainedTokenizerBase

from gpt2repro.data import shards
from gpt2repro.data.foreign_tokens import foreign_format
from gpt2repro.data.mixture import data_manifest, each_source
from gpt2repro.data.order import count_windows
from gpt2repro.data.tokenization import build_tokenizer, padded_vocab_size
from gpt2repro.errors import UserError
from gpt2repro.models.folder import find_model, load_tokenizer
from gpt2repro.models.openai_weights import gpt2_config
from gpt2repro.processes import cpu_asked, missing_gpu, world_size
from gpt2repro.recipe import Recipe
from gpt2repro.recipe_file import differences, parse_recipe
from gpt2repro.train import checkpoint
from gpt2repro.train.optimizers import optimizer_problems
from modeling_gpt2repro import GPT2ReproConfig, register_auto_classes


ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "recipes" / "demo.yaml"


def settle(argv: list[str]) -> tuple[Recipe, dict, GPT2ReproConfig, PreTrainedTokenizerBase]:
    """Recipe, data manifest, model configuration and tokenizer of a run, checked against each other before anything
    expensive.

    Raises:
        UserError: one line for each mistake.
    """
    register_auto_classes()
    recipe, problems = parse_recipe(argv, DEMO, GPT2ReproConfig)
    if not problems and not recipe.data and not any(word.split("=")[0] == "--config" for word in argv):
        prepare_demo(recipe)
    problems += recipe.problems(world_size()) + optimizer_problems(recipe) + missing_gpu()
    problems += [] if recipe.eval_only else output_problems(recipe)
    if recipe.report_to not in ("none", *map(str, get_available_trackers())):
        problems.append(f"report_to={recipe.report_to} is not installed; run `pip install {recipe.report_to}`")
    try:
        manifest = read_data(recipe)
        config = model_config(recipe, manifest)
        tokenizer = data_tokenizer(recipe, manifest)
        problems += config_problems(recipe, manifest, config, tokenizer) + tokenizer_problems(recipe, tokenizer)
    except (UserError, ValueError) as error:
        problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return recipe, manifest, config, tokenizer


def prepare_demo(recipe: Recipe) -> None:
    """Say what a bare command runs, and prepare its corpus where it is missing: once, by the first process."""
    with PartialState(cpu=cpu_asked()).main_process_first():
        if PartialState().is_main_process:
            print(f"no --config: training the demo, {DEMO.relative_to(ROOT)}; recipes/ holds the real ones", flush=True)
            if not (Path(recipe.data_dir) / shards.MANIFEST).exists():
                script = [sys.executable, str(ROOT / "prepare_data.py")]
                if subprocess.run([*script, recipe.corpus, "--output_dir", recipe.data_dir]).returncode:
                    raise UserError(f"the demo's corpus could not be prepared in {recipe.data_dir}")


def read_data(recipe: Recipe) -> dict:
    """The manifest of the recipe's data; a mistake ends in the command that prepares it, where the recipe tells."""
    try:
        return data_manifest(recipe.sources)
    except UserError as error:
        if recipe.data or foreign_format(Path(recipe.data_dir)):
            raise
        command = f"python prepare_data.py {recipe.corpus} --output_dir {recipe.data_dir}"
        raise UserError(f"{error}; this recipe's is made by `{command}`") from error


def data_tokenizer(recipe: Recipe, manifest: dict) -> PreTrainedTokenizerBase:
    """The tokenizer of the data: that of the first directory that has one, else GPT-2's."""
    for directory, source in each_source(recipe.sources, manifest):
        if source["tokenizer"]["sha256"]:
            return load_tokenizer(Path(directory) / "tokenizer")
    return build_tokenizer("gpt2", []).fast


def model_config(recipe: Recipe, manifest: dict) -> GPT2ReproConfig:
    """The model that the recipe asks for; the vocabulary is that of the data where the recipe does not say.

    Raises:
        UserError or ValueError: init_from is no GPT-2, or the sizes contradict each other.
    """
    if recipe.init_from == "scratch":
        vocab_size, eot_id = manifest["tokenizer"]["vocab_size"], manifest["tokenizer"]["eot_id"]
        of_data = {
            "unpadded_vocab_size": vocab_size,
            "vocab_size": padded_vocab_size(vocab_size),
            "bos_token_id": eot_id,
            "eos_token_id": eot_id,
        }
        return GPT2ReproConfig(**of_data | recipe.model)
    # A run that goes on does not need its beginning.
    of_run = [] if recipe.eval_only else reversed(checkpoint.complete(recipe.output_dir))
    newest = next((path for path in of_run if not checkpoint.damage(path, "config.json")), None)
    config = gpt2_config(str(newest) if newest else find_model(recipe.init_from))
    # As nanoGPT's crop_block_size: positions that no sequence of this run reaches are cut off, unless the recipe says
    # otherwise. Dropout is the recipe's choice; the rest of the architecture is the checkpoint's.
    ours = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ours |= {"n_positions": min(recipe.sequence_length, config.n_positions)}
    ours |= {name: recipe.model[name] for name in ours.keys() & recipe.model.keys()}
    problems = [
        f"model.{name}={value}, but init_from={recipe.init_from} has {getattr(config, name)}; leave it out"
        for name, value in recipe.model.items()
        if (name not in ours and getattr(config, name) != value)
        or (name == "n_positions" and value > config.n_positions)
    ]
    if problems:
        raise UserError("\n".join(problems))
    return GPT2ReproConfig(**config.to_dict() | ours)


def config_problems(
    recipe: Recipe, manifest: dict, config: GPT2ReproConfig, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """What does not fit between recipe, data and model."""
    problems = []
    recorded = manifest["tokenizer"]
    if config.unpadded_vocab_size < recorded["vocab_size"]:
        problems.append(
            f"the model has unpadded_vocab_size={config.unpadded_vocab_size}, but {', '.join(recipe.sources)} was "
            f"tokenized with {recorded['name']}, {recorded['vocab_size']} ids; choose the data or the model that fits "
            "the other"
        )
    if recipe.sequence_length > config.n_positions:
        problems.append(
            f"sequence_length={recipe.sequence_length} is longer than n_positions={config.n_positions}; "
            "lower the one or, training from scratch, raise --model.n_positions"
        )
    for prompt in recipe.sample_prompts:
        length = len(tokenizer(prompt or tokenizer.bos_token or "\n").input_ids)
        if not 0 < length < config.n_positions:
            problems.append(
                f"sample_prompts: {prompt!r} is {length} tokens long; the model takes 1 to {config.n_positions - 1}"
            )
    for directory, source in each_source(recipe.sources, manifest):
        for name, split in source["splits"].items():
            if not count_windows(split["tokens"], recipe.sequence_length):
                problems.append(
                    f"the {name} split of {directory} has {split['tokens']} tokens, fewer than a window of "
                    f"sequence_length + 1 = {recipe.sequence_length + 1}; use more text or shorter sequences"
                )
    return problems


def goes_on(recipe: Recipe) -> bool:
    """Whether the run has a checkpoint, with which it goes on, so that it does not need what it began with."""
    return checkpoint.latest(recipe.output_dir) is not None and not recipe.eval_only


def tokenizer_problems(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Whether the model that the run starts from knows the data's tokens by other ids; some bring no tokenizer."""
    if recipe.init_from == "scratch" or goes_on(recipe):
        return []
    try:
        theirs = load_tokenizer(find_model(recipe.init_from)).get_vocab()
    except UserError:
        return []
    if all(theirs.get(token) == id for token, id in tokenizer.get_vocab().items()):
        return []
    return [
        f"init_from={recipe.init_from} has another tokenizer than {', '.join(recipe.sources)}; prepare the data with "
        f"`python prepare_data.py ... --tokenizer {recipe.init_from}`"
    ]


def output_problems(recipe: Recipe) -> list[str]:
    """Why the run must not write to its output directory: nothing of another run is overwritten."""
    output_dir = Path(recipe.output_dir)
    elsewhere = "choose another --output_dir, or delete it"
    unfinished = {".lock", "recipe.yaml.tmp"}  # of a start that was cut off
    if not output_dir.exists() or (output_dir.is_dir() and {path.name for path in output_dir.iterdir()} <= unfinished):
        return []
    if not (output_dir / "recipe.yaml").is_file():
        return [f"output_dir={output_dir} exists and is not a run; {elsewhere}"]
    if not recipe.resume:
        return [f"output_dir={output_dir} holds a run, and resume is off; {elsewhere}"]
    recorded = yaml.safe_load((output_dir / "recipe.yaml").read_text())
    if differing := differences(recipe, recorded):
        return [f"output_dir={output_dir} holds a run of another recipe ({'; '.join(differing)}); {elsewhere}"]
    with contextlib.suppress(UserError):  # of data that cannot be read, read_data tells
        if recorded["data"]["manifest_sha256"] != data_manifest(recipe.sources)["manifest_sha256"]:
            asked = f"data={recipe.data}" if recipe.data else f"data_dir={recipe.data_dir}"
            return [f"output_dir={output_dir} holds a run on other data than {asked}; {elsewhere}"]
    return []
