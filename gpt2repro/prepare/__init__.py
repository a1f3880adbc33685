"""From a corpus to token shards, for prepare_data.py alone.

Read corpora and readers (where documents come from), parts (tokenizing in parallel), prepared (the directory that is
made), deduplication with its executors and report, describe.
"""
