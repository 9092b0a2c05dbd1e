"""Check and measure the pipeline on a new GPU, within half an hour.

    python launchers/gpu/half_hour.py 1                       does the pipeline run, and are its results correct
    python launchers/gpu/half_hour.py 2                       how fast is it
    python launchers/gpu/half_hour.py 3                       results for CIFAR-100's tables
    python launchers/gpu/half_hour.py 1 2 3 --rehearse        everything, cut to a few steps, on any machine

Options:

- ``out=runs/half_hour``, the output folder,
- ``minutes=8.5``, the time limit of each of the three commands,
- ``cifar=FOLDER``, shards of CIFAR-100,
- ``weights=FILE``, weights of a ResNet-56 trained on them,
- ``jpegs=FOLDER``, shards of real photographs,
- ``stages=NAME,NAME``, the stages to run; others need what ``inputs`` writes.

Missing inputs are generated at random, which is enough to test and to measure speed.

Each stage is a process with a time limit, which is five times as long in a rehearsal. A stage that fails does not stop
the next one. Its result is on disk before the next stage begins. After an interruption the same command continues and
skips stages that have passed.

``out/summary.md`` lists the result of every stage, and ``out/benchmarks.md`` contains the tables for BENCHMARKS.md.
With ``cifar=`` and ``weights=``, ``out/results/`` contains the finished runs of command 3: copy it to
``configs/results/`` and run ``python configs/results.py``. The exit code is 1 if a stage failed or had no time.
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
from pipeline.errors import RecipeError

MIN_SECONDS = 20.0
"""Remaining seconds that a stage needs to begin."""


def main(args: Sequence[str]) -> None:
    """Run the stages of the chosen commands, and write the reports."""
    options = read_options(args)
    options.out.mkdir(parents=True, exist_ok=True)
    results: list[StageResult] = []
    for stages in choose_stages(options):
        results += run_part(stages, options)
    if not all(result.passed for result in results):
        sys.exit(1)


def choose_stages(options: Options) -> list[dict[str, HalfHourStage]]:
    """Return the stages to run of each command, by the name of their folder.

    Raises RecipeError for a name in ``stages=`` that no chosen command has.
    """
    parts = [
        {f"{command}{number:02d}-{stage.name}": stage for number, stage in enumerate(stages_of(command, options), 1)}
        for command in options.commands
    ]
    if options.stages is None:
        return parts
    wanted = options.stages.split(",")
    known = [stage.name for part in parts for stage in part.values()]
    if unknown := [name for name in wanted if name not in known]:
        raise RecipeError(f"command line: stages: no stage {unknown[0]!r} in these commands; known: {', '.join(known)}")
    return [{folder: stage for folder, stage in part.items() if stage.name in wanted} for part in parts]


def run_part(stages: dict[str, HalfHourStage], options: Options) -> list[StageResult]:
    """Run the stages of a command in order, within its minutes, and return their results; passed stages are skipped.

    ``stages`` are by the name of the folder of their result.
    """
    deadline = time.monotonic() + 60 * options.minutes
    results = []
    for name, stage in stages.items():
        folder = options.out / name
        left = deadline - time.monotonic()
        result = read_stage_result(folder)
        if result is None or not result.passed or stage.rerun_if_passed:
            if left >= MIN_SECONDS:
                result = run_stage(stage, folder, min(options.time_factor * stage.seconds, left))
            else:
                result = write_stage_result(folder, StageResult.out_of_time(stage))
        print(result, flush=True)
        results.append(result)
        write_reports(options.out, options.is_real)
    return results


if __name__ == "__main__":
    # SystemExit unwinds through run_stage, which ends the running stage.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    entry(main)
