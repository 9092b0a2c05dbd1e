"""Check that a resumed run ends with the same bytes as an uninterrupted one."""

from __future__ import annotations

import shutil
from pathlib import Path

from options import Options
from stages import short_run

from checks import CheckAnswer, answer, deterministic, journal_losses, saved_weights, train_short


def check(options: Options, folder: Path) -> CheckAnswer:
    """Train each method without interruption, and again with a stop in the middle, and compare."""
    rows, problems = [], []
    half, steps = options.steps // 2 + 1, options.steps
    with deterministic():
        for method in ("kd",) if options.rehearse else ("kd", "ddkd"):
            args = short_run(options, method)
            for name in ("whole", "stopped"):
                shutil.rmtree(folder / name, ignore_errors=True)
            uninterrupted = journal_losses(train_short(folder / "whole", *args, f"stop.steps={steps}"))
            train_short(folder / "stopped", *args, f"stop.steps={half}")
            stopped = journal_losses(train_short(folder / "stopped", *args, f"stop.steps={steps}"))
            weights = [saved_weights(folder / name, steps) for name in ("whole", "stopped")]
            same = uninterrupted == stopped and weights[0] == weights[1]
            rows.append([method, f"{half} of {steps}", "equal" if same else "differ"])
            problems += [] if same else [f"{method}: a resumed run differs"]
    return answer("Resumed against uninterrupted", ["method", "stopped after", "losses and weights"], rows, problems)
