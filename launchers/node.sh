#!/usr/bin/env bash
# One task's part of a job: who it is among the ranks, then Python itself, without an agent between it and the scheduler's signals.
#
#   srun launchers/node.sh pipeline/train.py RECIPE [key=value …]        launchers/job.sh does so
#
# DRY_RUN=1 prints what would run. DeepSpeed is chosen by the environment, which goes through. With STAGE and SHARDS the shards are read
# from this node's copy, where it is whole.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/word.sh"

# A signal that comes before Python listens must not end the task; job.sh repeats it.
trap '' TERM USR1

nodes=${SLURM_NNODES:-1}
export RANK=${SLURM_PROCID:-0} LOCAL_RANK=${SLURM_LOCALID:-0} WORLD_SIZE=${SLURM_NTASKS:-1}
export LOCAL_WORLD_SIZE=$((WORLD_SIZE / nodes))
export MASTER_ADDR=${MASTER_ADDR:-} MASTER_PORT=${MASTER_PORT:-20000}
[ "$WORLD_SIZE" != 1 ] || MASTER_ADDR=${MASTER_ADDR:-localhost} # nobody to meet
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

fail() {
    printf 'error: rank %s on %s: %s\n' "$RANK" "$(hostname)" "$*" >&2
    exit 2
}

# A world that is not what was meant: better one line now than ranks that wait for others, or train without them.
check_world() {
    local here=${SLURM_GTIDS:-0} gpus=${SLURM_GPUS_ON_NODE:-0}
    here=${here//[^,]/} # a comma less than there are tasks on this node
    [ $(((${#here} + 1) * nodes)) = "$WORLD_SIZE" ] ||
        fail "$((${#here} + 1)) of $WORLD_SIZE tasks on one of $nodes nodes; give --nodes and --ntasks-per-node, not --ntasks"
    [ "$gpus" = 0 ] || [ "$gpus" = "$LOCAL_WORLD_SIZE" ] ||
        fail "$gpus GPUs and $LOCAL_WORLD_SIZE tasks; give --ntasks-per-node and --gpus-per-node the same number"
    [ -n "$MASTER_ADDR" ] ||
        fail "MASTER_ADDR is not set, and $WORLD_SIZE tasks must meet; start them by launchers/job.sh, or with srun --export=ALL"
    getent hosts "$MASTER_ADDR" > /dev/null || fail "$MASTER_ADDR is not known here; give MASTER_ADDR=ADDRESS"
}

[ -n "${DRY_RUN:-}" ] || check_world
python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python
command -v "$python" > /dev/null || fail "there is no Python at '$python'; give PYTHON=FILE"
if [ -n "${STAGE:-}" ] && [ -n "${SHARDS:-}" ]; then
    shards=$("$python" shards/stage.py "$SHARDS" "$STAGE" --look)
    set -- "$@" "$(word data.path "$shards")"
fi
if [ -n "${DRY_RUN:-}" ]; then
    for name in RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS; do
        printf '%s=%s ' "$name" "${!name}"
    done
    printf '%s\n' "$python ${*@Q}"
    exit
fi
exec "$python" "$@"
