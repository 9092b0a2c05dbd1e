"""Half an hour on a new GPU: does the pipeline run there, is it right, how quick is it, and cells of the tables.

    python launchers/gpu/half_hour.py 1                       does it run, is it right
    python launchers/gpu/half_hour.py 2                       how quick it is
    python launchers/gpu/half_hour.py 3                       cells of CIFAR-100's tables
    python launchers/gpu/half_hour.py 1 2 3 --rehearse        all of it cut to a few steps, on any machine

Own words: ``out=runs/half_hour``; ``minutes=8.5``, the longest that each of the three may take; ``cifar=FOLDER``,
shards of CIFAR-100, and ``weights=FILE``, a ResNet-56 that knows them; ``jpegs=FOLDER``, shards of real photographs.
What is not given is drawn: enough to see that it runs and how quick it is.

A stage is a process of its own with a time limit, five times as long in a rehearsal, and cannot stop the next. Its
result is on disk before the next begins; the same command goes on where it was stopped, and skips what has passed.
``out/summary.md`` says how each ended, ``out/benchmarks.md`` holds the tables for BENCHMARKS.md, ``out/cells.yaml`` the
lines for ``configs/tables.yaml``. Exit code 1 if a stage failed or had no time.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    sys.path.insert(1, str(Path(__file__).resolve().parent))

from options import Options, read_options
from report import write_reports
from stages import HalfHourStage, stages_of
from supervise import StageResult, read_stage_result, run_stage, write_stage_result

from pipeline.cli import entry

LEAST = 20.0
"""Seconds that must be left for a stage to begin."""


def main(words: Sequence[str]) -> None:
    """Run the stages of the commands that are named, and write the reports."""
    options = read_options(words)
    options.out.mkdir(parents=True, exist_ok=True)
    results: list[StageResult] = []
    for command in options.commands:
        results += run_part(command, stages_of(command, options), options)
    if not all(result.passed for result in results):
        sys.exit(1)


def run_part(command: int, stages: Sequence[HalfHourStage], options: Options) -> list[StageResult]:
    """Run the stages one after the other, those that have passed left out, within the command's minutes."""
    deadline = time.monotonic() + 60 * options.minutes
    results = []
    for number, stage in enumerate(stages, 1):
        folder = options.out / f"{command}{number:02d}-{stage.name}"
        left = deadline - time.monotonic()
        result = read_stage_result(folder)
        if result is None or not result.passed or stage.goes_on:
            if left >= LEAST:
                result = run_stage(stage, folder, min(options.patience * stage.seconds, left))
            else:
                result = write_stage_result(folder, StageResult.out_of_time(stage))
        print(result, flush=True)
        results.append(result)
        write_reports(options.out, options.cifar is not None)
    return results


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # which ends the stage under way
    entry(main)
