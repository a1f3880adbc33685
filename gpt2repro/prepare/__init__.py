"""From a corpus to token shards, for prepare_data.py alone.

Read request (what is asked for), corpora and readers (where documents come from; also local_files, boundaries, built_in
and retries), validation (how it is split off), prepared (the output directory), plan, parts and workers (tokenizing in
parallel), executors (Ray and Slurm), deduplication (with deduplication_report and urls), describe.
"""
