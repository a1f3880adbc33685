"""GGUF, the one file that llama.cpp, and what is built on it, reads: configuration, tokenizer and weights.

Sources: the format, github.com/ggml-org/ggml docs/gguf.md; what llama.cpp reads of a GPT-2, src/models/gpt2.cpp.
"""

import json
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gpt2repro.errors import UserError
from gpt2repro.models.openai_weights import PROJECTIONS, TANH_GELUS, to_gpt2


BLOCK = 32  # inputs that share a scale in q8_0
SPLITTER = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}  # what llama.cpp calls gpt-2


def check_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, gguf_type: str) -> None:
    """Refuse what GGUF cannot carry so that llama.cpp computes the same.

    Args:
        model: ours.
        gguf_type: of the matrices: f32, f16, bf16 or q8_0.
    Raises:
        UserError: the package is missing, or the tokenizer, the activation or a width does not suit.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError("--format gguf needs the package gguf; run `pip install 'gpt2repro[gguf]'`") from error
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    splitter = definition["pre_tokenizer"] or {}
    if not SPLITTER.items() <= splitter.items() or definition["normalizer"] or definition["model"]["type"] != "BPE":
        raise UserError(
            "--format gguf carries GPT-2's kind of tokenizer alone, a byte-level BPE (--tokenizer gpt2 or bpe:N of "
            "prepare_data.py), and the model was trained with another; use --format gpt2"
        )
    activation = model.config.activation_function
    if activation not in TANH_GELUS:
        raise UserError(f"--format gguf: llama.cpp computes GPT-2 with gelu_new, not {activation}; use --format gpt2")
    widths = model.config.n_embd, model.config.n_inner or 4 * model.config.n_embd
    if gguf_type == "q8_0" and any(width % BLOCK for width in widths):
        raise UserError(
            f"--gguf_type q8_0 is for widths that {BLOCK} divides, not {widths[0]} and {widths[1]}; use f16"
        )


def write_gguf(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, gguf_type: str, name: str
) -> None:
    """Write a file for llama.cpp. The arguments have passed `check_gguf`.

    Args:
        gguf_type: of the matrices; vectors and position embeddings stay in float32, as llama.cpp's converter has it.
        name: the model's, for readers.
    """
    import gguf

    model = to_gpt2(model)
    config = model.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    of_matrices = gguf.GGMLQuantizationType[gguf_type.upper()]
    prefix = "ALL" if gguf_type == "f32" else "MOSTLY"
    writer.add_file_type(gguf.LlamaFileType[f"{prefix}_{gguf_type.upper()}"])
    _add_tokenizer(writer, tokenizer, config.vocab_size)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for parameter_name, parameter in model.named_parameters():  # without the head if it is the embedding
        weight = parameter.T if parameter_name.endswith(PROJECTIONS) else parameter  # (out, in)
        is_matrix = weight.dim() == 2 and "wpe" not in parameter_name
        dtype = of_matrices if is_matrix else gguf.GGMLQuantizationType.F32
        array = gguf.quantize(weight.detach().float().contiguous().numpy(), dtype)
        tensor_name = names.get_name(parameter_name, try_suffixes=(".weight", ".bias"))
        assert tensor_name, f"GGUF has no name for {parameter_name}"
        writer.add_tensor(tensor_name, array, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Add tokens, merges and roles. A row of the embedding without a token gets an unused one."""
    import gguf

    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = {id: (token, gguf.TokenType.NORMAL) for token, id in definition["model"]["vocab"].items()}
    for added in definition["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]] = added["content"], kind
    texts, kinds = zip(*(tokens.get(id, (f"[UNUSED{id}]", gguf.TokenType.UNUSED)) for id in range(rows)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in definition["model"]["merges"]])
    writer.add_add_bos_token(False)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(tokenizer.eos_token_id)
