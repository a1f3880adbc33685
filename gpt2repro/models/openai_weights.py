"""OpenAI's GPT-2, and whatever else is a GPT-2: into our model and back, bit for bit.

transformers' GPT2LMHeadModel keeps its projections as Conv1D, (in, out); ours are nn.Linear, (out, in), so four
weights a block are transposed. Our vocabulary has padding rows, which are 0 here and cut off on the way back. All else
is equal.
"""

import contextlib
import copy
import functools
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel

from gpt2repro.data.tokenization import padded_vocab_size
from gpt2repro.errors import UserError, explained, first_line
from gpt2repro.models.foreign_checkpoints import check_tensors, read_checkpoint_file
from gpt2repro.models.unwrap import unwrapped
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM


VOCABULARY = ("transformer.wte.weight", "lm_head.weight")
PROJECTIONS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu")  # the first two are one function; the third is nanoGPT's
BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks that older releases of transformers saved
SHARED_FIELDS = (
    *("n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function", "layer_norm_epsilon"),
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "initializer_range", "use_cache", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
Tensors = dict[str, Callable[[], torch.Tensor]]  # parameter name of ours -> reads it, projections (out, in)


def gpt2_config(source: str | Path, revision: str | None = None) -> GPT2ReproConfig:
    """The configuration of `from_gpt2(source)`, without reading weights.

    Raises:
        UserError: there is none, or the model is not GPT-2's architecture.
    """
    with explained(f"{source}: its configuration is not valid", "mend it, or give another model"):
        if Path(source).is_file():
            fields = read_checkpoint_file(source)[0]
        else:
            stored = _stored_config(source, revision)
            if stored.get("model_type") == GPT2ReproConfig.model_type:
                return GPT2ReproConfig.from_dict(stored)
            theirs = GPT2Config.from_dict(_refuse_other_architectures(source, stored))
            fields = {name: getattr(theirs, name) for name in SHARED_FIELDS}
            fields |= {"unpadded_vocab_size": theirs.vocab_size}
        return GPT2ReproConfig(**fields | {"vocab_size": padded_vocab_size(fields["unpadded_vocab_size"])})


def from_gpt2(
    source: str | Path,
    config: GPT2ReproConfig | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> GPT2ReproForCausalLM:
    """A GPT-2 of somebody else's as our model, on the CPU and in eval mode.

    Tensors are read one by one, so the peak memory is that of the model and little more.

    Args:
        source: gpt2, gpt2-medium, gpt2-large, gpt2-xl or any other Hub id or folder of a GPT2LMHeadModel; or a file:
            nanoGPT's ckpt.pt, build-nanogpt's model_*.pt, llm.c's .bin.
        config: `gpt2_config(source)`, perhaps with other dropout or fewer n_positions, which crops the position
            embeddings (nanoGPT's crop_block_size).
        dtype: of the weights; None keeps the checkpoint's.
        revision: of a Hub id.
    Raises:
        UserError: no such checkpoint, a damaged one, or a model that is not GPT-2's architecture.
    """
    stored = gpt2_config(source, revision)
    config = copy.copy(config or stored)
    fixed = (*SHARED_FIELDS[1:7], "bias", "unpadded_vocab_size")
    if config.n_positions > stored.n_positions or any(getattr(config, f) != getattr(stored, f) for f in fixed):
        raise ValueError(f"the configuration is not that of {source}, which may differ in dropout and n_positions only")
    tensors = _tensors_of_file(source) if Path(source).is_file() else _tensors_of_folder(source, revision, stored)
    head, embedding = tensors.get("lm_head.weight"), tensors["transformer.wte.weight"]
    config.tie_word_embeddings = head is None or torch.equal(head(), embedding())
    dtypes = {read().dtype for read in tensors.values()}
    if not all(kind.is_floating_point for kind in dtypes):
        raise UserError(f"{source} holds {', '.join(map(str, dtypes))} weights; give a model that is not quantized")
    config.dtype = dtype or functools.reduce(torch.promote_types, dtypes)
    with torch.device("meta"):
        model = GPT2ReproForCausalLM(config)
    state = {}
    # The largest first: while it is copied, it is in memory twice.
    for name, parameter in sorted(model.named_parameters(), key=lambda item: -item[1].numel()):
        rows = config.unpadded_vocab_size if name in VOCABULARY else len(parameter)
        state[name] = torch.zeros(parameter.shape, dtype=config.dtype)
        state[name][:rows] = tensors[name]()[:rows]
    model.load_state_dict(state, assign=True, strict=not config.tie_word_embeddings)
    model.tie_weights()
    if not Path(source).is_file():
        with contextlib.suppress(OSError):  # few have one
            model.generation_config = GenerationConfig.from_pretrained(source, revision=revision)
    return model.eval()


@torch.no_grad()
def to_gpt2(model: PreTrainedModel) -> GPT2LMHeadModel:
    """Our model as transformers' own, on the CPU and without padding rows: it loads anywhere, with no code of ours.

    Biases that our model does not have (bias=False) become zeros, which is the same function.
    """
    model = unwrapped(model)
    fields = {name: getattr(model.config, name) for name in SHARED_FIELDS}
    fields |= {"vocab_size": model.config.unpadded_vocab_size, "dtype": model.dtype}
    fields["n_ctx"] = fields["n_positions"]  # an old name of it, by which llama.cpp's converter asks
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config(**fields))
    ours, state = model.state_dict(), {}
    for name, theirs in gpt2.named_parameters():
        absent = name.endswith(".bias") and not model.config.bias
        tensor = torch.zeros(theirs.shape, dtype=model.dtype) if absent else ours[name]
        tensor = tensor.T if name.endswith(PROJECTIONS) else tensor
        state[name] = tensor[: len(theirs)].cpu().clone(memory_format=torch.contiguous_format)
    gpt2.load_state_dict(state, assign=True, strict=not gpt2.config.tie_word_embeddings)
    gpt2.tie_weights()
    gpt2.generation_config = model.generation_config
    return gpt2.eval()


def _stored_config(source: str | Path, revision: str | None) -> dict:
    with explained(f"{source}: no model can be loaded from there", "give a Hub id or a folder of a GPT-2"):
        stored, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        if not stored:  # what transformers makes of a folder without one
            raise OSError("no config.json")
        return stored


def _refuse_other_architectures(source: str | Path, stored: dict) -> dict:
    fields = GPT2Config().to_dict() | stored
    problems = [
        problem
        for problem, found in {
            f"is a {fields['model_type']} model": fields["model_type"] != GPT2Config.model_type,
            f"has activation_function={fields['activation_function']}": fields["activation_function"] not in GELUS,
            "scales its attention by layer (scale_attn_by_inverse_layer_idx)": fields[
                "scale_attn_by_inverse_layer_idx"
            ],
            "does not scale its attention (scale_attn_weights)": not fields["scale_attn_weights"],
            "has cross-attention (add_cross_attention)": fields["add_cross_attention"],
            "is quantized (quantization_config)": "quantization_config" in fields,
        }.items()
        if found
    ]
    if problems:
        raise UserError(f"{source} {' and '.join(problems)}: that is not GPT-2's architecture; give a GPT2LMHeadModel")
    return stored


def _tensors_of_file(path: str | Path) -> Tensors:
    return {name: _constant(tensor) for name, tensor in read_checkpoint_file(path)[1].items()}


def _tensors_of_folder(source: str | Path, revision: str | None, config: GPT2ReproConfig) -> Tensors:
    """Readers of a model folder's tensors under our names. A GPT2LMHeadModel's may have been saved by any release of
    transformers: with or without the `transformer.` prefix, the mask buffers, and the head."""
    conv1d = _stored_config(source, revision).get("model_type") != GPT2ReproConfig.model_type
    tensors, shapes = {}, {}
    for file in _weight_files(source, revision):
        for key, shape, read in _stored_tensors(file):
            if key.endswith(BUFFERS):
                continue
            name = key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}"
            transposed = conv1d and name.endswith(PROJECTIONS)
            shapes[name] = tuple(reversed(shape)) if transposed else shape
            tensors[name] = _transposed(read) if transposed else read
    fields = config.to_dict()
    if conv1d:
        fields["vocab_size"] = fields["unpadded_vocab_size"]
    if not fields["tie_word_embeddings"] and "lm_head.weight" not in shapes:
        raise UserError(f"{source} lacks lm_head.weight, but its config.json says tie_word_embeddings=false; mend one")
    check_tensors(fields, shapes, str(source))
    return tensors


