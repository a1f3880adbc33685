"""A GPT-2's parameters and the FLOPs of one token, from the sizes in its configuration."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """The fields of GPT2ReproConfig that parameters, FLOPs and memory follow from; vocab_size counts padding rows."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    bias: bool = True
    has_dropout: bool = False

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Sizes":
        """Of the fields of a GPT2ReproConfig."""
        fields = {field.name: config[field.name] for field in dataclasses.fields(cls) if field.name in config}
        fields["n_inner"] = fields["n_inner"] or 4 * fields["n_embd"]
        return cls(**fields, has_dropout=bool(config["resid_pdrop"] or config["embd_pdrop"]))

    @property
    def block_matrices(self) -> int:
        """Weights in the four matrices of a block: qkv, its projection, and the MLP's two."""
        return 4 * self.n_embd**2 + 2 * self.n_embd * self.n_inner

    @property
    def block(self) -> int:
        """Parameters of a block: the matrices, their biases, and two LayerNorms."""
        width, inner = self.n_embd, self.n_inner
        biases = (3 * width + width + inner + width + 2 * width) if self.bias else 0
        return self.block_matrices + biases + 2 * width

    @property
    def embedding(self) -> int:
        """Parameters of the token embedding, which is the head too."""
        return self.vocab_size * self.n_embd

    @property
    def parameters(self) -> int:
        final_norm = self.n_embd * (2 if self.bias else 1)
        return self.embedding + self.n_positions * self.n_embd + self.n_layer * self.block + final_norm

    def lora(self, rank: int) -> int:
        """Parameters of LoRA adapters of the four matrices of each block: two factors, as long as a matrix has rows and
        columns."""
        rows_and_columns = (3 + 1) * self.n_embd + (1 + 1) * self.n_embd + 2 * (self.n_embd + self.n_inner)
        return self.n_layer * rank * rows_and_columns

    def flops_per_token(self, sequence_length: int, lora_rank: int = 0) -> float:
        """As MFU counts them."""
        if lora_rank:
            return flops_per_token(self, self.lora(lora_rank), sequence_length, frozen=self.parameters)
        return flops_per_token(self, self.parameters, sequence_length)

    def exact_flops_per_token(self, sequence_length: int) -> float:
        """FLOPs of the matrix products of a training step per token: forward once, backward twice. Of attention only
        the pairs that the causal mask leaves, (T + 1) / 2 of T on average; of the embedding only the head."""
        attended = (sequence_length + 1) / 2
        attention = 2 * 2 * self.n_embd * attended  # queries times keys, weights times values
        forward = self.n_layer * (2 * self.block_matrices + attention) + 2 * self.embedding
        return 3 * forward


def flops_per_token(config: Any, trained: int, sequence_length: int, frozen: int = 0) -> float:
    """FLOPs of a training step per token as MFU counts them: 6 per trained weight, 4 per frozen one, of which no
    gradient is computed, plus 12 * n_layer * n_embd * T for attention. Position embeddings are looked up, not
    multiplied.

    Args:
        config: `Sizes`, or a model's configuration.
        trained, frozen: parameters; position embeddings are among the frozen ones, if there are any.
    Source: PaLM paper, appendix B; nanoGPT estimate_mfu.
    """
    looked_up = config.n_positions * config.n_embd
    multiplied = 4 * (frozen - looked_up) + 6 * trained if frozen else 6 * (trained - looked_up)
    return multiplied + 12 * config.n_layer * config.n_embd * sequence_length
