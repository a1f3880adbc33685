"""Any GPT-2 checkpoint into our model, and our model into transformers' GPT2LMHeadModel, bit for bit.

    stored = open_gpt2("openai-community/gpt2")     # reads the configuration
    model = stored.build(dtype=torch.float32)       # reads the weights
    gpt2 = to_gpt2(model)

GPT2LMHeadModel stores its projections as Conv1D, (in, out); ours are nn.Linear, (out, in), so four weights per block
are transposed. Everything else is identical: a model that is opened has no padding rows, even if its checkpoint has.
Only who trains it asks for them, with `stored.build(padded(stored.config))`; they are zeros.
"""

import copy
import dataclasses
import functools
import inspect
import json
import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel

from gpt2repro.errors import UserError, first_line
from gpt2repro.models.errors import explained, python_command
from gpt2repro.models.find import ADAPTED_OR_NOT, ADAPTER_CONFIG, WEIGHT_FILES, adapter_base, is_adapter
from gpt2repro.models.foreign_checkpoints import (
    LANGUAGE_MODEL,
    check_tensors,
    first_three,
    load_pickle,
    parameter_names,
    read_checkpoint_file,
)
from gpt2repro.models.generation_defaults import load_generation_defaults
from gpt2repro.models.lora import merge_adapter
from gpt2repro.models.padding import EMBEDDINGS, unpadded
from gpt2repro.models.unwrap import unwrapped
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM


PROJECTIONS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh")  # two names of GPT-2's
GELUS = (*TANH_GELUS, "gelu")  # the third is nanoGPT's
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks that older releases of transformers saved

