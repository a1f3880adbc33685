"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners") as a transformers model.

The file is self-contained (torch and transformers only) because `save_pretrained` and `push_to_hub` copy it next to
the weights, where `from_pretrained(..., trust_remote_code=True)` runs it. It builds up from the parts to the whole:
loss, attention, MLP, block, trunk, language model.

Shapes in comments: B batch, T positions of this call, S cached + new positions, D = n_embd, H = n_head,
hs = D / H head size, V = vocab_size (rows of the embedding, including padding), N = B * T tokens.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers
from torch import nn


if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 17):
    raise ImportError(
        "this model needs transformers>=5.17 and torch>=2.11, but finds transformers "
        f"{transformers.__version__}; run `pip install -U transformers torch`"
    )

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    initialization,
)
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


IGNORE_INDEX = -100  # label of positions without loss, the convention of torch and transformers
# The loss materializes this many logits at once, in float32 0.5 GiB, or 128 MiB on a CPU, where small products waste no
# time. Or as many as it takes for MAX_CHUNKS chunks: torch.compile unrolls them, and compiling many takes minutes.
LOGITS_PER_CHUNK = 2**27
LOGITS_PER_CHUNK_ON_CPU = 2**25
MAX_CHUNKS = 8
SOFTMAX_ROWS = 32  # on a CPU, the softmax of this many rows at once stays in the cache

# Larger sizes are mistakes or malice: building such a model takes all memory before anything else is noticed.
LARGEST_SIZES = {"n_layer": 10_000, "n_embd": 2**17, "n_positions": 2**24, "vocab_size": 2**24}

# transformers 5.24 renamed past_key_values to cache. The models here accept both names from callers; this is the name
# that the installed release uses in its outputs and its mask functions.
CACHE = "cache" if hasattr(BaseModelOutputWithPast, "cache") else "past_key_values"

# Keywords that may reach the trunk beside its named arguments. Attention functions read some of them and ignore the
# rest. Any other keyword is refused: ignoring one silently can change the result, as `cache` did.
KNOWN_KEYWORDS = frozenset(
    (
        *("output_attentions", "output_hidden_states"),  # read by capture_outputs
        "num_items_in_batch",  # Trainer passes it to every model; the generic heads hand it on
        "is_causal",
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),  # packing: TRL, data collators
        *("attention_instances", "forward_batch"),  # vLLM, SGLang
    )
)


