"""Checkpoint files of other GPT-2 trainers, read without executing anything in them.

    format         file             model under   sizes under             GELU
    nanoGPT        ckpt.pt          "model"       "model_args", a dict    exact or tanh, see below
    build-nanogpt  log/model_*.pt   "model"       "config", a GPTConfig   tanh
    llm.c          model_*.bin      raw tensors   header of 256 int32     tanh

Sources: karpathy/nanoGPT, train.py and model.py; karpathy/build-nanogpt, train_gpt2.py; karpathy/llm.c, write_model and
write_tensors in train_gpt2.py, gpt2_write_to_checkpoint and fill_in_parameter_sizes in train_gpt2.cu.

nanoGPT uses the exact GELU since pull request 274 (June 2023) and used the tanh approximation before. Files from before
its `bias` option (January 2023) lack that field, so they have biases and tanh; for the others, which do not record the
GELU, the exact one is assumed. nanoGPT treats a padding row of its vocabulary like any other token.
All three store projections as nn.Linear does, (out, in), and under our parameter names.
"""

import math
import pickle
import re
import shlex
import struct
from collections.abc import Iterable
from pathlib import Path

import torch

from gpt2repro.errors import UserError
from gpt2repro.models.errors import named_code


SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")  # GPTConfig's, in the order of llm.c's header
NANOGPT_OPTIONS = ("bias", "dropout")  # its first releases lack bias
GPT2_VOCAB = 50257  # the last token, 50256, is <|endoftext|>
GPT2_VOCAB_PADDED = 50304  # nanoGPT's default and build-nanogpt's choice
# What DistributedDataParallel, torch.compile, FSDP and activation checkpointing put before or into a parameter's name.
WRAPPERS = r"(?<![^.])(?:(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
EMBEDDING = "wte.weight"
BASE_MODEL = ("wte.", "wpe.", "h.", "ln_f.")  # of GPT2Model, which is saved without the prefix `transformer.`
LANGUAGE_MODEL = ("transformer.", "lm_head.")
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")  # nanoGPT has one rate for all three

ZIP_MAGIC = b"PK\x03\x04"  # torch.save since torch 1.6
LEGACY_MAGIC = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)  # torch.save before
LLM_C_MAGIC = 20240326
LLM_C_DTYPES = {3: torch.float32, 5: torch.bfloat16}  # by format version
LLM_C_HEADER_BYTES = 256 * 4
LLM_C_OTHER_FILES = {
    20240327: "a debugging state",
    20240328: "a tokenizer",
    20240520: "a file of tokens",
    20240522: "a file of multiple-choice questions",
    20240527: "the optimizer's state, state_*.bin",
}


class _GPTConfig:
    """Stands in for build-nanogpt's GPTConfig while unpickling; accepts any fields."""


