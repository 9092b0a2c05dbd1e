"""A run that was stopped ends in the same bytes as one that was not."""

from __future__ import annotations

import shutil
from pathlib import Path

from options import Options
from stages import short_run

from checks import CheckAnswer, answer, deterministic, losses_of, saved_weights, train_short


def check(options: Options, folder: Path) -> CheckAnswer:
    """Train each method whole, and stopped in the middle and continued."""
    rows, wrong = [], []
    half, steps = options.steps // 2 + 1, options.steps
    with deterministic():
        for method in ("kd",) if options.rehearse else ("kd", "ddkd"):
            words = short_run(options, method)
            for name in ("whole", "stopped"):
                shutil.rmtree(folder / name, ignore_errors=True)
            whole = losses_of(train_short(folder / "whole", *words, f"stop.steps={steps}"))
            train_short(folder / "stopped", *words, f"stop.steps={half}")
            stopped = losses_of(train_short(folder / "stopped", *words, f"stop.steps={steps}"))
            weights = [saved_weights(folder / name, steps) for name in ("whole", "stopped")]
            same = whole == stopped and weights[0] == weights[1]
            rows.append([method, f"{half} of {steps}", "equal" if same else "differ"])
            wrong += [] if same else [f"{method}: a resumed run differs"]
    return answer("Resumed against whole", ["method", "stopped after", "losses and weights"], rows, wrong)
