"""Finding, opening, converting, saving and sampling models.

Read folder (what from_pretrained opens), openai_weights (GPT-2 to ours and back), foreign_checkpoints (other trainers'
files), sampling, unwrap (the plain model inside DDP, FSDP2 or torch.compile).
"""