class GPT2ReproConfig(PreTrainedConfig):
    """Configuration under GPT-2's own field names; the defaults are GPT-2 124M without dropout.

    vocab_size is the number of embedding rows, padded to a multiple of 64 in training for faster matrix products;
    unpadded_vocab_size is the number of real tokens. Padding is invisible: see `GPT2ReproForCausalLM`.

    Raises:
        ValueError: a value is out of range, or the sizes are inconsistent.
    """

    model_type = "gpt2repro"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = 50304
    unpadded_vocab_size: int | None = None  # None means GPT-2's 50257 for its 50304 rows, otherwise all rows
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP; None means 4 * n_embd
    activation_function: str = "gelu_new"  # the tanh approximation of GELU
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    bias: bool = True  # biases of the projections and LayerNorms; False is nanoGPT's option
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        problems = []
        least = dict.fromkeys(("n_positions", "n_embd", "n_layer", "n_head", "n_inner"), 1)
        for name, bound in {**least, "layer_norm_epsilon": 0, "initializer_range": 0}.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:  # nor is NaN
                problems.append(f"{name}={value} must be at least {bound}")
        for name, bound in LARGEST_SIZES.items():
            if getattr(self, name) > bound:
                problems.append(f"{name}={getattr(self, name)} must be at most {bound}")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.activation_function not in ACT2FN:
            problems.append(f"activation_function={self.activation_function!r} is unknown; GPT-2's is gelu_new")
        if self.n_head > 0 and self.n_embd % self.n_head:
            problems.append(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if self.unpadded_vocab_size is None:
            self.unpadded_vocab_size = 50257 if self.vocab_size == 50304 else self.vocab_size
        if not 0 < self.unpadded_vocab_size <= self.vocab_size:
            problems.append(
                f"unpadded_vocab_size={self.unpadded_vocab_size} must lie between 1 and vocab_size={self.vocab_size}, "
                "the number of embedding rows"
            )
        if problems:
            raise ValueError("\n".join(problems))
        # register_for_auto_class, at the end of this file, records only the class being saved; Hub users need all.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "modeling_gpt2repro.GPT2ReproConfig",
                "AutoModel": "modeling_gpt2repro.GPT2ReproModel",
                "AutoModelForCausalLM": "modeling_gpt2repro.GPT2ReproForCausalLM",
                "AutoModelForQuestionAnswering": "modeling_gpt2repro.GPT2ReproForQuestionAnswering",
                "AutoModelForSequenceClassification": "modeling_gpt2repro.GPT2ReproForSequenceClassification",
                "AutoModelForTokenClassification": "modeling_gpt2repro.GPT2ReproForTokenClassification",
            },
        )
        super().__post_init__(**kwargs)


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T`, with the logits materialized one chunk of rows at a time.

    The gradients are computed in the forward pass, from each chunk's softmax (the idea of Liger-Kernel's fused linear
    cross-entropy), so the logits are neither stored nor recomputed.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, unpadded_vocab_size, dtype, with_gradients):
        ctx.hidden_dtype, ctx.weight_dtype = hidden.dtype, weight.dtype
        x, w = hidden.to(dtype), weight.to(dtype)
        logits_per_chunk = LOGITS_PER_CHUNK_ON_CPU if x.device.type == "cpu" else LOGITS_PER_CHUNK
        chunk_rows = max(1, logits_per_chunk // len(w), -(-len(x) // MAX_CHUNKS))
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x) if with_gradients else None
        grad_w = None
        with_weight = with_gradients and ctx.needs_input_grad[1]  # False when only adapters are trained
        chunks = max(1, -(-len(x) // chunk_rows))  # one even without rows: the gradients are then zeros
        for chunk in range(chunks):  # torch.compile specializes on their number, not on len(x)
            rows = slice(chunk * chunk_rows, (chunk + 1) * chunk_rows)
            logits = x[rows] @ w.T
            # not in place, which torch 2.11 compiles into gradients of zero
            loss = loss + _to_gradient(logits, labels[rows], unpadded_vocab_size, with_gradients)
            if with_gradients:
                grad_x[rows] = logits @ w
            if with_weight and grad_w is None:
                grad_w = (logits.T @ x[rows]).float()
            elif with_weight:
                grad_w += logits.T @ x[rows]
            del logits  # before the next chunk's are there
        if with_gradients:
            ctx.save_for_backward(grad_x, grad_w)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        grad_x, grad_w = ctx.saved_tensors
        grad_hidden = (grad_x * grad_loss).to(ctx.hidden_dtype)
        grad_weight = None if grad_w is None else (grad_w * grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _to_gradient(logits, labels, unpadded_vocab_size, with_gradient):
    """The summed loss of some rows, () float32; with_gradient turns the logits, (rows, V), in place into its gradient
    with respect to them."""
    in_blocks = logits.device.type == "cpu" and not torch.compiler.is_compiling()
    block_rows = SOFTMAX_ROWS if in_blocks else len(logits)
    loss = torch.zeros((), dtype=torch.float32, device=logits.device)
    for block, target in zip(logits.split(block_rows), labels[:, None].split(block_rows)):
        block[:, unpadded_vocab_size:] = -torch.inf
        log_probs = F.log_softmax(block, dim=-1, dtype=torch.float32)
        counted = target != IGNORE_INDEX
        target = target.where(counted, 0)
        # gather gets the real tokens only, so a label out of range raises an error instead of training silently
        loss = loss - (log_probs[:, :unpadded_vocab_size].gather(1, target) * counted).sum()
        if with_gradient:  # d loss / d logits = softmax - one_hot(target)
            gradient = log_probs.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=torch.float32))
            block.copy_(gradient.mul_(counted))
    return loss


def linear_cross_entropy(hidden, weight, labels, unpadded_vocab_size, num_items_in_batch=None):
    """Next-token cross-entropy over the real vocabulary, without materializing all logits at once.

    Args:
        hidden: (N, D) float, the trunk's output. Under autocast the products run in the autocast dtype; the softmax,
            the sum and the weight's gradient are always float32.
        weight: (V, D) float, the head's weight including padding rows.
        labels: (N,) int64, already shifted; -100 is ignored.
        unpadded_vocab_size: the softmax runs over this many of the V rows, the first ones.
        num_items_in_batch: divisor of the summed loss; None means the number of labels that are not ignored, i.e. the
            mean.
    Returns:
        () float32, nats per token.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    total = _ChunkedLinearCrossEntropy.apply(
        hidden, weight, labels, unpadded_vocab_size, dtype, torch.is_grad_enabled()
    )
    if num_items_in_batch is None:
        num_items_in_batch = (labels != IGNORE_INDEX).sum()
    return total / num_items_in_batch


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention in plain torch, the reference for the faster kernels.

    Args:
        query, key, value: (B, H, T, hs), (B, H, S, hs), (B, H, S, hs).
        attention_mask: (B or 1, 1, T, S) float, added to the scores: 0 where a query may attend, otherwise the dtype's
            minimum.
    Returns:
        (B, T, H, hs) attention output, and (B, H, T, S) attention weights.
    """
    scores = query @ key.transpose(2, 3) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class GPT2ReproAttention(nn.Module):
    """Causal multi-head self-attention, dispatched through transformers' attention interface (SDPA by default)."""

    is_causal = True

    def __init__(self, config: GPT2ReproConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5
        self.attn_pdrop = config.attn_pdrop
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = residual_projection(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states, attention_mask=None, past_key_values: Cache | None = None, **kwargs):
        B, T, D = hidden_states.shape
        qkv = self.c_attn(hidden_states).chunk(3, dim=-1)  # each (B, T, D); the backward pass joins them in one copy
        query, key, value = (part.view(B, T, -1, self.head_dim).transpose(1, 2) for part in qkv)  # each (B, H, T, hs)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, kwargs=kwargs)  # (B, H, S, hs)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        mixed, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.attn_pdrop if self.training else 0.0,
            **kwargs,
        )
        return self.resid_dropout(self.c_proj(mixed.reshape(B, T, D))), weights


class GPT2ReproMLP(nn.Module):
    def __init__(self, config: GPT2ReproConfig):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, n_inner, bias=config.bias)
        self.c_proj = residual_projection(n_inner, config.n_embd, bias=config.bias)
        # transformers computes "gelu_new" in five operations; torch's kernel is the same function in one.
        name = config.activation_function
        self.act = ACT2FN["gelu_pytorch_tanh" if name == "gelu_new" else name]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states):
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class GPT2ReproBlock(GradientCheckpointingLayer):
    """Pre-LayerNorm block: x + attention(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, config: GPT2ReproConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias)
        self.attn = GPT2ReproAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias)
        self.mlp = GPT2ReproMLP(config)

    def forward(self, hidden_states, attention_mask=None, past_key_values: Cache | None = None, **kwargs):
        attended, _ = self.attn(self.ln_1(hidden_states), attention_mask, past_key_values, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.ln_2(hidden_states))


def residual_projection(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """A Linear that writes into the residual stream, marked for its scaled initialization.

    The mark is on the Linear itself: transformers skips the init hook of custom modules without direct parameters.
    """
    linear = nn.Linear(in_features, out_features, bias=bias)
    linear.is_residual_projection = True
    return linear


class GPT2ReproPreTrainedModel(PreTrainedModel):
    config: GPT2ReproConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _input_embed_layer = "wte"
    _no_split_modules = ["GPT2ReproBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": GPT2ReproBlock, "attentions": GPT2ReproAttention}

    def _init_weights(self, module):
        """N(0, initializer_range) for Linear and Embedding, zero biases, LayerNorm weight 1 and bias 0.

        GPT-2 paper, section 2.3: "We scale the weights of residual layers at initialization by a factor of 1/sqrt(N)
        where N is the number of residual layers." Each block has two. Padding rows of the vocabulary are 0 and stay 0,
        since no gradient reaches them.
        """
        super()._init_weights(module)
        if getattr(module, "is_residual_projection", False):
            std = self.config.initializer_range / math.sqrt(2 * self.config.n_layer)
            initialization.normal_(module.weight, mean=0.0, std=std)
        if getattr(module, "has_padding_rows", False) and not getattr(module.weight, "_is_hf_initialized", False):
            initialization.zeros_(module.weight[self.config.unpadded_vocab_size :])

    def check_length(self, length: int) -> None:
        """Raise a ValueError if a sequence is longer than n_positions."""
        if length > self.config.n_positions:
            raise ValueError(
                f"a sequence of {length} tokens is longer than the model's n_positions={self.config.n_positions}; "
                "shorten the prompt or generate fewer new tokens"
            )

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """As in transformers; new_num_tokens is the real vocabulary, pad_to_multiple_of adds padding rows."""
        if new_num_tokens is not None:  # drop padding rows first: they are untrained, so no new token may start as one
            super().resize_token_embeddings(min(new_num_tokens, self.config.unpadded_vocab_size), mean_resizing=False)
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if new_num_tokens is not None:
            self.config.unpadded_vocab_size = new_num_tokens
            for layer in filter(None, (self.get_input_embeddings(), self.get_output_embeddings())):
                layer.weight.data[new_num_tokens:] = 0
        return embeddings


def check_keywords(kwargs: dict, position_ids: torch.Tensor | None) -> None:
    """Raise a ValueError for keywords that the model would have to ignore; None and False ask for nothing."""
    given = {name for name, value in kwargs.items() if value is not None and value is not False}
    unknown = sorted(given - KNOWN_KEYWORDS)
    if unknown:
        raise ValueError(f"{' and '.join(unknown)}: not supported by this language model; leave it out")
    if position_ids is None and given & {"cu_seq_lens_q", "seq_idx"}:
        raise ValueError("packed sequences need position_ids that restart at 0 with each sequence; give them too")


class GPT2ReproModel(GPT2ReproPreTrainedModel):
    """The trunk: token and position embeddings, blocks, final LayerNorm."""

    def __init__(self, config: GPT2ReproConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wte.has_padding_rows = True
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPT2ReproBlock(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the last block after the final LayerNorm.

        Args:
            input_ids: (B, T) int64; or inputs_embeds: (B, T, D) float. Exactly one of the two.
            attention_mask: (B, S) 1 for real tokens and 0 for padding; None means no padding.
            position_ids: (B, T) int64; None means that positions continue from the cache.
            cache, past_key_values: keys and values of earlier positions; two names of one argument.
            kwargs: KNOWN_KEYWORDS, of which the attention function gets what it reads.
        Returns:
            last_hidden_state (B, T, D); the cache, hidden_states and attentions if requested.
        Raises:
            ValueError: not exactly one input, an unknown keyword, two caches, or a sequence longer than n_positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if cache is not None and past_key_values is not None and cache is not past_key_values:
            raise ValueError("cache and past_key_values are two names of one argument; give one of them")
        cache = past_key_values if cache is None else cache
        if isinstance(cache, PagedAttentionCache):  # generate_batch, whose further keywords change between releases
            if CACHE == "past_key_values":  # before 5.24, the attention function updates this cache, not the model
                kwargs["cache"], cache = cache, None
        else:
            check_keywords(kwargs, position_ids)
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        if use_cache and cache is None and not self.training:
            cache = DynamicCache(config=self.config)

        T = inputs_embeds.shape[1]
        positions = position_ids
        if positions is None:
            past = 0 if cache is None else cache.get_seq_length()
            if isinstance(past, int):  # a static cache keeps its length on the device; `generate` checks it instead
                self.check_length(past + T)
            positions = torch.arange(T, device=inputs_embeds.device)[None] + past

        causal_mask = None
        # Without padding, packing or cache, SDPA needs no mask but is_causal=True. transformers knows that too, but it
        # builds a mask tensor while torch.compile traces, even for our own arange of position_ids.
        only_causal = attention_mask is None and position_ids is None and cache is None
        if not (only_causal and self.config._attn_implementation == "sdpa"):
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE: cache},
            )
        hidden_states = self.drop(inputs_embeds + self.wpe(positions))
        for block in self.h:
            hidden_states = block(hidden_states, causal_mask, cache, position_ids=position_ids, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(hidden_states), **{CACHE: cache})


class GPT2ReproForCausalLM(GPT2ReproPreTrainedModel, GenerationMixin):
    """GPT-2 with its tied language-model head.

    The padding rows of the vocabulary are invisible: the loss uses a softmax over the real tokens, and the logits of
    padding ids leave the model as the dtype's minimum, so they never affect sampling, beams or probabilities. (They do
    affect a mean over all logits, as in label smoothing, which needs a model without padding rows. Only a model in
    training has them: nothing that is exported or published does.)
    """

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: GPT2ReproConfig):
        super().__init__(config)
        self.transformer = GPT2ReproModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.has_padding_rows = True
        self.post_init()

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, position_ids=None, tokenizer=None, assistant_tokenizer=None, **kwargs
    ):
        """As in transformers, and checks the sequence length: with a static cache the forward pass cannot see it.

        inputs_embeds is named because `generate` looks for it in this signature; the tokenizers, which `generate` reads
        for stop strings and the like, because they must not reach the forward pass.
        """
        length = input_ids.shape[1] if position_ids is None else position_ids.shape[-1]
        if position_ids is not None and length > self.config.n_positions:
            length = int(position_ids.max()) + 1  # left padding uses no positions
        self.check_length(length)
        return super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, position_ids=position_ids, **kwargs
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        cache: Cache | None = None,
        skip_logits: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Next-token loss and logits; see `GPT2ReproModel.forward` for the other arguments.

        Args:
            labels: (B, T) int64 in the Hugging Face convention, e.g. input_ids: the model shifts them.
            shift_labels: (B, T) int64, already shifted: position t holds the token that follows input t. In both,
                -100 is ignored by the loss. Not in the signature, where Trainer looks for names with "label" and would
                evaluate only batches that have them all.
            logits_to_keep: compute logits for this many last positions only (0: all), or for these indices.
            num_items_in_batch: divisor of the summed loss, for gradient accumulation; None means the mean.
            skip_logits: with labels, return the loss alone; Trainer asks for it with use_liger_kernel.
        Returns:
            loss: () float32, nats per token, if labels were given. It always covers all positions.
            logits: (B, T or fewer, V). None in training with labels: they would be by far the largest tensor.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state

        loss = logits = None
        if shift_labels is None and labels is not None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        if shift_labels is not None:
            loss = self._loss(hidden_states, shift_labels, num_items_in_batch)
        if shift_labels is None or not (self.training or skip_logits):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])
            logits[..., self.config.unpadded_vocab_size :] = torch.finfo(logits.dtype).min

        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(self, hidden_states, shift_labels, num_items_in_batch):
        hidden, targets = hidden_states.flatten(0, 1), shift_labels.flatten().to(hidden_states.device)
        if len(hidden) != len(targets):
            raise ValueError(f"{len(targets)} labels for {len(hidden)} positions; give one for each input token")
        real = self.config.unpadded_vocab_size
        # FSDP2 replaces the head's class by a subclass of Linear with the same forward. Its weight is gathered by now,
        # since it is sharded together with the token embedding.
        is_linear = type(self.lm_head).forward is nn.Linear.forward and not hasattr(self.lm_head, "_hf_hook")
        if is_linear and type(self.lm_head.weight) in (nn.Parameter, torch.Tensor):
            return linear_cross_entropy(hidden, self.lm_head.weight, targets, real, num_items_in_batch)
        # With an adapter (PEFT), offloaded weights (accelerate) or quantized ones (torchao's are a subclass of Tensor),
        # only the head's own forward computes its logits.
        return fixed_cross_entropy(self.lm_head(hidden)[:, :real].float(), targets, num_items_in_batch)


# The heads do not call their mixin's __init__: it gets the trunk from AutoModel, which fails if this file is run as
# remote code.


class GPT2ReproForSequenceClassification(GenericForSequenceClassification, GPT2ReproPreTrainedModel):
    """A linear layer on the hidden state of the last real token, as in GPT2ForSequenceClassification."""

    base_model_prefix = "transformer"

    def __init__(self, config: GPT2ReproConfig):
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = GPT2ReproModel(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.post_init()


class GPT2ReproForTokenClassification(GenericForTokenClassification, GPT2ReproPreTrainedModel):
    """Dropout and a linear layer on every hidden state, as in GPT2ForTokenClassification."""

    base_model_prefix = "transformer"

    def __init__(self, config: GPT2ReproConfig):
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = GPT2ReproModel(config)
        self.dropout = nn.Dropout(0.1)  # GPT2ForTokenClassification's default
        self.score = nn.Linear(config.n_embd, config.num_labels)
        self.post_init()


class GPT2ReproForQuestionAnswering(GenericForQuestionAnswering, GPT2ReproPreTrainedModel):
    """The first and the last position of the answer, as in GPT2ForQuestionAnswering."""

    base_model_prefix = "transformer"
    get_input_embeddings = PreTrainedModel.get_input_embeddings  # the mixin expects them under another name
    set_input_embeddings = PreTrainedModel.set_input_embeddings

    def __init__(self, config: GPT2ReproConfig):
        PreTrainedModel.__init__(self, config)
        self.transformer = GPT2ReproModel(config)
        self.qa_outputs = nn.Linear(config.n_embd, 2)
        self.post_init()


# This makes save_pretrained and push_to_hub copy this file next to the weights.
GPT2ReproConfig.register_for_auto_class()
GPT2ReproModel.register_for_auto_class("AutoModel")
GPT2ReproForCausalLM.register_for_auto_class("AutoModelForCausalLM")
GPT2ReproForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
GPT2ReproForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
GPT2ReproForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")

# This table alone tells Trainer that label smoothing has to shift the labels, and pipelines that the class generates.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[GPT2ReproConfig.model_type] = GPT2ReproForCausalLM.__name__


def register_auto_classes() -> None:
    """Make the Auto classes open gpt2repro folders with this module instead of the folder's copy of it."""
    AutoConfig.register(GPT2ReproConfig.model_type, GPT2ReproConfig, exist_ok=True)
    AutoModel.register(GPT2ReproConfig, GPT2ReproModel, exist_ok=True)
    AutoModelForCausalLM.register(GPT2ReproConfig, GPT2ReproForCausalLM, exist_ok=True)
    AutoModelForQuestionAnswering.register(GPT2ReproConfig, GPT2ReproForQuestionAnswering, exist_ok=True)
    AutoModelForSequenceClassification.register(GPT2ReproConfig, GPT2ReproForSequenceClassification, exist_ok=True)
    AutoModelForTokenClassification.register(GPT2ReproConfig, GPT2ReproForTokenClassification, exist_ok=True)
