"""Model folders: what `from_pretrained` opens and what is pushed to the Hub."""

import contextlib
import functools
import logging
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import ModelCard
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    dynamic_module_utils,
)

from gpt2repro.data.tokenization import TOKENIZER_FILES, build_tokenizer, save_tokenizer
from gpt2repro.errors import UserError, first_line
from gpt2repro.files import new_folder
from gpt2repro.models.errors import LIBRARY_ERRORS, explained, python_command
from gpt2repro.models.find import adapter_base, find_model, is_adapter, is_path
from gpt2repro.models.foreign_checkpoints import WRAPPERS, first_three
from gpt2repro.models.generation_defaults import load_generation_defaults, our_generation_defaults
from gpt2repro.models.lora import lora_of, save_adapter
from gpt2repro.models.openai_weights import (
    MASK_BUFFERS,
    check_torch_files,
    from_gpt2,
    refuse_not_finite,
)
from gpt2repro.models.padding import unpadded, without_padding
from gpt2repro.processes import note
from modeling_gpt2repro import LARGEST_SIZES, GPT2ReproConfig, GPT2ReproForCausalLM, register_auto_classes


def save_model_folder(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: ModelCard,
    picture: Path | None = None,
) -> None:
    """Write weights, code, tokenizer, generation defaults, model card and loss curve, atomically.

    No padding rows are written: what lies in a model folder is for anyone.

    Args:
        model: a plain model, see `unwrapped`.
        picture: the loss curve as PNG.
    """
    model = without_padding(model)
    if model.generation_config._from_model_config:  # nobody has chosen one
        model.generation_config = our_generation_defaults(model.config)
    with new_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        _save_tokenizer(unfinished, tokenizer, model.config.n_positions)
        card.save(unfinished / "README.md")
        if picture:
            shutil.copy(picture, unfinished / "loss.png")


