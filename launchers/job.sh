#!/usr/bin/env bash
# Run a complete Slurm job. A batch script in slurm/ is a header and one call of this script.
#
#   launchers/job.sh train RECIPE [key=value …]          train, one task per GPU; requeued after a preemption
#   launchers/job.sh table [PAIR …] [methods=a,b] [key=value …]      train one cell of an array (default: all of ImageNet's tables)
#   launchers/job.sh run SCRIPT | -m MODULE [argument …]  run a resumable Python program in one task; requeued after a signal
#   launchers/job.sh cache RECIPE [key=value …]          cache a recipe's teacher, one task per GPU; requeued after a signal
#
# Optional variables in the environment of sbatch:
#   DRY_RUN=1                   print the commands without running them
#   STAGE=FOLDER                copy the shards to this folder on every node's local disk first (default: SLURM_TMPDIR; empty: no copy)
#   MASTER_ADDR, MASTER_PORT    address and port of the rendezvous (default: the first node, and a port that depends on the job id)
#   MAX_RESTARTS=50             limit of restarts of a job
#   PYTHON                      Python interpreter (default: that of .venv, else python)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/word.sh"

python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python
export PYTHON=$python DRY_RUN=${DRY_RUN:-}
# sbatch --export limits the variables of this script, and srun would apply the same limit. But the tasks need all variables set here.
export SLURM_EXPORT_ENV=ALL

nodes=${SLURM_JOB_NUM_NODES:-1}
restarts=${SLURM_RESTART_COUNT:-0}
# One task of an array has the same job id as the whole array. The form ARRAYID_TASKID requeues that task alone.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
job=${job:-${SLURM_JOB_ID:-0}}

# Print a message with the job id to stderr.
log() { printf '%s\n' "job $job: $*" >&2; }

# Print a command as it would be typed.
print_command() { printf '$ %s\n' "${*@Q}"; }

usage_error() {
    log "error: expected train RECIPE, table, cache RECIPE or run SCRIPT, got '$*'"
    exit 2
}

guard_restarts() {
    if [ "$restarts" -gt "${MAX_RESTARTS:-50}" ]; then
        log "error: restarted $restarts times; check the log, then submit the job again (or set MAX_RESTARTS=N)"
        exit 1
    fi
}

