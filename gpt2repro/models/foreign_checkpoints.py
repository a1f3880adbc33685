"""Checkpoint files of other GPT-2 trainers, read without executing anything in them.

- nanoGPT's ckpt.pt (karpathy/nanoGPT: train.py saves, model.py defines): `model`, the state dict; `model_args`, the
  sizes, bias and dropout. The GELU is the exact one since pull request 274 (June 2023), before that the tanh one; the
  file does not tell, and the exact one is assumed. A padding row of its vocabulary is a token like any other there.
- build-nanogpt's log/model_*.pt (karpathy/build-nanogpt: train_gpt2.py): `model`; `config`, a dataclass GPTConfig of
  the script, for which `_GPTConfig` stands in. tanh GELU.
- llm.c's model .bin (karpathy/llm.c: write_model and write_tensors in train_gpt2.py, gpt2_write_to_checkpoint and
  fill_in_parameter_sizes in train_gpt2.cu): 256 int32 of header, then the tensors. tanh GELU.

All three keep their projections as nn.Linear does, (out, in), and under our names.
"""

import math
import pickle
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from gpt2repro.errors import UserError


# the fields of GPTConfig in all three, in the order of llm.c's header
SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
GPT2_VOCAB = 50257  # the last token, 50256, is <|endoftext|>
GPT2_VOCAB_PADDED = 50304  # nanoGPT's default, and build-nanogpt's choice

ZIP_MAGIC = b"PK\x03\x04"  # of torch.save's files since torch 1.6
LEGACY_MAGIC = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)  # and before
LLM_C_MAGIC = 20240326
LLM_C_DTYPES = {3: torch.float32, 5: torch.bfloat16}  # by version
LLM_C_HEADER_BYTES = 256 * 4
LLM_C_OTHERS = {
    20240327: "a debugging state",
    20240328: "a tokenizer",
    20240520: "a file of tokens",
    20240522: "a file of multiple-choice questions",
    20240527: "the optimizer's state, state_*.bin",
}


class _GPTConfig:
    """Takes the fields of build-nanogpt's GPTConfig out of the pickle, whatever they are."""


def read_checkpoint_file(path: str | Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Read a checkpoint of nanoGPT, build-nanogpt or llm.c; which of them, its content says.

    Returns:
        The fields of GPT2ReproConfig that the file determines; and the tensors by our parameter names, memory-mapped
        (a torch file from before 1.6 is read) and of the file's dtype, without lm_head.weight where it is tied.
    Raises:
        UserError: no file, none of the three formats, damaged, with objects that would have to be executed, or not
            complete.
    """
    try:
        with Path(path).open("rb") as file:
            head = file.read(LLM_C_HEADER_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the path of a checkpoint file") from error
    magic = int.from_bytes(head[:4], "little")
    if magic == LLM_C_MAGIC:
        return _read_llm_c(path, head)
    if magic in LLM_C_OTHERS:
        raise UserError(f"{path} is llm.c's, but {LLM_C_OTHERS[magic]}, not a model; give the model_*.bin of that run")
    if head.startswith((ZIP_MAGIC, LEGACY_MAGIC)):
        return _read_torch(path, mmap=head.startswith(ZIP_MAGIC))
    raise UserError(
        f"{path} is not a checkpoint; give nanoGPT's ckpt.pt, build-nanogpt's model_*.pt or llm.c's model_*.bin"
    )


def expected_shapes(fields: dict) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of a model with these fields of GPT2ReproConfig, without the tied lm_head."""
    width = (fields["n_embd"],)
    shapes = {
        "wte.weight": (fields["vocab_size"], *width),
        "wpe.weight": (fields["n_positions"], *width),
        **{f"h.{i}.{name}": s for i in range(fields["n_layer"]) for name, s in _block_shapes(fields).items()},
        "ln_f.weight": width,
        "ln_f.bias": width,
    }
    return {f"transformer.{name}": s for name, s in shapes.items() if fields["bias"] or not name.endswith(".bias")}


def check_tensors(fields: dict, shapes: dict[str, tuple[int, ...]], where: str) -> None:
    """Compare the shapes of a checkpoint's tensors with `expected_shapes(fields)`; it may hold lm_head.weight too.

    Raises:
        UserError: which tensors `where` lacks, has too many, or has in another shape.
    """
    expected = expected_shapes(fields)
    if "lm_head.weight" in shapes:
        expected["lm_head.weight"] = expected["transformer.wte.weight"]
    problems = _differences(shapes, expected) + [
        f"{name} has the shape {tuple(shapes[name])} instead of {shape}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    if problems:
        raise UserError(f"{where}: {_some(problems)}; give the complete checkpoint of an unmodified GPT-2")


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


def _read_torch(path: str | Path, mmap: bool) -> tuple[dict, dict[str, torch.Tensor]]:
    names = ("__main__.GPTConfig", "train_gpt2.GPTConfig")
    try:
        with torch.serialization.safe_globals([(_GPTConfig, name) for name in names]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # of a dozen types: whatever damaged bytes lead torch into
        if forbidden := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} holds {forbidden[1]}, which is not data and was not executed; "
                "save it again with tensors, numbers and strings only"
            ) from error
        raise UserError(f"{path} is damaged or not a checkpoint of torch.save; copy it again") from error

    keys = checkpoint if isinstance(checkpoint, dict) else {}
    if "model" in keys and isinstance(keys.get("model_args"), dict):
        args, activation_function = keys["model_args"], "gelu"
        _check_args(path, "model_args", args, (*SIZES, "bias", "dropout"))
    elif "model" in keys and isinstance(keys.get("config"), _GPTConfig):
        args, activation_function = vars(keys["config"]), "gelu_new"
        _check_args(path, "config", args, SIZES)
    else:
        raise UserError(
            f"{path} has the keys {_some([str(key) for key in keys]) or '(none)'}; give a checkpoint with model and "
            "model_args (nanoGPT) or with model and config, a GPTConfig (build-nanogpt)"
        )
    fields = _fields(path, args, args["vocab_size"], activation_function)

    state = keys["model"]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        for name, tensor in state.items()
    ):
        raise UserError(f"{path}: model is not a state dict of floating-point tensors; give an unmodified checkpoint")
    tensors = {
        re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor  # as DistributedDataParallel and torch.compile prefix it
        for name, tensor in state.items()
        if not name.endswith(".attn.bias")  # the causal mask, a buffer
    }
    check_tensors(fields, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, str(path))
    head, wte = tensors.get("lm_head.weight"), tensors["transformer.wte.weight"]
    if head is not None:
        if head.data_ptr() == wte.data_ptr() or torch.equal(head, wte):  # the first reads nothing
            del tensors["lm_head.weight"]
        else:
            fields["tie_word_embeddings"] = False
    return fields, tensors


