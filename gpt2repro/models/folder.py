"""Model folders: what `from_pretrained` opens, and what is pushed to the Hub."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import ModelCard
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    dynamic_module_utils,
)

from gpt2repro.data.tokenization import build_tokenizer
from gpt2repro.errors import UserError
from gpt2repro.models.errors import explained
from gpt2repro.models.openai_weights import from_gpt2


def find_model(name: str) -> str:
    """The model that a user means by `name`: a run's model folder, a model folder, a file of another trainer's, or else
    a Hub id.

    Raises:
        UserError: a folder without a model in it, or neither a file, a folder nor a Hub id.
    """
    folder = Path(name)
    for candidate in (folder / "model", folder):
        if (candidate / "config.json").is_file():
            return str(candidate)
    if folder.is_file():
        return name
    if folder.exists():
        checkpoints = [str(path) for path in sorted(folder.glob("checkpoints/step_*"))]
        unfinished = f" (an unfinished run; its newest checkpoint is {checkpoints[-1]})" if checkpoints else ""
        raise UserError(f"{name} holds no model: neither config.json nor model/config.json is there{unfinished}")
    if name.count("/") > 1 or name.startswith((".", "/")):
        raise UserError(f"{name} does not exist; give a model folder, a run folder or a Hub id")
    return name


def save_model_folder(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: ModelCard,
    picture: Path | None = None,
) -> None:
    """Write weights, code, tokenizer, generation defaults, model card and the picture of the loss, complete or not at
    all. The model is a plain one: see `unwrapped`."""
    temporary = folder.with_name("writing_" + folder.name)
    shutil.rmtree(temporary, ignore_errors=True)
    config = model.config
    if model.generation_config._from_model_config:  # nobody has chosen one
        model.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, do_sample=True, top_k=50
        )
    model.save_pretrained(temporary)
    tokenizer.model_max_length = config.n_positions
    tokenizer.save_pretrained(temporary)
    # transformers 5 names a class that older releases do not know; this one all of them do.
    settings = temporary / "tokenizer_config.json"
    written = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    # Else transformers 4 adds token_type_ids, and GPT2LMHeadModel adds the embedding of token 0 to every position.
    written["model_input_names"] = ["input_ids", "attention_mask"]
    for key in ("backend", "is_local", "local_files_only"):  # its notes to itself
        written.pop(key, None)
    settings.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    card.save(temporary / "README.md")
    if picture:
        shutil.copy(picture, temporary / "loss.png")
    shutil.rmtree(folder, ignore_errors=True)  # an earlier export of the same run
    temporary.rename(folder)


def load_tokenizer(name: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id.

    Raises:
        UserError: there is none.
    """
    with explained(f"{name}: no tokenizer can be loaded from there", "save one there with tokenizer.save_pretrained"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
            raise ValueError("the vocabulary is empty")  # what transformers makes of a folder without tokenizer files
    return tokenizer


def open_model(
    name: str, dtype: str | torch.dtype = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, from a run, a model folder or the Hub.

    Args:
        dtype: of the weights; "auto" is the one they were saved in.
        trust_remote_code: run the model code that comes with the weights, where transformers knows no such model.
    Raises:
        UserError: no such folder, no model in it, or not a causal language model with a tokenizer.
    """
    path = find_model(name)
    if Path(path).is_file():
        model = from_gpt2(path, dtype=None if dtype == "auto" else dtype)
        return model, tokenizer_for(path, model)
    with (
        _alone_with_remote_code() if trust_remote_code else contextlib.nullcontext(),
        explained(f"{name}: no model can be loaded from there", "give a folder of save_pretrained or a Hub id"),
    ):
        AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(path, trust_remote_code)  # before the weights, so that mistakes show early
    with explained(f"{name}: not a causal language model with weights", "give one that AutoModelForCausalLM can load"):
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    # transformers would warn, and draw these at random
    absent = sorted(found["missing_keys"]) + sorted(key for key, *_ in found["mismatched_keys"])
    if absent:
        raise UserError(
            f"{name} lacks {len(absent)} of the model's tensors, or has them in other shapes "
            f"({', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}); save it again"
        )
    return model, tokenizer


@contextlib.contextmanager
def _alone_with_remote_code() -> Iterator[None]:
    """One process at a time: transformers copies a model's code to where another may just be importing it."""
    folder = Path(dynamic_module_utils.HF_MODULES_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        yield


def tokenizer_for(path: str, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a model, or GPT-2's for a checkpoint file with GPT-2's number of tokens.

    Raises:
        UserError: there is none.
    """
    if not Path(path).is_file():
        return load_tokenizer(path)
    gpt2 = build_tokenizer("gpt2", [])
    if gpt2.vocab_size != model.config.unpadded_vocab_size:
        raise UserError(
            f"{path} has {model.config.unpadded_vocab_size} tokens and no tokenizer; convert it with "
            f"`python publish.py {path} --tokenizer FOLDER --to ./FOLDER`"
        )
    return gpt2.fast


def encode_prompt(prompt: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """(1, T) token ids on the model's device; an empty prompt is the beginning of a document.

    Raises:
        UserError: the tokenizer knows nothing of the prompt, or it fills all positions of the model.
    """
    ids = tokenizer(prompt or tokenizer.bos_token or "\n", return_tensors="pt").input_ids.to(model.device)
    positions = getattr(model.config, "max_position_embeddings", None)
    if not ids.numel():
        raise UserError(f"the tokenizer has no token for the prompt {prompt!r}; use characters of its corpus")
    if positions and ids.shape[1] >= positions:
        raise UserError(f"the prompt has {ids.shape[1]} tokens, the model only {positions} positions; shorten it")
    return ids.long()


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    seed: int,
    **options,
) -> str:
    """The prompt and a continuation, drawn from the 50 likeliest tokens unless `options` of model.generate say else.

    It ends at the model's last position at the latest. The random state that training uses is left as it was.
    """
    was_training = model.training
    model.eval()
    ids = encode_prompt(prompt, model, tokenizer)
    positions = getattr(model.config, "max_position_embeddings", None) or ids.shape[1] + max_new_tokens
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(max_new_tokens, positions - ids.shape[1]),
            pad_token_id=tokenizer.eos_token_id,
            **{"do_sample": True, "top_k": 50} | options,
        )
    model.train(was_training)
    return tokenizer.decode(output[0], skip_special_tokens=True)
