"""Padding rows of the vocabulary: training adds them, and nothing that leaves the trainer has them.

GPU kernels multiply faster by 50,304 rows than by GPT-2's 50,257. Our class hides the surplus rows in its loss and its
logits, but other libraries take the head's weight and multiply by it themselves (the fused heads of TRL and Liger, for
example). To them a row of zeros is a token with logit 0, and OpenAI's logits lie around -35.
"""

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from gpt2repro.data.tokenization import padded_vocab_size


EMBEDDINGS = ("transformer.wte.weight", "lm_head.weight")  # the tensors with one row per token


def padded(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration to train with: its vocab_size is rounded up."""
    return _with_rows(config, padded_vocab_size(config.unpadded_vocab_size))


def unpadded(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration to hand out: its vocab_size is the number of real tokens."""
    return _with_rows(config, config.unpadded_vocab_size)


@torch.no_grad()
def without_padding(model: PreTrainedModel) -> PreTrainedModel:
    """The same function without padding rows.

    Args:
        model: a plain model, see `unwrapped`.
    Returns:
        `model` itself if it has no padding; otherwise a new one that shares all weights but the token embedding.
    """
    config = model.config
    rows = getattr(config, "unpadded_vocab_size", config.vocab_size)
    if config.vocab_size == rows:
        return model
    weights = model.state_dict()
    for name in EMBEDDINGS:
        weights[name] = weights[name][:rows].clone()
    with torch.device("meta"):
        stripped = type(model)(unpadded(config))
    stripped.load_state_dict(weights, assign=True)
    stripped.tie_weights()
    stripped.generation_config = model.generation_config
    return stripped.train(model.training)


def _with_rows(config: PreTrainedConfig, rows: int) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    config.vocab_size = rows
    return config
