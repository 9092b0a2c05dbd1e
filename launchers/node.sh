#!/usr/bin/env bash
# Run one task of a Slurm job: set the variables of its rank, then replace this shell by Python. No other process is in between, so that
# the scheduler's signals reach Python.
#
#   srun launchers/node.sh -m pipeline.train RECIPE [key=value …]        as launchers/job.sh does
#
# DRY_RUN=1 prints the command without running it. DeepSpeed is chosen by environment variables, which are passed on. With STAGE and
# SHARDS the shards are read from this node's copy if that is complete.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/word.sh"

# A signal must not end the task before Python has installed its handlers; job.sh repeats it.
trap '' TERM USR1

nodes=${SLURM_NNODES:-1}
export RANK=${SLURM_PROCID:-0} LOCAL_RANK=${SLURM_LOCALID:-0} WORLD_SIZE=${SLURM_NTASKS:-1}
export LOCAL_WORLD_SIZE=$((WORLD_SIZE / nodes))
export MASTER_ADDR=${MASTER_ADDR:-} MASTER_PORT=${MASTER_PORT:-20000}
[ "$WORLD_SIZE" != 1 ] || MASTER_ADDR=${MASTER_ADDR:-localhost} # no other rank
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

fail() {
    printf 'error: rank %s on %s: %s\n' "$RANK" "$(hostname)" "$*" >&2
    exit 2
}

# Check that the ranks are those that were requested. Otherwise they would wait for missing ranks, or train without them.
check_world() {
    local here=${SLURM_GTIDS:-0} gpus=${SLURM_GPUS_ON_NODE:-0}
    here=${here//[^,]/} # the list's commas: one less than the tasks on this node
    [ $(((${#here} + 1) * nodes)) = "$WORLD_SIZE" ] ||
        fail "$((${#here} + 1)) of $WORLD_SIZE tasks on one of $nodes nodes; use --nodes and --ntasks-per-node, not --ntasks"
    [ "$gpus" = 0 ] || [ "$gpus" = "$LOCAL_WORLD_SIZE" ] ||
        fail "$gpus GPUs but $LOCAL_WORLD_SIZE tasks on this node; set --ntasks-per-node and --gpus-per-node to the same number"
    [ -n "$MASTER_ADDR" ] ||
        fail "MASTER_ADDR is not set, but $WORLD_SIZE tasks need it; start them with launchers/job.sh, or use srun --export=ALL"
    getent hosts "$MASTER_ADDR" > /dev/null || fail "the host name $MASTER_ADDR cannot be resolved here; set MASTER_ADDR=ADDRESS"
}

[ -n "${DRY_RUN:-}" ] || check_world
python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python
command -v "$python" > /dev/null || fail "there is no Python at '$python'; set PYTHON=FILE"
if [ -n "${STAGE:-}" ] && [ -n "${SHARDS:-}" ]; then
    shards=$("$python" -m shards.stage "$SHARDS" "$STAGE" --look)
    set -- "$@" "$(override data.path "$shards")"
fi
if [ -n "${DRY_RUN:-}" ]; then
    for name in RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS; do
        printf '%s=%s ' "$name" "${!name}"
    done
    printf '%s\n' "$python ${*@Q}"
    exit
fi
exec "$python" "$@"