# Fields that GPT2Config and GPT2ReproConfig share. The first group fixes the function that the weights compute.
ARCHITECTURE = ("n_embd", "n_layer", "n_head", "n_inner", "activation_function", "layer_norm_epsilon")
SHARED_FIELDS = (
    *ARCHITECTURE,
    *("n_positions", "resid_pdrop", "embd_pdrop", "attn_pdrop", "initializer_range", "use_cache"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint; `read()` loads it, so that shapes can be checked before any weight is read."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "StoredTensor":
        """A tensor that torch has loaded or memory-mapped already."""
        return cls(tuple(tensor.shape), lambda: tensor)

    def transposed(self) -> "StoredTensor":
        return StoredTensor(tuple(reversed(self.shape)), lambda: self.read().T)


@dataclass(frozen=True)
class StoredGPT2:
    """A GPT-2 checkpoint whose configuration is known and whose weights `build` reads. Made by `open_gpt2`.

    source, revision: what `open_gpt2` was asked for.
    config: the checkpoint's configuration, without padding rows.
    open_tensors: locates the weights, on the Hub by downloading them; returns the tensors by our parameter names,
        projections (out, in).
    """

    source: str | Path
    revision: str | None
    config: GPT2ReproConfig
    open_tensors: Callable[[], dict[str, StoredTensor]]

    def build(self, config: GPT2ReproConfig | None = None, dtype: torch.dtype | None = None) -> GPT2ReproForCausalLM:
        """The checkpoint as our model, on the CPU and in eval mode.

        Tensors are read one by one, so peak memory is little more than the size of the model.

        Args:
            config: `self.config`, possibly `padded`, with other dropout, or with a smaller n_positions, which crops the
                position embeddings (nanoGPT's crop_block_size).
            dtype: of the weights; None keeps the checkpoint's.
        Raises:
            UserError: the weights are missing, damaged, quantized or not finite.
            ValueError: `config` describes another architecture.
        """
        config = copy.copy(config or self.config)
        self._check_architecture(config)
        tensors = self.open_tensors()
        config.tie_word_embeddings = _is_tied(tensors)
        config.dtype = dtype or self._widest_dtype(tensors)
        with torch.device("meta"):
            model = GPT2ReproForCausalLM(config)
        weights = _read_weights(model, tensors)
        refuse_not_finite(str(self.source), weights)
        model.load_state_dict(weights, assign=True, strict=not config.tie_word_embeddings)
        model.tie_weights()
        if not Path(self.source).is_file():
            model.generation_config = load_generation_defaults(self.source, config, self.revision)
        return model.eval()

    def _check_architecture(self, config: GPT2ReproConfig) -> None:
        fixed = (*ARCHITECTURE, "bias", "unpadded_vocab_size")
        is_same = all(getattr(config, field) == getattr(self.config, field) for field in fixed)
        if not is_same or config.n_positions > self.config.n_positions:
            raise ValueError(
                f"the configuration does not match {self.source}; only dropout and a smaller n_positions may differ"
            )

    def _widest_dtype(self, tensors: dict[str, StoredTensor]) -> torch.dtype:
        dtypes = {tensor.read().dtype for tensor in tensors.values()}
        if not all(dtype.is_floating_point for dtype in dtypes):
            names = ", ".join(map(str, dtypes))
            raise UserError(f"{self.source} holds {names} weights; give a model that is not quantized")
        return functools.reduce(torch.promote_types, dtypes)


def open_gpt2(source: str | Path, revision: str | None = None, drop_heads: bool = False) -> StoredGPT2:
    """Open a GPT-2 checkpoint: its configuration is read now, its weights when it is built.

    A checkpoint file is loaded once, memory-mapped where its format allows.

    Args:
        source: gpt2, gpt2-medium, gpt2-large, gpt2-xl or any other Hub id or folder of a GPT2LMHeadModel or of our
            model; or a file: nanoGPT's ckpt.pt, build-nanogpt's model_*.pt, llm.c's model_*.bin; or the folder of an
            adapter, which is merged into its base model when that is built.
        revision: branch, tag or commit of a Hub id.
        drop_heads: leave out tensors that are not part of a language model: value heads, classification heads.
    Raises:
        UserError: no such checkpoint, a damaged one, or not GPT-2's architecture.
    """
    with explained(f"{source}: its configuration is not valid", "correct it, or give another model"):
        if Path(source).is_file():
            fields, tensors = read_checkpoint_file(source, drop_heads)
            stored_tensors = {name: StoredTensor.of(tensor) for name, tensor in tensors.items()}
            return StoredGPT2(source, revision, unpadded(GPT2ReproConfig(**fields)), lambda: stored_tensors)
        if is_adapter(source):
            return _open_adapter(Path(source), drop_heads)
        stored_fields = _read_config(source, revision)
        is_ours = stored_fields.get("model_type") == GPT2ReproConfig.model_type
        config = _our_config(stored_fields) if is_ours else _converted_config(source, stored_fields)
        open_tensors = functools.partial(_open_folder, source, revision, config, is_ours, drop_heads)
        return StoredGPT2(source, revision, unpadded(config), open_tensors)


def from_gpt2(
    source: str | Path,
    config: GPT2ReproConfig | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    drop_heads: bool = False,
) -> GPT2ReproForCausalLM:
    """`open_gpt2(source)`, built: see there and `StoredGPT2.build` for arguments and errors."""
    return open_gpt2(source, revision, drop_heads).build(config, dtype)


@torch.no_grad()
def to_gpt2(model: PreTrainedModel) -> GPT2LMHeadModel:
    """Our model as transformers' own, on the CPU and without padding rows: it loads anywhere, without our code.

    Biases that our model lacks (bias=False) become zeros, which computes the same function.
    """
    model = unwrapped(model)
    fields = {name: getattr(model.config, name) for name in SHARED_FIELDS}
    fields["vocab_size"] = model.config.unpadded_vocab_size
    fields["dtype"] = model.dtype
    fields["n_ctx"] = fields["n_positions"]  # its old name, which llama.cpp's converter reads
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config(**fields))
    ours = model.state_dict()
    weights = {}
    for name, parameter in gpt2.named_parameters():
        if name.endswith(".bias") and not model.config.bias:
            tensor = torch.zeros(parameter.shape, dtype=model.dtype)
        elif name.endswith(PROJECTIONS):
            tensor = ours[name].T
        else:
            tensor = ours[name]
        real_rows = tensor[: len(parameter)]
        weights[name] = real_rows.cpu().clone(memory_format=torch.contiguous_format)
    gpt2.load_state_dict(weights, assign=True, strict=not gpt2.config.tie_word_embeddings)
    gpt2.tie_weights()
    gpt2.generation_config = model.generation_config
    return gpt2.eval()


def _open_adapter(folder: Path, drop_heads: bool) -> StoredGPT2:
    """The model that an adapter was trained on, with the adapter merged into its weights."""
    base = open_gpt2(adapter_base(folder), drop_heads=drop_heads)

    def open_merged() -> dict[str, StoredTensor]:
        merged = merge_adapter(base.build(), str(base.source), folder)
        return {name: StoredTensor.of(parameter.detach()) for name, parameter in merged.named_parameters()}

    return dataclasses.replace(base, open_tensors=open_merged)


# ---- configuration ----


def _read_config(source: str | Path, revision: str | None) -> dict:
    with explained(f"{source}: no model can be loaded from there", "give a Hub id or a folder of a GPT-2"):
        fields, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        if not fields:  # transformers returns an empty dict for a folder without one
            raise OSError("no config.json")
        return fields


def _our_config(stored_fields: dict) -> GPT2ReproConfig:
    """Its own fields only: a stranger's auto_map would name the code that whoever opens our export runs."""
    own = inspect.get_annotations(GPT2ReproConfig)
    return GPT2ReproConfig.from_dict({name: value for name, value in stored_fields.items() if name in own})


def _converted_config(source: str | Path, stored_fields: dict) -> GPT2ReproConfig:
    _check_is_gpt2(source, stored_fields)
    theirs = GPT2Config.from_dict(stored_fields)
    fields = {name: getattr(theirs, name) for name in SHARED_FIELDS}
    return GPT2ReproConfig(vocab_size=theirs.vocab_size, unpadded_vocab_size=theirs.vocab_size, **fields)


def _check_is_gpt2(source: str | Path, stored_fields: dict) -> None:
    fields = {**GPT2Config().to_dict(), **stored_fields}
    problems = []
    if fields["model_type"] != GPT2Config.model_type:
        problems.append(f"is a {fields['model_type']} model")
    if fields["activation_function"] not in GELUS:
        problems.append(f"has activation_function={fields['activation_function']}")
    if fields["scale_attn_by_inverse_layer_idx"]:
        problems.append("scales its attention by layer (scale_attn_by_inverse_layer_idx)")
    if not fields["scale_attn_weights"]:
        problems.append("does not scale its attention (scale_attn_weights)")
    if fields["add_cross_attention"]:
        problems.append("has cross-attention (add_cross_attention)")
    if "quantization_config" in fields:
        problems.append("is quantized (quantization_config)")
    if problems:
        raise UserError(f"{source} {' and '.join(problems)}: not GPT-2's architecture; give a GPT2LMHeadModel")


# ---- weights ----


def _is_tied(tensors: dict[str, StoredTensor]) -> bool:
    """The weights decide, not config.json; transformers does the same."""
    if "lm_head.weight" not in tensors:
        return True
    return torch.equal(tensors["lm_head.weight"].read(), tensors["transformer.wte.weight"].read())


def _read_weights(model: GPT2ReproForCausalLM, tensors: dict[str, StoredTensor]) -> dict[str, torch.Tensor]:
    """A state dict for `model`, of the dtype in its config: padding rows are zero, surplus positions are cropped."""
    weights = {}
    # Largest first: a tensor is in memory twice while it is copied.
    for name, parameter in sorted(model.named_parameters(), key=lambda item: -item[1].numel()):
        rows = model.config.unpadded_vocab_size if name in EMBEDDINGS else len(parameter)
        weights[name] = torch.zeros(parameter.shape, dtype=model.config.dtype)
        weights[name][:rows] = tensors[name].read()[:rows]
    return weights


def refuse_not_finite(name: str, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse a model called `name` with a NaN or an infinity in its weights.

    Raises:
        UserError: it has.
    """

    def is_finite(tensor: torch.Tensor) -> bool:
        return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor.detach()))  # without a copy

    broken = [key for key, tensor in weights.items() if tensor.dtype in FLOATS and not is_finite(tensor)]
    if broken:
        raise UserError(
            f"{name}: {first_three(broken)} is not finite; give a checkpoint from before its training diverged"
        )


def _open_folder(
    source: str | Path, revision: str | None, config: GPT2ReproConfig, is_ours: bool, drop_heads: bool
) -> dict[str, StoredTensor]:
    """The tensors of a model folder or Hub repository by our parameter names; `config` as the folder has it.

    Any release of transformers may have saved a GPT2LMHeadModel: with or without the `transformer.` prefix, the mask
    buffers and the head. Whoever trained it may have left the prefixes of torch.compile, Lightning and the like.
    """
    stored: dict[str, StoredTensor] = {}
    for file in _weight_files(source, revision):
        stored |= _open_weight_file(file)
    keys = parameter_names(stored)
    tensors = {}
    for name, key in keys.items():
        is_head = not name.startswith(LANGUAGE_MODEL)
        if key.endswith(MASK_BUFFERS) or (is_head and drop_heads):
            continue
        is_conv1d = not is_ours and name.endswith(PROJECTIONS)
        tensors[name] = stored[key].transposed() if is_conv1d else stored[key]
    if not config.tie_word_embeddings and "lm_head.weight" not in tensors:
        raise UserError(
            f"{source} lacks lm_head.weight, but its config.json says tie_word_embeddings=false; correct one of them"
        )
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_tensors(config.to_dict(), shapes, keys, str(source))
    return tensors


def _weight_files(source: str | Path, revision: str | None) -> list[Path]:
    """The weight files, one or several shards, of a folder or Hub repository: safetensors, else torch's own format."""
    for name in WEIGHT_FILES:
        folder = _folder_with(name, source, revision)
        if (folder / ADAPTER_CONFIG).is_file():
            raise UserError(f"{source} {ADAPTED_OR_NOT}")
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            with explained(f"{index} is damaged", "download it again"):
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                elsewhere = [shard for shard in shards if Path(shard).name != shard]
                if elsewhere:
                    raise ValueError(f"{elsewhere[0]} is not a file of this folder")
                return [folder / shard for shard in shards]
    others = sorted(file.name for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
    remedy = f"if {first_three(others)} is them, rename it" if others else "copy the model's weights there"
    raise UserError(f"{source} holds no weights: neither model.safetensors nor pytorch_model.bin exists; {remedy}")


def _folder_with(name: str, source: str | Path, revision: str | None) -> Path:
    """The folder itself, or a snapshot of the Hub repository that holds the weight file `name` or its shards."""
    if Path(source).is_dir():
        return Path(source)
    stem, suffix = name.split(".")
    patterns = [name, f"{stem}*.{suffix}*", ADAPTER_CONFIG]  # the second: shards and their index
    with explained(f"{source}: its weights cannot be downloaded from the Hub", "check the name and the network"):
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))


def _open_weight_file(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by their stored keys.

    A safetensors file is opened anew for each tensor, so that only one tensor's pages of it are in memory.
    """

    def read_safetensors(key: str) -> torch.Tensor:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(key)

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
            return {key: StoredTensor(shape, functools.partial(read_safetensors, key)) for key, shape in shapes.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is damaged or not a checkpoint ({first_line(error)}); download it again") from error
    # Files from before torch 1.6, OpenAI's own on the Hub among them, cannot be memory-mapped.
    tensors = load_pickle(file, mmap=zipfile.is_zipfile(file))
    _refuse_other_values(file, tensors)
    return {key: StoredTensor.of(tensor) for key, tensor in tensors.items()}


def check_torch_files(folder: Path) -> None:
    """Refuse weights in torch's own format that hold more than tensors: transformers' message would not say so."""
    if not [*folder.glob("model*.safetensors")]:
        for file in folder.glob("pytorch_model*.bin"):
            _open_weight_file(file)


def _refuse_other_values(file: Path, tensors: dict) -> None:
    others = [key for key, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if not tensors:
        raise UserError(f"{file} holds no tensors by name; save it with torch.save(model.state_dict(), ...)")
    if not others:
        return
    wrapped = next((key for key in others if isinstance(tensors[key], dict)), None)
    kept = "{k: v for k, v in x.items() if hasattr(v, 'shape')}" if wrapped is None else f"x[{wrapped!r}]"
    code = f"import torch; x = torch.load({str(file)!r}); torch.save({kept}, {str(file)!r})"
    raise UserError(
        f"{file} holds {first_three([str(key) for key in others])}, which is no tensor; save the tensors alone with "
        f"`{python_command(code)}`"
    )
