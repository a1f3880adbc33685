"""Bytes that training holds on one GPU at its peak, by part. Nothing is measured: what is saved for backward, and in
which type, follows from modeling_gpt2repro.py; tests/plan and benchmarks/planner.py compare it with what is held.

Units are bytes. "Half" below means the type of the matrix products: bf16 or fp16 under autocast, else float32.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from gpt2repro.model_fields import model_constant
from gpt2repro.plan.sizes import Sizes
from gpt2repro.recipe import Recipe, divisors


Strategy = Literal["ddp", "fsdp2", "hsdp"]

# On a GPU beside torch's tensors: the CUDA context, workspaces of cuBLAS and, with several GPUs, NCCL's buffers; and
# what the allocator cannot use between tensors. Ours, rough.
OVERHEAD = 1.5 * 2**30
UNUSABLE = 0.05
CPU_SHARE = 0.9  # of a machine's free memory, which others use as well


@dataclass(frozen=True)
class Setup:
    """How a model is trained.

    micro_batch_size: sequences per GPU and forward pass.
    accumulation: micro-batches per step.
    shards: GPUs across which a parameter is divided: 1 with DDP, all with FSDP2, those of a machine with HSDP.
    half: 16-bit autocast, else float32.
    """

    micro_batch_size: int
    sequence_length: int
    accumulation: int = 1
    strategy: Strategy = "ddp"
    num_gpus: int = 1
    shards: int = 1
    half: bool = True
    compile: bool = False
    gradient_checkpointing: bool = False
    eager_attention: bool = False
    muon: bool = False
    lora_rank: int = 0  # 0: all weights are trained
    device: Literal["cuda", "cpu"] = "cuda"
    has_telemetry: bool = True  # the trainer's, which now and then copies the weights to measure an update

    @classmethod
    def of(cls, recipe: Recipe, **launch: Any) -> "Setup":
        """What the recipe says; the other fields are those of the launch."""
        return cls(
            sequence_length=recipe.sequence_length,
            compile=recipe.compile,
            gradient_checkpointing=recipe.gradient_checkpointing,
            eager_attention=recipe.attention == "eager",
            muon=recipe.optimizer == "muon",
            lora_rank=recipe.lora_rank,
            **launch,
        )

    @property
    def tokens(self) -> int:
        """Of a micro-batch on one GPU."""
        return self.micro_batch_size * self.sequence_length

    @property
    def half_bytes(self) -> int:
        return 2 if self.half else 4

    @property
    def is_sharded(self) -> bool:
        return self.strategy != "ddp"


@dataclass(frozen=True)
class Memory:
    """Bytes of each part at the moment of the step that needs most."""

    moment: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def peak_memory(sizes: Sizes, setup: Setup) -> Memory:
    """The moment of a step with the highest sum of parts, on one GPU, without OVERHEAD.

    The moments: the loss, when all activations are stored and the logits of a chunk are there; the start of the
    backward pass; its end, when all gradients are there; and the optimizer step, now and then with a copy of the
    weights (`Telemetry.measuring_update`).
    """
    all_trained = 4 * trained(sizes, setup)
    trained_here = all_trained / setup.shards
    kept = {
        "weights": 4 * (sizes.parameters + sizes.lora(setup.lora_rank)) / setup.shards,
        "optimizer": optimizer_bytes(sizes, setup),
        "communication": communication_bytes(sizes, setup),
    }
    stored = activations(sizes, setup) + casts(sizes, setup)
    last = head_activations(sizes, setup)
    gradients = all_trained if setup.accumulation > 1 else 0  # of the micro-batches before; not yet sharded
    all_gradients = all_trained if setup.accumulation > 1 or not setup.is_sharded else trained_here
    head = 0 if setup.lora_rank else 4 * sizes.embedding
    moments = {
        "loss": {"gradients": gradients, "activations": stored + last, "loss": loss_bytes(sizes, setup)},
        "start of backward": {
            "gradients": gradients + 2 * head,  # the head's, and the same times the gradient of the loss
            "activations": stored + block_gradients(sizes, setup),
        },
        "end of backward": {  # the embedding's own gradient, before it is added to the head's
            "gradients": all_gradients + head,
            "activations": setup.tokens * 4 * sizes.n_embd,
        },
        "optimizer step": {"gradients": trained_here, "copies": trained_here if setup.has_telemetry else 0},
    }
    candidates = [Memory(moment, kept | parts) for moment, parts in moments.items()]
    return max(candidates, key=lambda memory: memory.total)


def trained(sizes: Sizes, setup: Setup) -> int:
    """Parameters that have a gradient."""
    return sizes.lora(setup.lora_rank) if setup.lora_rank else sizes.parameters


def optimizer_bytes(sizes: Sizes, setup: Setup) -> float:
    """AdamW keeps two float32 values for a parameter; Muon, for the matrices of the blocks, one."""
    matrices = sizes.n_layer * sizes.block_matrices if setup.muon else 0
    return (8 * trained(sizes, setup) - 4 * matrices) / setup.shards


def activations(sizes: Sizes, setup: Setup) -> float:
    """What the blocks store for backward or, with gradient checkpointing, their inputs."""
    recomputed = setup.gradient_checkpointing
    of_block = 4 * sizes.n_embd if recomputed else activations_per_token(sizes, setup)
    return setup.tokens * sizes.n_layer * of_block


def head_activations(sizes: Sizes, setup: Setup) -> float:
    """What there is during the loss only: the final LayerNorm's input and output in float32, the latter in half
    precision too, and its gradient."""
    copy = 2 if setup.half else 0
    return setup.tokens * (4 + 4 + copy + setup.half_bytes) * sizes.n_embd


def activations_per_token(sizes: Sizes, setup: Setup) -> float:
    """Bytes that one block stores for a token.

    In float32 the residual stream, which both LayerNorms store, with their means and deviations, and the logarithm of
    each head's softmax sum; in half precision the inputs of the four matrices (of which attention's output is one), q,
    k and v, and the MLP's state before its activation. With eager attention, instead of the logarithm, the softmax of
    all scores, and its copy in half precision. With LoRA the factors store the matrices' inputs in their stead,
    attention's output a second time in half precision, and what lies between the two factors.
    """
    width, inner, half = sizes.n_embd, sizes.n_inner, setup.half_bytes
    in_float32 = 4 * (2 * width + 4 + sizes.n_head)
    in_half = half * (2 * width + 3 * width + width + 2 * inner)
    if setup.eager_attention:
        in_float32 += 4 * (setup.sequence_length - 1) * sizes.n_head
        in_half += 2 * setup.sequence_length * sizes.n_head if setup.half else 0
    dropout_masks = 2 * width if sizes.has_dropout else 0  # a byte each on a GPU; more on the CPU
    copy = half * width if setup.lora_rank and setup.half else 0
    return in_float32 + in_half + dropout_masks + copy + half * 4 * setup.lora_rank


def casts(sizes: Sizes, setup: Setup) -> float:
    """The matrices in 16 bits, which autocast makes of the float32 weights and backward needs again."""
    return 2 * (sizes.n_layer * sizes.block_matrices + sizes.lora(setup.lora_rank)) if setup.half else 0


def loss_bytes(sizes: Sizes, setup: Setup) -> float:
    """What `linear_cross_entropy` holds at once beside the hidden states and their gradient.

    The head in half precision; a chunk's logits, which turn into their gradient; and the larger of their softmax in
    float32 (on a CPU without torch.compile a few rows at a time) and the chunk's share of the head's gradient, which is
    summed in float32.
    """
    half, head = setup.half_bytes, sizes.embedding
    logits_per_chunk = model_constant("LOGITS_PER_CHUNK_ON_CPU" if setup.device == "cpu" else "LOGITS_PER_CHUNK")
    rows = max(1, logits_per_chunk // sizes.vocab_size, -(-setup.tokens // model_constant("MAX_CHUNKS")))
    chunk = min(rows, setup.tokens) * sizes.vocab_size
    is_first_chunk_last = rows >= setup.tokens
    softmax = 0 if setup.device == "cpu" and not setup.compile else 4 * chunk
    cast = half * head if setup.half else 0
    if setup.lora_rank:  # the head has no gradient
        return cast + half * chunk + softmax
    return cast + half * chunk + max(softmax + (0 if is_first_chunk_last else 4 * head), (half + 4) * head)


def block_gradients(sizes: Sizes, setup: Setup) -> float:
    """Gradients of a block's activations while they are used: of the residual stream, in float32 and half precision,
    and of the MLP's inner state. With gradient checkpointing, the block's activations too, which are computed anew."""
    residual = (6 if setup.half else 4) * sizes.n_embd
    inner = setup.tokens * (residual + setup.half_bytes * sizes.n_inner)
    of_block = activations_per_token(sizes, setup) if setup.gradient_checkpointing else 0
    return inner + setup.tokens * of_block


def communication_bytes(sizes: Sizes, setup: Setup) -> float:
    """DDP's buckets are a second copy of the gradients. FSDP2 gathers the embeddings and two blocks, the one that
    computes and the next, and holds the gradients of two blocks before and after they are sharded."""
    if setup.num_gpus == 1:
        return 0
    if not setup.is_sharded:
        return 4 * trained(sizes, setup)
    embeddings = 4 * (sizes.embedding + sizes.n_positions * sizes.n_embd)
    return embeddings + 4 * 4 * sizes.block


def largest_micro_batch(sizes: Sizes, setup: Setup, sequences: int, capacity: float) -> Setup | None:
    """The setup with the largest micro-batch that fits into `capacity` bytes; None if not even one sequence does.

    Args:
        sequences: per GPU and step; the micro-batch size divides it, so that accumulation keeps the global batch.
    """
    for size in reversed(divisors(sequences)):
        candidate = dataclasses.replace(setup, micro_batch_size=size, accumulation=sequences // size)
        if peak_memory(sizes, candidate).total <= capacity:
            return candidate
    return None


def capacity(memory_mib: int) -> float:
    """Bytes of a GPU's memory that tensors can fill."""
    return memory_mib * 2**20 * (1 - UNUSABLE) - OVERHEAD
