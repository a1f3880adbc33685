"""What is resolved before a run starts: recipe, data, tokenizer and model, checked against each other. All mistakes are
reported together, before anything expensive."""

import dataclasses
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from transformers import PreTrainedTokenizerBase

from gpt2repro.data.manifest import MANIFEST
from gpt2repro.data.mixture import RunData
from gpt2repro.data.tokenization import TOKENIZER_FILES, build_tokenizer, padded_vocab_size
from gpt2repro.errors import UserError, problems_of, refuse
from gpt2repro.evaluation.hellaswag_items import download_problems, read_items
from gpt2repro.files import CHECKOUT
from gpt2repro.models.folder import check_tokenizer, find_model, load_tokenizer
from gpt2repro.models.foreign_checkpoints import first_three
from gpt2repro.models.openai_weights import StoredGPT2, open_gpt2
from gpt2repro.models.padding import padded
from gpt2repro.models.sampling import prompt_text
from gpt2repro.processes import missing_gpu, note, on_main
from gpt2repro.recipe import Recipe
from gpt2repro.run_folder import RunFolder
from gpt2repro.train.checkpoint_files import find_damage
from gpt2repro.train.command_line import DEMO, output_problems, read_command_line
from gpt2repro.train.rendezvous import join
from modeling_gpt2repro import GPT2ReproConfig


DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


@dataclass(frozen=True)
class Plan:
    """A run that can start.

    data: opened, its hashes not yet verified.
    tokenizer: of the data, or the pretrained model's if that has more tokens.
    config: of the model.
    pretrained: the model to start from, opened but its weights not yet read; None: the weights are initialized at
        random or come from the run's own checkpoint.
    pretrained_tokenizer: of that model or, once there is one, of the run's newest checkpoint; None: it has none.
    """

    recipe: Recipe
    data: RunData
    tokenizer: PreTrainedTokenizerBase
    config: GPT2ReproConfig
    pretrained: StoredGPT2 | None
    pretrained_tokenizer: PreTrainedTokenizerBase | None


def resolve_and_check(argv: list[str]) -> Plan:
    """The run that a command line describes.

    Raises:
        UserError: one line for each mistake.
    """
    command = read_command_line(argv)
    if command.uses_demo and not command.problems:
        prepare_demo(command.recipe)
        command = read_command_line(argv)
    recipe, folder, data = command.recipe, command.folder, command.data
    problems = command.problems + missing_gpu()
    plan = None
    try:
        if data is not None and not recipe.bound_problems():
            plan = make_plan(recipe, data, folder, command.flags)
            problems += plan_problems(plan)
            if folder is not None and not command.problems:  # again, as init_from decides on the model's sizes
                problems += output_problems(plan.recipe, folder, data)
    except (UserError, ValueError) as error:
        problems.append(str(error))
    if folder is not None and recipe.hellaswag_every:
        problems += hellaswag_problems(recipe.hellaswag_data)
    if problems or plan is None:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return plan


def make_plan(recipe: Recipe, data: RunData, folder: RunFolder | None, flags: set[str]) -> Plan:
    """Resolve tokenizer and model.

    Args:
        folder: of the run; None with --eval_only.
        flags: of the command line, e.g. --model.n_layer.
    Raises:
        UserError or ValueError: init_from is not a GPT-2, or the model's sizes contradict each other.
    """
    if recipe.init_from == "scratch":
        config, pretrained, source = scratch_config(recipe, data), None, None
    else:
        stored, pretrained = starting_point(recipe, folder)
        recipe = drop_other_sizes(recipe, stored, flags)
        config = adapt_config(stored, recipe)
        checkpoint = folder.latest_checkpoint() if folder is not None else None
        source = pretrained.source if pretrained is not None else checkpoint
    theirs = model_tokenizer(source) if source is not None else None
    ours = data_tokenizer(data)
    tokenizer = ours
    if theirs is not None and knows_more(theirs, ours, config):
        tokenizer = theirs
        more = first_three([token for token in theirs.get_vocab() if token not in ours.get_vocab()])
        note(f"the run keeps the tokenizer of {source}: the data's lacks {more}; its end of text is {theirs.eos_token}")
    return Plan(recipe, data, tokenizer, config, pretrained, theirs)


