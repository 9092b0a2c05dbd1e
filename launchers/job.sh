#!/usr/bin/env bash
# A whole Slurm job, from its batch script: the files in slurm/ are a header and one call of this.
#
#   launchers/job.sh train RECIPE [key=value …]          one task a GPU; requeued when it was preempted
#   launchers/job.sh table [RECIPE …] [key=value …]      the same for one recipe of an array; by default ImageNet's, all of them
#   launchers/job.sh run SCRIPT [argument …]             a resumable Python script in one task; requeued when it was stopped
#   launchers/job.sh cache RECIPE [key=value …]          the recipe's teacher, cached; one task a GPU; requeued when it was stopped
#
# From the environment of sbatch, all optional:
#   DRY_RUN=1                   print what would run
#   STAGE=FOLDER                copy a recipe's shards to this folder of every node's own disk first (default: SLURM_TMPDIR; empty: do not)
#   MASTER_ADDR, MASTER_PORT    where the ranks meet, instead of the first node and a port that follows from the job
#   MAX_RESTARTS=50             how often a job may begin again
#   PYTHON                      the interpreter (default: .venv's, else python)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/word.sh"

python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python
export PYTHON=$python DRY_RUN=${DRY_RUN:-}
# sbatch --export says what this script gets, and srun would keep to it, too: the tasks need what is exported here.
export SLURM_EXPORT_ENV=ALL

nodes=${SLURM_JOB_NUM_NODES:-1}
restarts=${SLURM_RESTART_COUNT:-0}
# An array's first id is also that of the whole array, which a requeue of one task must not touch.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
job=${job:-${SLURM_JOB_ID:-0}}

say() { printf '%s\n' "job $job: $*" >&2; }

show() { printf '$ %s\n' "${*@Q}"; }

misused() {
    say "error: expected train RECIPE, table, cache RECIPE or run SCRIPT, got '$*'"
    exit 2
}

guard_restarts() {
    if [ "$restarts" -gt "${MAX_RESTARTS:-50}" ]; then
        say "error: began again $restarts times; look into the log, then submit it again (or give MAX_RESTARTS=N)"
        exit 1
    fi
}

