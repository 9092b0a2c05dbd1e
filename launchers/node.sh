#!/usr/bin/env bash
# One task's part of a job: who it is among the ranks, then Python itself, without an agent between it and the scheduler's signals.
#
#   srun launchers/node.sh pipeline/train.py RECIPE [key=value …]        launchers/job.sh does so
#
# DRY_RUN=1 prints what would run. DeepSpeed is chosen by the environment, which goes through. With STAGE and SHARDS the shards are read
# from this node's copy, where it is whole.
set -euo pipefail

# A signal that comes before Python listens must not end the task; job.sh repeats it.
trap '' TERM USR1

tasks=${SLURM_GTIDS:-0}
tasks=${tasks//[^,]/}
export RANK=${SLURM_PROCID:-0} LOCAL_RANK=${SLURM_LOCALID:-0} WORLD_SIZE=${SLURM_NTASKS:-1} LOCAL_WORLD_SIZE=$((${#tasks} + 1))
export MASTER_ADDR=${MASTER_ADDR:-localhost} MASTER_PORT=${MASTER_PORT:-20000}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

fail() {
    printf 'error: rank %s on %s: %s\n' "$RANK" "$(hostname)" "$*" >&2
    exit 2
}

if [ "$WORLD_SIZE" != $((${SLURM_NNODES:-1} * LOCAL_WORLD_SIZE)) ]; then
    fail "$WORLD_SIZE tasks are not $LOCAL_WORLD_SIZE on each of ${SLURM_NNODES:-1} nodes; give --nodes and --ntasks-per-node, not --ntasks"
fi
gpus=${SLURM_GPUS_ON_NODE:-0}
if [ "$gpus" != 0 ] && [ "$gpus" != "$LOCAL_WORLD_SIZE" ]; then
    fail "$gpus GPUs and $LOCAL_WORLD_SIZE tasks; give --ntasks-per-node and --gpus-per-node the same number"
fi
[ -n "${DRY_RUN:-}" ] || getent hosts "$MASTER_ADDR" > /dev/null || fail "$MASTER_ADDR is not known here; give MASTER_ADDR=ADDRESS"

python=${PYTHON:-python}
if [ -n "${STAGE:-}" ] && [ -n "${SHARDS:-}" ]; then
    set -- "$@" "data.path=$("$python" shards/stage.py "$SHARDS" "$STAGE" --look)"
fi
if [ -n "${DRY_RUN:-}" ]; then
    for name in RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS; do printf '%s=%s ' "$name" "${!name}"; done
    printf '%s\n' "$python ${*@Q}"
    exit
fi
exec "$python" "$@"