def prepare_demo(recipe: Recipe) -> None:
    """Say that a command without --config uses the demo's; on the main process, prepare its corpus if it is missing."""
    join(recipe)

    def prepare() -> None:
        name = DEMO.relative_to(CHECKOUT)
        doing = "evaluating on the demo's data" if recipe.eval_only else "training the demo"
        print(f"no --config: {doing}, {name}; recipes/ has the real ones", flush=True)
        if (Path(recipe.data_dir) / MANIFEST).exists():
            return
        script = str(CHECKOUT / "prepare_data.py")
        command = [sys.executable, script, recipe.corpus, "--output_dir", recipe.data_dir]
        if subprocess.run(command).returncode != 0:
            raise UserError(f"the demo's corpus could not be prepared in {recipe.data_dir}")

    on_main(prepare)


# ---- data ----


def data_tokenizer(data: RunData) -> PreTrainedTokenizerBase:
    """The tokenizer that came with the data, else GPT-2's."""
    folder = data.tokenizer_folder()
    return build_tokenizer("gpt2", []).fast if folder is None else load_tokenizer(folder)


def knows_more(theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase, config: GPT2ReproConfig) -> bool:
    """Whether the tokenizer of the model that training starts from has the data's tokens and some more, such as the
    markers of a dialogue, which the trained model still knows."""
    our_ids, their_ids = ours.get_vocab(), theirs.get_vocab()
    has_more = our_ids.items() < their_ids.items()
    has_rows = max(their_ids.values()) < (config.unpadded_vocab_size or config.vocab_size)
    return has_more and has_rows