# Where the ranks of what begins meet. Ports from 20000 on lie below those that Linux gives to outgoing connections (32768 on); this
# script runs on the first node, so it can see which one is taken.
rendezvous() {
    if [ -z "${MASTER_ADDR:-}" ]; then
        local hosts=("$(hostname)")
        [ -z "${SLURM_JOB_NODELIST:-}" ] || mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        export MASTER_ADDR=${hosts[0]}
    fi
    if [ -z "${MASTER_PORT:-}" ]; then
        MASTER_PORT=$((20000 + ${SLURM_JOB_ID:-0} % 10000))
        while (: < "/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2> /dev/null; do
            say "port $MASTER_PORT of $MASTER_ADDR is taken; trying the next"
            MASTER_PORT=$((MASTER_PORT + 1))
        done
        export MASTER_PORT
    fi
    # A shared file system that is cold lets some ranks load for minutes; a rank that failed ends the step by itself.
    export PIPELINE_RENDEZVOUS_SECONDS=${PIPELINE_RENDEZVOUS_SECONDS:-600}
    say "start $((restarts + 1)) of $1 on $nodes nodes, ${SLURM_NTASKS:-1} ranks, which meet at $MASTER_ADDR:$MASTER_PORT"
}

# What a hang or a crash leaves behind, for every start and rank on its own; no interface is forced.
debugging() {
    debug=$PWD/slurm/logs/debug/$job-start-$((restarts + 1))
    [ -n "$DRY_RUN" ] || mkdir -p "$debug"
    export PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1 NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    export TORCH_FR_DUMP_ON_TIMEOUT=1 TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
    export TORCH_FR_DUMP_TEMP_FILE=$debug/nccl-rank-
}

# Run srun to its end and return its exit code. A signal to this script goes on to the tasks, again and again: one that is still
# starting may have missed it, and one that listens takes no harm.
supervised() {
    local running pause status=0
    # Until srun itself listens it must not die of one.
    (trap '' USR1 TERM && exec srun "$@") &
    running=$!
    while kill -0 "$running" 2> /dev/null; do
        sleep 5 &
        pause=$!
        wait -n "$running" "$pause" || true
        kill "$pause" 2> /dev/null || true
        [ -z "$told" ] || kill -USR1 "$running" 2> /dev/null || true
    done
    wait "$running" || status=$?
    return "$status"
}

# Stage the shards in folder $1, in a step of its own: it ends when the last node is done, so that no rank waits for another in a
# rendezvous, which has a limit. Whatever goes wrong, the shared folder is there.
stage() {
    STAGE=${STAGE-${SLURM_TMPDIR:-}}
    [ -n "$STAGE" ] || return 0
    export STAGE SHARDS=$1
    local words=(--nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --label "$PYTHON" shards/stage.py "$SHARDS" "$STAGE")
    if [ -n "$DRY_RUN" ]; then
        show srun "${words[@]}"
    else
        supervised "${words[@]}" || say "not every node could stage; those read $SHARDS"
    fi
}

# Run the job's tasks and set `status`.
step() {
    local words=(--kill-on-bad-exit=1 --wait=60 --label "$@") tee
    status=0
    if [ -n "$DRY_RUN" ]; then
        show srun "${words[@]}"
        "$@"
        return
    fi
    exec 3> >(trap '' USR1 TERM && exec tee "$debug/errors.txt" >&2)
    tee=$!
    supervised "${words[@]}" 2>&3 || status=$?
    exec 3>&-
    wait "$tee" || true
}

# Say which rank failed first: srun ends the others after it.
explain() {
    local first
    first=$(sed -nE '/^srun: error: ([^ :]+): tasks? ([^:]+): (.+)$/{s//rank \2 on \1: \3/p;q}' "$debug/errors.txt")
    say "error: ${first:-srun failed}; the step ended with exit code $status, what it wrote stands above and in $debug"
}

requeue() {
    # A job that its owner cancelled was told to stop, too.
    if [ "$(squeue --noheader --jobs="$job" --format=%T)" != RUNNING ]; then
        say "it was cancelled; submitting it again continues it"
        return
    fi
    say "stopped by a signal; requeued, it continues"
    scontrol requeue "$job"
}

# Run tasks that write into folder $1 and leave the file preempted there when a signal ended them and all that they did is saved.
resumable() {
    local folder=$1
    [ -n "$DRY_RUN" ] || rm -f "$folder/preempted"
    if [ -n "$told" ]; then # before anything began, so nothing is lost
        mkdir -p "$folder"
        touch "$folder/preempted"
    else
        step launchers/node.sh "${@:2}"
    fi
    if [ -e "$folder/preempted" ]; then
        requeue
        exit 0
    fi
}

train() {
    local paths shards folder
    paths=$("$PYTHON" pipeline/config/paths.py "$@")
    { read -r shards && read -r folder; } <<< "$paths"
    rendezvous "$folder"
    stage "$shards"
    resumable "$folder" pipeline/train.py "$@" "$(word folder "$folder")"
}

table() {
    local recipes=() overrides=() word index=${SLURM_ARRAY_TASK_ID:-0}
    for word; do
        if [[ $word == *=* ]]; then overrides+=("$word"); else recipes+=("$word"); fi
    done
    if [ ${#recipes[@]} = 0 ]; then
        for word in configs/imagenet/*/*.yaml; do
            # A row that reads a cache is that row once more.
            [[ $word == */pair.yaml || $word == *_cached.yaml ]] || recipes+=("$word")
        done
    fi
    if [ "$index" -ge ${#recipes[@]} ]; then
        say "error: there are ${#recipes[@]} recipes; give --array=0-$((${#recipes[@]} - 1))"
        exit 2
    fi
    train "${recipes[index]}" "${overrides[@]}"
}

run() {
    step launchers/node.sh "$@"
    # 128 + SIGTERM or SIGUSR1: it was stopped, and what is done stays.
    if [ "$status" = 143 ] || [ "$status" = 138 ]; then
        requeue
    fi
}

cache() {
    local paths shards folder
    paths=$("$PYTHON" pipeline/config/paths.py "$@")
    { read -r shards && read -r _ && read -r folder; } <<< "$paths"
    rendezvous "$folder"
    stage "$shards"
    resumable "$folder" pipeline/cache_teacher.py "$@"
}

case ${1:-} in
    train | table | cache) ;;
    run) [ $# -gt 1 ] || misused "$@" ;;
    *) misused "$@" ;;
esac
# srun does not take over from sbatch how many cores a task has (Slurm 22.05 on).
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}
fi
told=''
trap 'told=yes' USR1 TERM
guard_restarts
debugging
"$@"
[ "$status" = 0 ] || explain
exit "$status"
