"""Check runs that train side by side: the losses and weights of a run alone, and the speed of all together."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

from options import Options
from stages import CHECKOUT, short_run

from checks import CheckAnswer, answer, deterministic, reset_accelerator, saved_weights, train_short
from pipeline import compare
from pipeline.errors import Interrupted
from pipeline.runs.files import JOURNAL_FILE
from pipeline.training.journal import read_journal, trace

SEEDS = {"kd": (1, 2, 4, 8), "ddkd": (1, 2, 4)}
"""Numbers of runs that are timed, by method. Each run has a seed of its own."""
_SLOWLY = "schedule.rate=0.001"
"""Generated weights and small batches diverge at a table's rate, which neither equality nor speed depends on."""


def check(options: Options, folder: Path) -> CheckAnswer:
    """Compare two seeds side by side with each alone; then time more of them."""
    rows, problems = [], []
    for method, numbers in SEEDS.items():
        with deterministic():
            if not _is_equal(options, folder / f"{method}-equal", method):
                problems.append(f"{method}: losses or weights differ from those of a run alone")
        first = None
        for number in numbers[:2] if options.rehearse else numbers:
            rate = _images_per_second(options, folder / f"{method}-{number}", method, number)
            first = first or rate
            rows.append([method, number, f"{rate:,.0f}", f"{rate / first:.2f}"])
    columns = ["method", "runs", "images/s of all", "÷ one"]
    return answer("Seeds side by side in one process, ResNet-56 → ResNet-20", columns, rows, problems)


def _is_equal(options: Options, folder: Path, method: str) -> bool:
    """Return whether two seeds have the journals and weights of the same runs alone."""
    shutil.rmtree(folder, ignore_errors=True)  # of a check that was interrupted
    steps = 6 if options.rehearse else 24
    args = [f"stop.steps={steps}", _SLOWLY]
    together = _train_together(options, folder / "side", method, 2, ["journal={every_steps: 1, trackers: []}", *args])
    equal = []
    for seed, run in enumerate(together):
        alone = folder / f"alone-{seed}"
        train_short(alone, *short_run(options, method), *args, f"seed={seed}")
        equal.append(trace(run / JOURNAL_FILE) == trace(alone / JOURNAL_FILE))
        equal.append(saved_weights(run, steps) == saved_weights(alone, steps))
    return len(equal) == 4 and all(equal)


def _images_per_second(options: Options, folder: Path, method: str, number: int) -> float:
    """Return the images per second of all runs, between two lines of their journals."""
    every = 3 if options.rehearse else 100
    args = [f"journal={{every_steps: {every}, trackers: []}}", f"stop.steps={2 * every}", _SLOWLY]
    runs = _train_together(options, folder, method, number, args)
    # The second line begins after the graphs were captured.
    return sum(read_journal(run / JOURNAL_FILE)[-1]["timing"]["images_per_second"] for run in runs)


def _train_together(options: Options, folder: Path, method: str, number: int, args: list[str]) -> list[Path]:
    """Train that many seeds of a method side by side, and return their folders."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    reset_accelerator()
    seeds = ",".join(map(str, range(number)))
    pair, *overrides = short_run(options, method)
    command = [str(CHECKOUT / pair), *overrides, *args, "compare=null", f"seeds={seeds}", f"side={number}"]
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Interrupted):
        compare.main(command)
    return sorted(path.parent for path in folder.rglob(JOURNAL_FILE))
