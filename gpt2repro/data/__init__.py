"""Tokens on disk and how they are read.

Read tokenization with hub, shards and manifest (what lies on disk), token_stream and foreign_tokens (how it is opened),
order and mixture (which tokens a step trains on), batches (what a rank gets).
"""