def read_checkpoint_file(path: str | Path, drop_heads: bool = False) -> tuple[dict, dict[str, torch.Tensor]]:
    """Read a checkpoint of nanoGPT, build-nanogpt or llm.c; the content tells which.

    Args:
        drop_heads: leave out tensors that are not part of a language model, e.g. a value head.
    Returns:
        The fields of GPT2ReproConfig that the file determines; and the tensors by our parameter names, in the file's
        dtype, memory-mapped (except for torch files from before 1.6), without lm_head.weight if it is tied.
    Raises:
        UserError: no such file, none of the three formats, damaged, incomplete, or a pickle of more than data.
    """
    try:
        with Path(path).open("rb") as file:
            head = file.read(LLM_C_HEADER_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the path of a checkpoint file") from error
    magic = int.from_bytes(head[:4], "little")
    if magic == LLM_C_MAGIC:
        return _read_llm_c(path, head)
    if magic in LLM_C_OTHER_FILES:
        kind = LLM_C_OTHER_FILES[magic]
        raise UserError(f"{path} is from llm.c, but {kind}, not a model; give the model_*.bin of that run")
    if head.startswith(ZIP_MAGIC):
        return _read_torch(path, mmap=True, drop_heads=drop_heads)
    if head.startswith(LEGACY_MAGIC):
        return _read_torch(path, mmap=False, drop_heads=drop_heads)
    if Path(path).suffix == ".safetensors":
        folder = Path(path).parent
        if (folder / "config.json").is_file():
            raise UserError(f"{path} is not what a model is opened by; give its folder, {folder}")
        raise UserError(f"{path} has weights only; put the model's config.json beside it and give the folder")
    raise UserError(
        f"{path} is not a checkpoint; give nanoGPT's ckpt.pt, build-nanogpt's model_*.pt or llm.c's model_*.bin"
    )


# ---- names and shapes ----


def parameter_names(keys: Iterable[str]) -> dict[str, str]:
    """Our names of a checkpoint's parameters -> its keys.

    What stands before the name of the token embedding, such as Lightning's `model.` or TRL's `pretrained_model.`, is
    left out of every key, if there is one token embedding only.
    """
    plain = {re.sub(WRAPPERS, "", key): key for key in keys}
    embeddings = [name for name in plain if re.search(rf"(?<![^.]){EMBEDDING}$", name)]
    prefix = embeddings[0].removesuffix(EMBEDDING).removesuffix("transformer.") if len(embeddings) == 1 else ""
    names = {}
    for name, key in plain.items():
        name = name.removeprefix(prefix)
        names[f"transformer.{name}" if name.startswith(BASE_MODEL) else name] = key
    return names


def expected_shapes(fields: dict) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of a model with these fields of GPT2ReproConfig, without the tied lm_head."""
    width = fields["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (fields["vocab_size"], width),
        "transformer.wpe.weight": (fields["n_positions"], width),
    }
    for i in range(fields["n_layer"]):
        for name, shape in _block_shapes(fields).items():
            shapes[f"transformer.h.{i}.{name}"] = shape
    shapes["transformer.ln_f.weight"] = (width,)
    shapes["transformer.ln_f.bias"] = (width,)
    if fields["bias"]:
        return shapes
    return {name: shape for name, shape in shapes.items() if not name.endswith(".bias")}


def check_tensors(fields: dict, shapes: dict[str, tuple[int, ...]], keys: dict[str, str], where: str) -> None:
    """Compare the shapes of a checkpoint's tensors with `expected_shapes(fields)`; lm_head.weight is optional.

    Args:
        shapes: by our parameter names.
        keys: what the checkpoint calls each of them, for the message.
        where: names the checkpoint in the message.
    Raises:
        UserError: tensors are missing, unknown or of another shape.
    """
    expected = expected_shapes(fields)
    if "lm_head.weight" in shapes:
        expected["lm_head.weight"] = expected["transformer.wte.weight"]
    problems = _tensor_problems(shapes, expected, keys)
    if not problems:
        return
    remedy = "give the complete checkpoint of an unmodified GPT-2"
    without_heads = {name: shape for name, shape in shapes.items() if name.startswith(LANGUAGE_MODEL)}
    if not _tensor_problems(without_heads, expected, keys):
        command = f"python publish.py {shlex.quote(where)} --drop_heads --to ./FOLDER"
        remedy = f"`{command}` leaves out what is not a language model's"
    raise UserError(f"{where}: {first_three(problems)}; {remedy}")


def _tensor_problems(shapes: dict, expected: dict[str, tuple[int, ...]], keys: dict[str, str]) -> list[str]:
    problems = _name_problems(shapes, expected, keys)
    for name, shape in expected.items():
        if name in shapes and tuple(shapes[name]) != shape:
            problems.append(f"{keys.get(name, name)} has the shape {tuple(shapes[name])} instead of {shape}")
    return problems


def _block_shapes(fields: dict) -> dict[str, tuple[int, ...]]:
    """The parameters of one block, in the order in which llm.c writes them."""
    width = fields["n_embd"]
    inner = fields.get("n_inner") or 4 * width
    return {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.c_attn.weight": (3 * width, width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (inner, width),
        "mlp.c_fc.bias": (inner,),
        "mlp.c_proj.weight": (width, inner),
        "mlp.c_proj.bias": (width,),
    }


# ---- nanoGPT and build-nanogpt: torch.save ----


def _read_torch(path: str | Path, mmap: bool, drop_heads: bool) -> tuple[dict, dict[str, torch.Tensor]]:
    checkpoint = load_pickle(path, mmap)
    fields = _torch_fields(path, checkpoint)
    state = _state_dict(path, checkpoint["model"])
    keys = parameter_names(state)
    if drop_heads:
        keys = {name: key for name, key in keys.items() if name.startswith(LANGUAGE_MODEL)}
    tensors = {name: state[key] for name, key in keys.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_tensors(fields, shapes, keys, str(path))
    head = tensors.get("lm_head.weight")
    if head is None:
        return fields, tensors
    embedding = tensors["transformer.wte.weight"]
    shares_memory = head.data_ptr() == embedding.data_ptr()  # comparing pointers first reads nothing from the disk
    if shares_memory or torch.equal(head, embedding):
        del tensors["lm_head.weight"]
    else:
        fields["tie_word_embeddings"] = False
    return fields, tensors


def load_pickle(path: str | Path, mmap: bool) -> dict:
    """The pickled dictionary; an empty one if the file holds something else.

    Raises:
        UserError: it is damaged, or holds more than data.
    """
    stand_ins = [(_GPTConfig, "__main__.GPTConfig"), (_GPTConfig, "train_gpt2.GPTConfig")]
    try:
        with torch.serialization.safe_globals(stand_ins):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damaged bytes make torch raise any of a dozen types
        code = named_code(error)
        if code:
            raise UserError(f"{path} {code}") from error
        raise UserError(f"{path} is damaged or not a checkpoint of torch.save; copy it again") from error
    return checkpoint if isinstance(checkpoint, dict) else {}


def _torch_fields(path: str | Path, checkpoint: dict) -> dict:
    """Tell nanoGPT's checkpoint from build-nanogpt's, and translate its sizes into fields of GPT2ReproConfig.

    A variant of either trainer is refused: an unknown option may change the function, not only the shapes.
    """
    if "model" in checkpoint and isinstance(checkpoint.get("model_args"), dict):
        args = checkpoint["model_args"]
        problems = _name_problems(args, SIZES, optional=NANOGPT_OPTIONS)
        key, activation_function = "model_args", "gelu" if "bias" in args else "gelu_new"
    elif "model" in checkpoint and isinstance(checkpoint.get("config"), _GPTConfig):
        args = vars(checkpoint["config"])
        problems = _name_problems(args, SIZES)
        key, activation_function = "config", "gelu_new"
    else:
        keys = first_three([str(key) for key in checkpoint]) or "(none)"
        raise UserError(
            f"{path} has the keys {keys}; give a checkpoint with model and model_args (nanoGPT) or with model and "
            "config, a GPTConfig (build-nanogpt); weights alone need the model's config.json beside them, in a folder"
        )
    if problems:
        raise UserError(f"{path}, {key}: {first_three(problems)}; give a checkpoint of the unmodified trainer")
    return _fields(path, args, args["vocab_size"], activation_function)


def _state_dict(path: str | Path, state: dict) -> dict[str, torch.Tensor]:
    """The parameters by the file's keys, without mask buffers."""
    is_state_dict = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        for name, tensor in state.items()
    )
    if not is_state_dict:
        raise UserError(f"{path}: model is not a state dict of floating-point tensors; give an unmodified checkpoint")
    return {key: tensor for key, tensor in state.items() if not key.endswith(".attn.bias")}  # the causal mask