def _weight_files(source: str | Path, revision: str | None) -> list[Path]:
    """The files of a checkpoint in a folder or on the Hub: safetensors, or what torch saved before there were such."""
    for weights in ("model.safetensors", "pytorch_model.bin"):
        pattern = weights.replace(".", "*.")  # of the shards
        folder = Path(source)
        if not folder.is_dir():
            with explained(f"{source}: weights cannot be had from the Hub", "check the name and the network"):
                folder = Path(
                    snapshot_download(str(source), revision=revision, allow_patterns=[weights, pattern + "*"])
                )
        if (folder / weights).is_file():
            return [folder / weights]
        if (index := folder / f"{weights}.index.json").is_file():
            with explained(f"{index} is damaged", "fetch it again"):
                return sorted({folder / shard for shard in json.loads(index.read_text())["weight_map"].values()})
    raise UserError(f"{source} holds no weights: neither model.safetensors nor pytorch_model.bin is there")


def _constant(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor


def _transposed(read: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    return lambda: read().T


def _stored_tensors(file: Path) -> list[tuple[str, tuple[int, ...], Callable[[], torch.Tensor]]]:
    """(key, shape, read) of each tensor in a file; safetensors are opened anew for each, so that no more than one
    tensor's pages of the file are in memory."""

    def read_safetensors(key: str) -> torch.Tensor:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(key)

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
            return [(key, shape, functools.partial(read_safetensors, key)) for key, shape in shapes.items()]
        # Files from before torch 1.6, OpenAI's own on the Hub among them, cannot be mapped.
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        return [(key, tuple(tensor.shape), _constant(tensor)) for key, tensor in stored.items()]
    except (OSError, EOFError, SafetensorError, RuntimeError, pickle.UnpicklingError, AttributeError) as error:
        raise UserError(f"{file} is damaged or no checkpoint ({first_line(error)}); fetch it again") from error
