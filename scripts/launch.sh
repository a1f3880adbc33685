#!/usr/bin/env bash
# What the job of every engine (Slurm, SkyPilot, Kubeflow, hf jobs) runs on each of its machines:
#
#     scripts/launch.sh --config recipes/R.yaml --output_dir DIR [--field value ...]
#
# The same command resumes from the newest checkpoint in DIR. Exit code 75: a signal or --max_hours stopped the run, and a
# checkpoint is saved; repeat the command. The environment says which machine this is:
#
#     NODES, NODE_RANK            how many machines there are, and which of them this is, from 0 (default: 1 and 0)
#     MASTER_ADDR, MASTER_PORT    where they meet: address of machine 0, any free port (default: 127.0.0.1 and 29500)
#     GPUS_PER_NODE               processes on each machine (default: the GPUs that nvidia-smi lists)
#     CONFIG                      of accelerate (default: accelerate_configs/ddp_8gpu.yaml)
#     PYTHON, SCRIPT              (default: python and train_accelerate.py)
set -euo pipefail

NODES=${NODES:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-$(nvidia-smi --list-gpus | wc -l)}

# exec: signals reach launch.py itself, which passes them on, waits for the checkpoint and keeps the exit code.
exec "${PYTHON:-python}" "$(dirname "$0")/launch.py" \
    --config_file "${CONFIG:-accelerate_configs/ddp_8gpu.yaml}" \
    --num_machines "$NODES" --machine_rank "${NODE_RANK:-0}" --num_processes "$((NODES * GPUS_PER_NODE))" \
    --main_process_ip "${MASTER_ADDR:-127.0.0.1}" --main_process_port "${MASTER_PORT:-29500}" \
    "${SCRIPT:-train_accelerate.py}" "$@"
