#!/usr/bin/env bash
# Train on Hugging Face Jobs; checkpoints live in a bucket of the Hub:
#
#     hf buckets create my-bucket
#     BUCKET=me/my-bucket RUN=demo scripts/hf_jobs_train.sh --config recipes/R.yaml --data_dir /bucket/data
#
# Submit from the checkout; the job gets a copy of its tracked files. The bucket is mounted as /bucket, read-only; the prepared data
# is there, or the job prepares it first. The same command resumes the run in the bucket, as the job itself does until
# ATTEMPTS are used up: the run stops with a checkpoint before TIMEOUT_HOURS. Further arguments of `hf jobs run`, such as
# --dry-run, go into HF_JOBS_OPTIONS.
set -euo pipefail

: "${BUCKET:?OWNER/NAME of a bucket on the Hub}" "${RUN:?the name of the run}"
TIMEOUT_HOURS=${TIMEOUT_HOURS:-24}

code=$(mktemp -d)
trap 'rm -r "$code"' EXIT
git ls-files -z | xargs -0 cp --parents --target-directory "$code"

# shellcheck disable=SC2086,SC2016  # options are words; the job expands "$@"
hf jobs run --name "gpt2repro-$RUN" --flavor "${FLAVOR:-h200x8}" --timeout "${TIMEOUT_HOURS}h" \
    --attempts "${ATTEMPTS:-3}" --secrets HF_TOKEN --volume "$code:/code:ro" --volume "hf://buckets/$BUCKET:/bucket:ro" \
    --detach ${HF_JOBS_OPTIONS:-} "${IMAGE:-pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime}" \
    bash -c 'cp -r /code /work && cd /work && pip install --quiet --constraint constraints.txt . && exec "$@"' job \
    scripts/synced.sh "hf://buckets/$BUCKET/runs/$RUN" "/run/$RUN" \
    scripts/launch.sh --output_dir "/run/$RUN" --max_hours "$((TIMEOUT_HOURS - 1))" "$@"