def model_tokenizer(source: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model's folder, file or Hub id; None if it has none.

    Raises:
        UserError: the folder's is damaged.
    """
    try:
        return load_tokenizer(source)
    except UserError:
        if any((Path(source) / name).exists() for name in TOKENIZER_FILES):
            raise
        return None


# ---- model ----


def starting_point(recipe: Recipe, folder: RunFolder | None) -> tuple[GPT2ReproConfig, StoredGPT2 | None]:
    """The configuration of init_from, and the pretrained model that the weights come from, if any.

    A run with a checkpoint resumes from that and no longer needs the model it was initialized from, unless it trains an
    adapter of that.

    Args:
        folder: of the run; None with --eval_only.
    Raises:
        UserError or ValueError: init_from is not a GPT-2.
    """
    has_checkpoint = folder is not None and folder.latest_checkpoint() is not None
    own_config = newest_config(folder) if folder is not None and has_checkpoint else None
    if own_config is not None and not recipe.lora_rank:
        return own_config, None
    pretrained = open_gpt2(find_model(recipe.init_from))
    resumes_alone = has_checkpoint and not recipe.lora_rank
    return padded(pretrained.config), None if resumes_alone else pretrained


def scratch_config(recipe: Recipe, data: RunData) -> GPT2ReproConfig:
    """The recipe's model fields; the vocabulary is the data's unless the recipe says otherwise."""
    vocab_size, eot_id = data.tokenizer.vocab_size, data.tokenizer.eot_id
    fields = {
        "unpadded_vocab_size": vocab_size,
        "vocab_size": padded_vocab_size(vocab_size),
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
    }
    fields.update(recipe.model)
    return GPT2ReproConfig(**fields)


def newest_config(folder: RunFolder) -> GPT2ReproConfig | None:
    """The configuration in the newest checkpoint whose config.json is intact; None if there is none."""
    for path in reversed(folder.complete_checkpoints()):
        if find_damage(path, "config.json") is None:
            return GPT2ReproConfig.from_pretrained(path)
    return None


def drop_other_sizes(recipe: Recipe, stored: GPT2ReproConfig, flags: set[str]) -> Recipe:
    """The recipe without the model fields of its file that init_from has otherwise: a recipe's sizes are those to train
    from scratch with. Fields given as flags stay; `adapt_config` checks them."""
    dropped = {
        name: value
        for name, value in recipe.model.items()
        if f"--model.{name}" not in flags and not can_adapt(name, value, stored)
    }
    if not dropped:
        return recipe
    if os.environ.get("RANK", "0") == "0":
        theirs = ", ".join(f"{name}={getattr(stored, name)}" for name in dropped)
        ours = ", ".join(f"{name}={value}" for name, value in dropped.items())
        print(f"init_from={recipe.init_from} has {theirs}; the recipe's {ours} does not apply", flush=True)
    kept = {name: value for name, value in recipe.model.items() if name not in dropped}
    return dataclasses.replace(recipe, model=kept)


def can_adapt(name: str, value: Any, stored: GPT2ReproConfig) -> bool:
    """Whether a stored model can be trained with this value: its own, another dropout, or fewer positions."""
    stored_value = getattr(stored, name)
    is_crop = name == "n_positions" and value <= stored_value
    return name in DROPOUTS or is_crop or value == stored_value


def adapt_config(stored: GPT2ReproConfig, recipe: Recipe) -> GPT2ReproConfig:
    """The configuration of a model to continue training: dropout is the recipe's, the architecture is the model's.

    Positions that no sequence of this run reaches are cropped, unless the recipe says otherwise.

    Raises:
        UserError: the recipe asks for another architecture.
    Source: nanoGPT model.py, crop_block_size.
    """
    chosen: dict[str, Any] = dict.fromkeys(DROPOUTS, 0.0) | {
        "n_positions": min(recipe.sequence_length, stored.n_positions)
    }
    problems = []
    for name, value in recipe.model.items():
        if can_adapt(name, value, stored):
            chosen[name] = value
        else:
            has = f"init_from={recipe.init_from} has {getattr(stored, name)}"
            problems.append(f"model.{name}={value}, but {has}; drop --model.{name}")
    refuse(problems)
    return GPT2ReproConfig(**stored.to_dict() | chosen)


# ---- checks ----


def hellaswag_problems(path: str | None) -> list[str]:
    """Why HellaSwag, of a file or from the Hub, cannot be read. A missing file is among the recipe's own problems."""
    flag = "--hellaswag_data"
    if path is None:
        return download_problems(flag)
    return problems_of(read_items, path, None, flag) if Path(path).is_file() else []


def plan_problems(plan: Plan) -> list[str]:
    """Contradictions between recipe, data, tokenizer and model."""
    recipe, config, tokenized = plan.recipe, plan.config, plan.data.tokenizer
    problems = memory_problems(config)
    if recipe.lora_rank > config.n_embd:
        problems.append(
            f"lora_rank={recipe.lora_rank} must be at most n_embd={config.n_embd}: a larger one has more parameters "
            "than the matrices themselves; lower it"
        )
    model_tokens = config.unpadded_vocab_size or config.vocab_size
    if model_tokens < tokenized.vocab_size:
        problems.append(
            f"the model has unpadded_vocab_size={model_tokens}, but {', '.join(recipe.sources)} was "
            f"tokenized with {tokenized.name}, {tokenized.vocab_size} ids; choose a model and data with the same "
            "vocabulary"
        )
    if recipe.sequence_length > config.n_positions:
        problems.append(
            f"sequence_length={recipe.sequence_length} is longer than n_positions={config.n_positions}; "
            "lower sequence_length or, when training from scratch, raise --model.n_positions"
        )
    for prompt in [] if recipe.eval_only else recipe.sample_prompts:
        problems += prompt_problems(prompt, plan.tokenizer, config.n_positions)
    for source in plan.data.sources:
        problems += source.windows_problems(recipe.sequence_length)
    if plan.pretrained is not None:
        problems += tokenizer_problems(plan, plan.pretrained)
    return problems


def memory_problems(config: GPT2ReproConfig) -> list[str]:
    """One line if the matrices alone do not fit this machine, where every process builds the whole model in float32."""
    embeddings = config.n_embd * (config.vocab_size + config.n_positions)
    block = config.n_embd * (4 * config.n_embd + 2 * (config.n_inner or 4 * config.n_embd))
    needed, memory = 4 * (embeddings + config.n_layer * block), psutil.virtual_memory().total
    if needed <= memory:
        return []
    return [
        f"the model has {needed / 1e9:,.0f} GB of weights in float32, this machine {memory / 1e9:,.0f} GB of "
        f"memory; lower n_layer={config.n_layer}, n_embd={config.n_embd} or n_positions={config.n_positions}"
    ]


def prompt_problems(prompt: str, tokenizer: PreTrainedTokenizerBase, n_positions: int) -> list[str]:
    length = len(tokenizer(prompt_text(prompt, tokenizer)).input_ids)
    if 0 < length < n_positions:
        return []
    return [
        f"sample_prompts: {prompt!r} is {length} tokens long, but the model takes 1 to {n_positions - 1}; change it"
    ]


def tokenizer_problems(plan: Plan, pretrained: StoredGPT2) -> list[str]:
    """One line if the pretrained model's tokenizer gives the data's tokens other ids, or has tokens without a row."""
    recipe, theirs = plan.recipe, plan.pretrained_tokenizer
    if theirs is None:
        return []
    their_ids = theirs.get_vocab()
    if all(their_ids.get(token) == id for token, id in plan.tokenizer.get_vocab().items()):
        return problems_of(check_tokenizer, str(pretrained.source), theirs, pretrained.config)
    return [
        f"init_from={recipe.init_from} has another tokenizer than {', '.join(recipe.sources)}; prepare the data with "
        f"`python prepare_data.py ... --tokenizer {shlex.quote(recipe.init_from)}`"
    ]
