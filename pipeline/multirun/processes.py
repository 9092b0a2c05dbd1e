"""Runs trained in processes of their own, each on a share of the cores."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from pipeline.distributed import signals
from pipeline.errors import SOURCE
from pipeline.runs.drawing import undrawn_environment
from pipeline.runs.identity import Run
from pipeline.tasks._registry import find_task
from pipeline.training.result import percent
from shards.cores import usable_cores


def train_all(runs: Sequence[Run], jobs: int) -> list[str]:
    """Train the runs, ``jobs`` at a time, print the result of each, and return the errors of those that failed.

    A signal to stop ends the current runs, which can be resumed, and begins no other.
    """
    shares: SimpleQueue[list[int]] = SimpleQueue()
    cores = usable_cores()
    for job in range(jobs):  # with more jobs than cores, a job without a core of its own uses all
        shares.put(cores[job::jobs] or cores)
    signals.install()

    def train_one(run: Run) -> str | None:
        share = shares.get()
        try:
            return None if signals.stop_requested() else train_run(run, share, quiet=jobs > 1)
        finally:
            shares.put(share)

    with ThreadPoolExecutor(jobs) as pool:
        return [failure for failure in pool.map(train_one, runs) if failure]


def train_run(run: Run, cores: list[int], *, quiet: bool) -> str | None:
    """Train one run in a process of its own on ``cores``, and return its error, None if there is none."""
    command = [sys.executable, str(SOURCE / "pipeline" / "train.py"), *run.source.args, *run.overrides]
    output = subprocess.PIPE if quiet else None
    environment = {**undrawn_environment(), "OMP_NUM_THREADS": str(len(cores))}
    with subprocess.Popen(command, stdout=output, stderr=output, text=True, env=environment) as process:
        if hasattr(os, "sched_setaffinity"):  # where there is none, such as macOS, the number of threads is all
            os.sched_setaffinity(process.pid, cores)
        with signals.forward_to(process.terminate):
            _, errors = process.communicate()
    # The process ended before it could handle signals, so it had nothing to save.
    if signals.stop_requested() and process.returncode in (-signal.SIGTERM, -signal.SIGINT):
        return None
    if process.returncode:
        reason = errors.strip().splitlines()[-1] if errors else f"exit code {process.returncode}"
        return f"{run.command} {shlex.join(run.overrides)}: {reason}"
    if run.result is not None:
        last, best = percent(run.result.last), percent(run.result.best)
        print(f"{run.folder}: {find_task(run.recipe.task).title} {last}, best {best}", flush=True)
    return None