# ---- llm.c ----


def _read_llm_c(path: str | Path, head: bytes) -> tuple[dict, dict[str, torch.Tensor]]:
    file_size = Path(path).stat().st_size
    if file_size < LLM_C_HEADER_BYTES:
        raise UserError(f"{path} is truncated: {file_size:,} bytes are less than llm.c's header; copy it again")
    _, version, *sizes, rows = struct.unpack_from("<8i", head)
    if version not in LLM_C_DTYPES:
        raise UserError(
            f"{path} is a model of llm.c in version {version} of its format; only versions 3 (float32) and 5 "
            "(bfloat16) can be read; write it again with a current llm.c"
        )
    fields = _fields(path, dict(zip(SIZES, sizes)), rows, "gelu_new")
    dtype = LLM_C_DTYPES[version]
    numel = _count_parameters(fields)
    expected_size = LLM_C_HEADER_BYTES + numel * dtype.itemsize
    if file_size != expected_size:
        raise UserError(f"{path} has {file_size:,} bytes, but its header asks for {expected_size:,}; copy it again")

    shapes = expected_shapes(fields)
    names = _llm_c_order(fields)
    numbers = torch.from_file(str(path), shared=False, size=file_size // dtype.itemsize, dtype=dtype)
    parameters = numbers[-numel:].split([math.prod(shapes[name]) for name in names])
    return fields, {name: flat.view(shapes[name]) for name, flat in zip(names, parameters)}


def _count_parameters(fields: dict) -> int:
    """Counted without listing every layer: a damaged header may ask for a billion of them."""
    outside_blocks = expected_shapes({**fields, "n_layer": 0})
    per_block = _block_shapes(fields)
    count = sum(math.prod(shape) for shape in outside_blocks.values())
    return count + fields["n_layer"] * sum(math.prod(shape) for shape in per_block.values())


def _llm_c_order(fields: dict) -> list[str]:
    """Parameter names in the order of the file: each parameter of a block for all layers, then the next."""
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    for name in _block_shapes(fields):
        names += [f"transformer.h.{i}.{name}" for i in range(fields["n_layer"])]
    return [*names, "transformer.ln_f.weight", "transformer.ln_f.bias"]


# ---- all three ----


def _fields(path: str | Path, args: dict, rows: int, activation_function: str) -> dict:
    """Fields of GPT2ReproConfig from `args` under nanoGPT's names and the number of embedding rows."""
    _check_values(path, args, rows)
    is_gpt2_vocabulary = args["vocab_size"] in (GPT2_VOCAB, GPT2_VOCAB_PADDED)
    eot_id = GPT2_VOCAB - 1 if is_gpt2_vocabulary else None
    fields = {
        "vocab_size": rows,
        "unpadded_vocab_size": GPT2_VOCAB if is_gpt2_vocabulary else args["vocab_size"],
        "n_positions": args["block_size"],
        "n_embd": args["n_embd"],
        "n_layer": args["n_layer"],
        "n_head": args["n_head"],
        "activation_function": activation_function,
        "bias": args.get("bias", True),
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
    }
    if "dropout" in args:
        fields |= dict.fromkeys(DROPOUTS, args["dropout"])
    return fields


def _check_values(path: str | Path, args: dict, rows: int) -> None:
    sizes = {name: args[name] for name in SIZES}
    sizes["rows of the embedding"] = rows
    wrong = {name: size for name, size in sizes.items() if type(size) is not int or size < 1}
    if not wrong and rows < args["vocab_size"]:
        wrong = {"vocab_size": args["vocab_size"], "rows of the embedding": rows}
    if not wrong and args["n_embd"] % args["n_head"]:
        wrong = {"n_embd": args["n_embd"], "n_head": args["n_head"]}
    bias, dropout = args.get("bias", True), args.get("dropout", 0.0)
    if type(bias) is not bool:
        wrong["bias"] = bias
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        wrong["dropout"] = dropout
    if wrong:
        values = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        raise UserError(f"{path} says {values}, which is not a valid GPT-2; give an undamaged checkpoint")


def _name_problems(
    names: Iterable, expected: Iterable[str], keys: dict[str, str] | None = None, optional: Iterable[str] = ()
) -> list[str]:
    """Which of the `expected` names are missing, and which names are unknown.

    Args:
        keys: what the checkpoint calls a name, if something else.
        optional: names that may be missing.
    """
    problems = []
    missing = [name for name in expected if name not in names]
    if missing:
        problems.append(f"lacks {first_three(missing)}")
    keys = keys or {}
    unknown = [keys.get(name, str(name)) for name in names if name not in expected and name not in optional]
    if unknown:
        problems.append(f"holds unknown {first_three(unknown)}")
    return problems


def first_three(items: list[str]) -> str:
    """The first three, and how many more there are."""
    shown = ", ".join(items[:3])
    return shown if len(items) <= 3 else f"{shown} and {len(items) - 3} more"