# Set address and port of the rendezvous for a start of $1. Linux uses ports from 32768 on for outgoing connections, so those from 20000
# to 29999 are usually free. This script runs on the first node, so it can test a port.
rendezvous() {
    if [ -z "${MASTER_ADDR:-}" ]; then
        local hosts=("$(hostname)")
        [ -z "${SLURM_JOB_NODELIST:-}" ] || mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        export MASTER_ADDR=${hosts[0]}
    fi
    if [ -z "${MASTER_PORT:-}" ]; then
        MASTER_PORT=$((20000 + ${SLURM_JOB_ID:-0} % 10000))
        while (: < "/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2> /dev/null; do
            log "port $MASTER_PORT of $MASTER_ADDR is taken; trying the next"
            MASTER_PORT=$((MASTER_PORT + 1))
        done
        export MASTER_PORT
    fi
    # Some ranks may take minutes to import from a slow shared file system. A rank that fails ends the step at once, without this limit.
    export PIPELINE_RENDEZVOUS_SECONDS=${PIPELINE_RENDEZVOUS_SECONDS:-600}
    log "start $((restarts + 1)) of $1 on $nodes nodes, ${SLURM_NTASKS:-1} ranks, rendezvous at $MASTER_ADDR:$MASTER_PORT"
}

# Set the variables for traces of hangs and crashes, with separate files for every start and rank. NCCL still chooses its interface.
enable_debugging() {
    debug=$PWD/slurm/logs/debug/$job-start-$((restarts + 1))
    [ -n "$DRY_RUN" ] || mkdir -p "$debug"
    export PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1 NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    export TORCH_FR_DUMP_ON_TIMEOUT=1 TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
    export TORCH_FR_DUMP_TEMP_FILE=$debug/nccl-rank-
}

# Run srun and return its exit code. A signal to this script is forwarded to the tasks every five seconds: a task that is still starting
# may miss the first ones, and repeated signals do no harm.
run_srun() {
    local running pause status=0
    # A signal must not kill srun before it has installed its own handlers.
    (trap '' USR1 TERM && exec srun "$@") &
    running=$!
    while kill -0 "$running" 2> /dev/null; do
        sleep 5 &
        pause=$!
        wait -n "$running" "$pause" || true
        kill "$pause" 2> /dev/null || true
        [ -z "$signalled" ] || kill -USR1 "$running" 2> /dev/null || true
    done
    wait "$running" || status=$?
    return "$status"
}

# Copy the shards of folder $1 to every node, in a job step of its own. It ends when all nodes are done. Otherwise the ranks of a fast
# node could reach the time limit of the rendezvous. If the copy fails, the shared folder is read.
stage() {
    STAGE=${STAGE-${SLURM_TMPDIR:-}}
    [ -n "$STAGE" ] || return 0
    export STAGE SHARDS=$1
    local args=(--nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --label "$PYTHON" -m shards.stage "$SHARDS" "$STAGE")
    if [ -n "$DRY_RUN" ]; then
        print_command srun "${args[@]}"
    else
        run_srun "${args[@]}" || log "some nodes could not copy the shards; they read $SHARDS instead"
    fi
}

# Run the tasks of the job and set `status`.
run_step() {
    local args=(--kill-on-bad-exit=1 --wait=60 --label "$@") tee
    status=0
    if [ -n "$DRY_RUN" ]; then
        print_command srun "${args[@]}"
        "$@"
        return
    fi
    exec 3> >(trap '' USR1 TERM && exec tee "$debug/errors.txt" >&2)
    tee=$!
    run_srun "${args[@]}" 2>&3 || status=$?
    exec 3>&-
    wait "$tee" || true
}

# Report the rank that failed first. srun ends the other ranks afterwards, and they would report that.
report_failure() {
    local first
    first=$(sed -nE '/^srun: error: ([^ :]+): tasks? ([^:]+): (.+)$/{s//rank \2 on \1: \3/p;q}' "$debug/errors.txt")
    log "error: ${first:-srun failed}; the step ended with exit code $status; see its output above and in $debug"
}

requeue() {
    # A job that its owner cancels gets a signal, too, and must not come back.
    if [ "$(squeue --noheader --jobs="$job" --format=%T)" != RUNNING ]; then
        log "the job was cancelled; submit it again to continue"
        return
    fi
    log "stopped by a signal; requeued to continue"
    scontrol requeue "$job"
}

# Run tasks that write to folder $1. When a signal ends them, they save their work and create the file `preempted` in that folder.
resumable() {
    local folder=$1
    [ -n "$DRY_RUN" ] || rm -f "$folder/preempted"
    if [ -n "$signalled" ]; then # the signal came before the tasks started, so there is nothing to save
        mkdir -p "$folder"
        touch "$folder/preempted"
    else
        run_step launchers/node.sh "${@:2}"
    fi
    if [ -e "$folder/preempted" ]; then
        requeue
        exit 0
    fi
}

train() {
    local paths shards folder
    paths=$("$PYTHON" -m pipeline.config.paths "$@")
    { read -r shards && read -r folder; } <<< "$paths"
    rendezvous "$folder"
    stage "$shards"
    resumable "$folder" -m pipeline.train "$@" "$(override folder "$folder")"
}

table() {
    local lines cells cell index=${SLURM_ARRAY_TASK_ID:-0}
    lines=$("$PYTHON" -m pipeline.config.tables "$@")
    mapfile -t cells <<< "$lines"
    if [ "$index" -ge ${#cells[@]} ]; then
        log "error: there are ${#cells[@]} cells; submit with --array=0-$((${#cells[@]} - 1))"
        exit 2
    fi
    IFS=$'\t' read -r -a cell <<< "${cells[index]}"
    train "${cell[@]}"
}

run() {
    run_step launchers/node.sh "$@"
    # 128 + SIGTERM or SIGUSR1: the script was stopped, and the finished part of its work is on the disk.
    if [ "$status" = 143 ] || [ "$status" = 138 ]; then
        requeue
    fi
}

cache() {
    local paths shards folder
    paths=$("$PYTHON" -m pipeline.config.paths "$@")
    { read -r shards && read -r _ && read -r folder; } <<< "$paths"
    rendezvous "$folder"
    stage "$shards"
    resumable "$folder" -m pipeline.cache_teacher "$@"
}

case ${1:-} in
    train | table | cache) ;;
    run) [ $# -gt 1 ] || usage_error "$@" ;;
    *) usage_error "$@" ;;
esac
# Since Slurm 22.05 srun does not inherit --cpus-per-task from sbatch.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}
fi
signalled=''
trap 'signalled=yes' USR1 TERM
guard_restarts
enable_debugging
"$@"
[ "$status" = 0 ] || report_failure
exit "$status"
