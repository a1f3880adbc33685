#!/usr/bin/env bash
# Run a command whose folder lives in a bucket, on a machine whose disk does not outlive it:
#
#     scripts/synced.sh hf://buckets/OWNER/BUCKET/RUN DIR COMMAND ...
#
# Fetches the bucket's folder into DIR, runs COMMAND, pushes DIR every SYNC_SECONDS (600) and at the end, and exits with
# COMMAND's code. A signal goes to COMMAND, which may save before the last push. A push that is cut leaves files of an
# unfinished checkpoint; these the trainer finds damaged, and takes the checkpoint before.
set -euo pipefail

remote=$1 folder=$2
shift 2

push() {  # deletes in the bucket only after all that is new has arrived
    hf sync --exclude "*writing_*" "$folder" "$remote" && hf sync --delete --exclude "*writing_*" "$folder" "$remote"
}

mkdir -p "$folder"
hf sync "$remote" "$folder" || { echo "error: cannot fetch $remote; create the bucket with \`hf buckets create\`" >&2; exit 2; }

"$@" &
command=$!
trap 'kill -TERM "$command"' TERM INT
seconds=0
while kill -0 "$command" 2> /dev/null; do
    sleep 1
    ((++seconds % ${SYNC_SECONDS:-600})) || push || echo "push to $remote failed; the next one follows" >&2
done &
pushing=$!

code=0
while kill -0 "$command" 2> /dev/null; do  # a signal ends `wait`, not the command
    code=0
    wait "$command" || code=$?
done
wait "$pushing" || true
push
exit "$code"
