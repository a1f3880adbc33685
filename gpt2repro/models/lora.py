"""LoRA (Hu et al. 2021) through PEFT: adapters that are added to a model, saved in PEFT's format, and merged.

An adapted projection computes W x + (alpha / r) B A x. W (out, in) is the base model's and frozen; A (r, in) starts at
random and B (out, r) at zero, so that training starts from the base model. An adapter fits both formats of GPT-2: where
the weight is stored as Conv1D, (in, out), PEFT transposes B A.

PEFT is an extra, so it is imported where it is used.
"""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from gpt2repro.errors import UserError
from gpt2repro.models.errors import explained
from gpt2repro.models.find import ADAPTER_WEIGHTS


if TYPE_CHECKING:
    from peft import LoraConfig


ADAPTER = "default"  # its name in the model; PEFT's
TARGETS = ("c_attn", "c_proj", "c_fc")  # the four matrices of a block: attention and MLP both have a c_proj
# The same for every rank, so that the best learning rate hardly depends on the rank; it is about ten times that of
# training all weights. Source: Schulman et al. 2025, "LoRA Without Regret".
ALPHA = 32


def new_lora(rank: int, base: str | Path) -> "LoraConfig":
    """An adapter for each matrix of the blocks.

    Args:
        base: the model that it is for: a folder, a file or a Hub id.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=ALPHA,
        target_modules=list(TARGETS),
        fan_in_fan_out=False,  # our projections are nn.Linear
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(Path(base).resolve()) if Path(base).exists() else str(base),
    )


def add_lora(model: PreTrainedModel, config: "LoraConfig") -> None:
    """Freeze a model and add adapters to it, in place."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model, ADAPTER)


def lora_of(model: torch.nn.Module) -> "LoraConfig | None":
    """What `add_lora` has added to a model; None: nothing."""
    return getattr(model, "peft_config", {}).get(ADAPTER)


def describe_lora(model: torch.nn.Module) -> str:
    """How much of a model is trained."""
    config = lora_of(model)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained, total = sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)
    assert config is not None, "add_lora was called"
    return f"LoRA of rank {config.r}: {trained:,} parameters are trained, {total - trained:,} stay as they are"


@torch.no_grad()
def merge_lora(model: PreTrainedModel) -> None:
    """Add what `add_lora` has added to the weights themselves, in place; the model is a plain one again.

    Raises:
        ValueError: a merged weight is not finite.
    """
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config


# ---- folders ----


def saved_name(parameter: str) -> str:
    """What PEFT calls a parameter of an adapter in a file: `h.0.mlp.c_fc.lora_A.default.weight` is
    `base_model.model.h.0.mlp.c_fc.lora_A.weight`."""
    return f"base_model.model.{parameter.replace(f'.{ADAPTER}.', '.')}"


def save_adapter(folder: Path, config: "LoraConfig", weights: Mapping[str, torch.Tensor]) -> None:
    """Write what PeftModel.from_pretrained opens: adapter_config.json and adapter_model.safetensors.

    Args:
        weights: of the adapters, by their names in the model.
    """
    saved = copy.copy(config)
    saved.inference_mode = True  # as PEFT saves it: to open is not to train
    saved.target_modules = list(TARGETS)  # PEFT makes them a set, whose order differs from process to process
    saved.save_pretrained(str(folder))
    tensors = {saved_name(name): tensor.contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def merge_adapter(model: PreTrainedModel, base: str, folder: Path) -> PreTrainedModel:
    """A GPT-2 with a folder's adapter, of any kind that PEFT can merge, merged into its weights, which are changed.

    Args:
        base: what the model is called.
    Raises:
        UserError: the adapter is damaged, does not fit the model or is not finite; or it changes the token embedding,
            to which the head is tied.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    embedding = model.transformer.wte.weight.clone()
    remedy = "save the adapter again, or correct base_model_name_or_path"
    with explained(f"{folder} cannot be merged into {base}", remedy), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about fan_in_fan_out, which it corrects, and missing tensors
        adapted = PeftModel.from_pretrained(model, str(folder))
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        stored = load_peft_weights(str(folder), device="cpu")
        # of an adapted embedding PEFT stores the base model's weight as well
        different = sorted(expected ^ {name for name in stored if ".base_layer." not in name})
        if different:
            raise ValueError(f"only one of them has {different[0]}")
        merged = adapted.merge_and_unload(safe_merge=True)
    is_tied = merged.lm_head.weight is merged.transformer.wte.weight
    if is_tied and not torch.equal(embedding, merged.transformer.wte.weight):
        raise UserError(
            f"{folder} changes the token embedding or the head, which are one matrix in {base}; train an adapter of "
            f"{', '.join(TARGETS)} instead"
        )
    return merged
