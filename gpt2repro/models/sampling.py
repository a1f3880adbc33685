"""Continuing a prompt with a model."""

import contextlib
from collections.abc import Iterator

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from gpt2repro.errors import UserError


DEFAULTS = {"do_sample": True, "top_k": 50}
MAX_SAMPLES = 64  # of a batch
CACHE_BYTES = 8 * 2**30  # of a batch


def prompt_text(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt; for an empty one the text that begins a document."""
    return prompt or tokenizer.bos_token or "\n"


def encode_prompt(prompt: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """(1, T) int64 token ids on the model's device; an empty prompt is the start of a document.

    Raises:
        UserError: the tokenizer has no token for the prompt, or the prompt leaves no position for a new token.
    """
    ids = tokenizer(prompt_text(prompt, tokenizer), return_tensors="pt").input_ids.to(model.device)
    positions = getattr(model.config, "max_position_embeddings", None)
    if not ids.numel():
        raise UserError(f"the tokenizer has no token for the prompt {prompt!r}; use characters of its corpus")
    if positions and ids.shape[1] >= positions:
        raise UserError(f"the prompt has {ids.shape[1]} tokens, the model only {positions} positions; shorten it")
    return ids.long()


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, seed: int, **options
) -> str:
    """The prompt and one continuation; see `draw`."""
    ids = draw(model, tokenizer, prompt, max_new_tokens, seed, **options)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


@torch.no_grad()
def draw(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    seed: int,
    num_samples: int = 1,
    streamer: BaseStreamer | None = None,
    **options,
) -> torch.Tensor:
    """The prompt and its continuations, which end at the model's last position at the latest.

    Of the model's generation defaults only the end-of-text ids count: beams, several sequences or a minimum length in a
    base model's generation_config.json change nothing here. The random state of training is left untouched.

    Args:
        seed: of all continuations together, so another num_samples gives other ones.
        streamer: gets the tokens as they are generated.
        options: fields of GenerationConfig that override DEFAULTS.
    Returns:
        (num_samples, prompt and new tokens) int64 on the model's device. What ends before the longest is padded with
        the tokenizer's end-of-text id.
    Raises:
        UserError: see `encode_prompt`.
    """
    was_training = model.training
    model.eval()
    ids = encode_prompt(prompt, model, tokenizer).repeat(num_samples, 1)
    positions = getattr(model.config, "max_position_embeddings", None) or ids.shape[1] + max_new_tokens
    cuda_devices = [model.device] if model.device.type == "cuda" else []
    settings = DEFAULTS | options
    generation_config = GenerationConfig(
        max_new_tokens=min(max_new_tokens, positions - ids.shape[1]),
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        **settings,
    )
    with torch.random.fork_rng(cuda_devices), _generation_defaults(model, generation_config):
        torch.manual_seed(seed)
        output = model.generate(
            ids, generation_config=generation_config, attention_mask=torch.ones_like(ids), streamer=streamer
        )
    model.train(was_training)
    return output


def samples_at_once(model: PreTrainedModel, positions: int) -> int:
    """How many samples of so many tokens are drawn as one batch: as many as CACHE_BYTES hold the keys and values of, as
    they take most of the memory, but at most MAX_SAMPLES. It does not depend on the machine, as samples do not."""
    config = model.config.get_text_config()
    positions = min(positions, getattr(config, "max_position_embeddings", None) or positions)
    bytes_per_sample = 2 * config.num_hidden_layers * config.hidden_size * positions * model.dtype.itemsize
    return max(1, min(MAX_SAMPLES, CACHE_BYTES // bytes_per_sample))


def count_new_tokens(samples: torch.Tensor, prompt_tokens: int, model: PreTrainedModel) -> int:
    """How many tokens were generated in samples that `draw` returned: the end of each text counts, padding does not."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends
    is_end = torch.isin(samples[:, prompt_tokens:], torch.tensor(ends, device=samples.device))
    ends_before = is_end.cumsum(dim=1) - is_end.long()
    return int((ends_before == 0).sum())


class FirstRowStreamer(TextStreamer):
    """Prints the first sample of a batch while all are generated; transformers' own takes one sample only."""

    def put(self, value: torch.Tensor) -> None:
        """Take the prompts, (B, T), or the next token of each sample, (B,)."""
        super().put(value[:1])


@contextlib.contextmanager
def _generation_defaults(model: PreTrainedModel, defaults: GenerationConfig) -> Iterator[None]:
    """Replace the model's own: generate() fills every field that its generation_config leaves unset from there."""
    own, model.generation_config = model.generation_config, defaults
    try:
        yield
    finally:
        model.generation_config = own