def _read_llm_c(path: str | Path, head: bytes) -> tuple[dict, dict[str, torch.Tensor]]:
    size = Path(path).stat().st_size
    if size < LLM_C_HEADER_BYTES:
        raise UserError(f"{path} is truncated: {size:,} bytes are less than llm.c's header; copy it again")
    _, version, *sizes, rows = struct.unpack_from("<8i", head)
    if version not in LLM_C_DTYPES:
        raise UserError(
            f"{path} is a model of llm.c in version {version} of its format, but 3 (float32) and 5 (bfloat16) are "
            "read; write it anew with a current llm.c"
        )
    args = dict(zip(SIZES, sizes))
    fields = _fields(path, args, rows, "gelu_new")
    dtype, block = LLM_C_DTYPES[version], _block_shapes(fields)
    # counted before any list is made: a damaged header may ask for a billion layers
    count = sum(map(math.prod, expected_shapes(fields | {"n_layer": 0}).values()))
    count += fields["n_layer"] * sum(map(math.prod, block.values()))
    if size != (expected := LLM_C_HEADER_BYTES + count * dtype.itemsize):
        raise UserError(f"{path} has {size:,} bytes where its header asks for {expected:,}; copy it again")

    order = [
        *("transformer.wte.weight", "transformer.wpe.weight"),
        *(f"transformer.h.{i}.{name}" for name in block for i in range(fields["n_layer"])),
        *("transformer.ln_f.weight", "transformer.ln_f.bias"),
    ]
    shapes = expected_shapes(fields)
    numbers = torch.from_file(str(path), shared=False, size=size // dtype.itemsize, dtype=dtype)
    parts = numbers[-count:].split([math.prod(shapes[name]) for name in order])
    return fields, {name: part.view(shapes[name]) for name, part in zip(order, parts)}


def _check_args(path: str | Path, key: str, args: Mapping, expected: tuple[str, ...]) -> None:
    """Refuse a variant of the trainer: an option that is not known may change the function, not only the shapes."""
    if problems := _differences(args, expected):
        raise UserError(f"{path}, {key}: {_some(problems)}; give a checkpoint of the unmodified trainer")


def _fields(path: str | Path, args: Mapping, rows: int, activation_function: str) -> dict:
    """Fields of GPT2ReproConfig from `args`, nanoGPT's names, and the number of the embedding's rows."""
    bias, dropout = args.get("bias", True), args.get("dropout", 0.0)
    sizes = {name: args[name] for name in SIZES} | {"rows of the embedding": rows}
    wrong = {name: size for name, size in sizes.items() if type(size) is not int or size < 1}
    if not wrong and rows < args["vocab_size"]:
        wrong = {"vocab_size": args["vocab_size"], "rows of the embedding": rows}
    if not wrong and args["n_embd"] % args["n_head"]:
        wrong = {"n_embd": args["n_embd"], "n_head": args["n_head"]}
    if type(bias) is not bool:
        wrong["bias"] = bias
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        wrong["dropout"] = dropout
    if wrong:
        text = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        raise UserError(f"{path} says {text}, which no GPT-2 can have; give an undamaged checkpoint")

    is_gpt2 = args["vocab_size"] in (GPT2_VOCAB, GPT2_VOCAB_PADDED)
    eot_id = GPT2_VOCAB - 1 if is_gpt2 else None
    return {
        "vocab_size": rows,
        "unpadded_vocab_size": GPT2_VOCAB if is_gpt2 else args["vocab_size"],
        "n_positions": args["block_size"],
        "n_embd": args["n_embd"],
        "n_layer": args["n_layer"],
        "n_head": args["n_head"],
        "activation_function": activation_function,
        "bias": bias,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        **({name: dropout for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")} if "dropout" in args else {}),
    }


def _differences(names: Iterable, expected: Iterable[str]) -> list[str]:
    lacking = [name for name in expected if name not in names]
    unknown = [str(name) for name in names if name not in expected]
    return [f"{problem} {_some(some)}" for problem, some in (("lacks", lacking), ("holds unknown", unknown)) if some]


def _some(items: list[str]) -> str:
    """The first three, and how many there are besides."""
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
