"""Finding, opening, converting, saving and sampling models.

Read find (what a user calls a model), folder (how one is opened and saved), openai_weights (any GPT-2 into ours and
back), foreign_checkpoints (files of nanoGPT, build-nanogpt and llm.c), gguf_file (one file for llama.cpp), lora
(adapters: added, saved, merged), generation_defaults (what of them travels with a model), padding (rows that only
training has), sampling, packed_weights (for inference on a CPU), unwrap (the plain model inside DDP, FSDP2 or
torch.compile), errors (one line for what the libraries raise).
"""