def save_adapter_folder(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what `add_lora` has added to a plain model, in PEFT's format, and the tokenizer, atomically."""
    lora = lora_of(model)
    assert lora is not None, "add_lora was called"
    weights = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    with new_folder(folder) as unfinished:
        save_adapter(unfinished, lora, weights)
        _save_tokenizer(unfinished, tokenizer, model.config.n_positions)


def rehearse_export(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, make_card: Callable[[PreTrainedModel], ModelCard]
) -> None:
    """Do everything that `save_model_folder` does except writing weights, in a temporary folder, so that what cannot be
    saved ends a run before its first step and not after its last.

    Args:
        model: only its configuration and generation defaults are read; it may be sharded.
        make_card: the model card of the model that it is given, which has no weights.
    Raises:
        UserError: the export would fail.
    """
    with torch.device("meta"):
        exported = GPT2ReproForCausalLM(unpadded(model.config))
    exported.generation_config = model.generation_config
    if model.generation_config._from_model_config:
        exported.generation_config = our_generation_defaults(model.config)
    problem = "the model folder could not be saved at the end of this run"
    with tempfile.TemporaryDirectory() as scratch, explained(problem, "correct what it names and repeat the command"):
        folder = Path(scratch)
        exported.config.save_pretrained(folder)  # with the model's code
        exported.generation_config.save_pretrained(folder)
        _save_tokenizer(folder, tokenizer, exported.config.n_positions)
        make_card(exported).save(folder / "README.md")


def _save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, n_positions: int) -> None:
    """Save the tokenizer so that transformers 4 loads it as well."""
    settings: dict[str, object] = {
        "model_max_length": n_positions,
        # transformers 5 writes the name of a class that older releases lack; every release has this one.
        "tokenizer_class": "PreTrainedTokenizerFast",
        # Otherwise transformers 4 returns token_type_ids, and GPT2LMHeadModel adds token 0's embedding everywhere.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    # GPT-2's own tokenizer names one, and CTranslate2 cannot open a model without; byte-level BPE never produces it.
    if tokenizer.unk_token is None and tokenizer.eos_token is not None:
        settings["unk_token"] = tokenizer.eos_token
    save_tokenizer(folder, tokenizer, **settings)


def load_tokenizer(name: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id; of an adapter that has none, its base model's.

    Raises:
        UserError: there is none.
    """
    register_auto_classes()
    name = _tokenizer_place(name)
    with explained(f"{name}: no tokenizer can be loaded from there", "save one there with tokenizer.save_pretrained"):
        if is_path(str(name)) and not Path(name).exists():  # transformers would look for it on the Hub
            raise FileNotFoundError("it does not exist")
        # Of a folder without a tokenizer transformers would ask the Hub.
        local = Path(name).is_dir()
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, local_files_only=local)
        # transformers makes a tokenizer with special tokens only for a folder without tokenizer files.
        words = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)
        if not words:
            raise ValueError("the vocabulary is empty")
    return tokenizer


def _tokenizer_place(model: str | Path) -> str | Path:
    """Where a model's tokenizer lies: of an adapter that was saved without one, with its base model."""
    has_own = not is_adapter(model) or any((Path(model) / name).exists() for name in TOKENIZER_FILES)
    return model if has_own else adapter_base(Path(model))


def check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Refuse a tokenizer with tokens for which the model has no row: its ids would end in an index error.

    Raises:
        UserError: it has.
    """
    text_config = config.get_text_config()
    rows = getattr(text_config, "unpadded_vocab_size", None) or text_config.vocab_size
    without_row = [token for token, id in tokenizer.get_vocab().items() if id >= rows]
    if not without_row:
        return
    problem = f"{name}: the tokenizer has {len(tokenizer)} tokens, the model {rows}"
    if not set(without_row) <= tokenizer.get_added_vocab().keys():
        raise UserError(f"{problem}: it belongs to another model; give the one that the model was trained with")
    code = (
        "from transformers import AutoModelForCausalLM as M; "
        f"m = M.from_pretrained({name!r}, trust_remote_code=True); "
        f"m.resize_token_embeddings({len(tokenizer)}); m.save_pretrained({name!r})"
    )
    raise UserError(
        f"{problem}: {', '.join(without_row[:3])} was added without a row; add it with "
        f"`{python_command(code)}`, or save the tokenizer without it"
    )


def open_model(
    name: str, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, from a run, a model folder, an adapter's folder, the Hub or another
    trainer's file.

    Args:
        dtype: of the weights, one of DTYPES; "auto" keeps the dtype they were saved in.
        trust_remote_code: run the model code that comes with the weights if transformers does not know the model.
    Raises:
        UserError: no such folder, no model in it, or not a causal language model with a tokenizer of its own.
    """
    register_auto_classes()
    path = find_model(name)
    as_gpt2 = functools.partial(from_gpt2, path, dtype=None if dtype == "auto" else getattr(torch, dtype))
    if Path(path).is_file() or is_adapter(path) or _is_of_2019(path):
        model = as_gpt2()
        tokenizer = tokenizer_for(path, model)
        check_tokenizer(path, tokenizer, model.config)
        return model, tokenizer
    with (
        _remote_code_lock() if trust_remote_code else contextlib.nullcontext(),
        explained(f"{name}: no model can be loaded from there", "give a folder of save_pretrained or a Hub id"),
    ):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        _check_size(config)
    tokenizer = load_tokenizer(path, trust_remote_code)  # before the weights, so that mistakes show early
    check_tokenizer(path, tokenizer, config)
    check_torch_files(Path(path))
    with (
        explained(f"{name}: not a causal language model with weights", "give one that AutoModelForCausalLM can load"),
        _without_warnings(),
    ):
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            generation_config=load_generation_defaults(path, config),
            trust_remote_code=trust_remote_code,
            key_mapping={WRAPPERS: ""},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    if _random_weights(loading_info) and config.model_type in (GPT2Config.model_type, GPT2ReproConfig.model_type):
        return as_gpt2(), tokenizer  # it knows more names of a tensor, and says which are missing
    _refuse_random_weights(name, loading_info)
    refuse_not_finite(name, dict(model.named_parameters()))
    unused = sorted(key for key in loading_info["unexpected_keys"] if not key.endswith(MASK_BUFFERS))
    if unused:
        note(f"{name} also holds {first_three(unused)}, which the language model does not use")
    return model, tokenizer


def _check_size(config: PreTrainedConfig) -> None:
    """Raise a ValueError for sizes of which the model alone would take all memory. Our own class checks them itself."""
    sizes = config.get_text_config()
    for name, bound in LARGEST_SIZES.items():
        size = getattr(sizes, name, None)
        if isinstance(size, int) and size > bound:
            raise ValueError(f"{name}={size} must be at most {bound}")


def _is_of_2019(path: str) -> bool:
    """Whether config.json is from before it named the type of the model; AutoConfig refuses it, from_gpt2 tries."""
    try:
        fields, _ = PreTrainedConfig.get_config_dict(path)
    except LIBRARY_ERRORS:  # AutoConfig says why
        return False
    return isinstance(fields, dict) and not fields.keys() & {"model_type", "auto_map"}


def _refuse_random_weights(name: str, loading_info: dict) -> None:
    """Refuse missing or misshapen tensors: transformers only warns, and initializes them at random."""
    random = _random_weights(loading_info)
    unused = sorted(loading_info["unexpected_keys"])
    if random:
        instead = f" and holds {first_three(unused)} instead" if unused else ""
        raise UserError(
            f"{name} lacks {len(random)} of the model's tensors, or has them in other shapes ({first_three(random)})"
            f"{instead}; save it again"
        )


def _random_weights(loading_info: dict) -> list[str]:
    misshapen = sorted(key for key, *_ in loading_info["mismatched_keys"])
    return sorted(loading_info["missing_keys"]) + misshapen


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep transformers from printing a table of missing and unexpected tensors; we say it in a line."""

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger = logging.getLogger(PreTrainedModel.__module__)
    logger.addFilter(is_error)
    try:
        yield
    finally:
        logger.removeFilter(is_error)


@contextlib.contextmanager
def _remote_code_lock() -> Iterator[None]:
    """One process at a time: transformers copies a model's code to where another process may be importing it."""
    folder = Path(dynamic_module_utils.HF_MODULES_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock").acquire()
    except OSError as error:
        raise UserError(
            f"--trust_remote_code copies the model's code to {folder}, which cannot be written ({first_line(error)}); "
            "set HF_MODULES_CACHE to a folder that can"
        ) from error
    with lock:
        yield


def tokenizer_for(path: str, model: PreTrainedModel, remedy: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder; for a checkpoint file with GPT-2's vocabulary size, GPT-2's; for an adapter
    without one, its base model's.

    Args:
        remedy: if there is none; None: conversion by publish.py.
    Raises:
        UserError: there is none.
    """
    path = str(_tokenizer_place(path))
    if not Path(path).is_file():
        return load_tokenizer(path)
    gpt2 = build_tokenizer("gpt2", [])
    if gpt2.vocab_size != model.config.unpadded_vocab_size:
        convert = f"convert it with `python publish.py {shlex.quote(path)} --tokenizer FOLDER --to ./FOLDER`"
        raise UserError(f"{path} has {model.config.unpadded_vocab_size} tokens and no tokenizer; {remedy or convert}")
    return gpt2.fast
