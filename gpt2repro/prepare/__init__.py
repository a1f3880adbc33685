"""From a corpus to token shards, for prepare_data.py alone.

Read request (what is asked for), corpora and readers (where documents come from; also local_files, boundaries, built_in
and retries), prepared (the output directory), validation, plan, parts and workers (tokenizing in parallel),
deduplication (with executors, deduplication_report and urls), describe.
"""
