"""Check every method with a CUDA graph: same losses and weights as without one, and the speed-up."""

from __future__ import annotations

import shutil
from pathlib import Path

from options import Options
from stages import all_methods, short_run

from checks import (
    CheckAnswer,
    answer,
    cuda_device,
    deterministic,
    journal_losses,
    median_milliseconds,
    saved_weights,
    train_short,
)
from pipeline.training.graph import EAGER_STEPS

_STEPS = 24
HALF_PRECISION_METHODS = ("kd", "crd", "ddkd")
"""Methods that are also checked in half precision."""


def check(options: Options, folder: Path) -> CheckAnswer:
    """Train a few steps of each method with and without a graph, and compare. A CPU never uses a graph."""
    methods = ["kd", "review"] if options.rehearse else all_methods()
    cases = [(method, "fp32") for method in methods]
    if cuda_device().type == "cuda":
        cases += [
            (method, precision)
            for method in methods
            if method in HALF_PRECISION_METHODS
            for precision in ("bf16", "fp16")
        ]
    rows, problems = [], []
    with deterministic():
        for method, precision in cases:
            try:
                eager, graphed, same = _compare_runs(options, folder, method, precision)
            except Exception as error:
                problems.append(f"{method} {precision}: {' '.join(str(error).split())[:300]}")
                rows.append([method, precision, "failed", "", "", ""])
                continue
            problems += [] if same else [f"{method} {precision}: losses or weights differ with a graph"]
            ratio = f"{eager / graphed:.2f}"
            rows.append([method, precision, f"{eager:.2f}", f"{graphed:.2f}", ratio, "equal" if same else "differ"])
    columns = ["method", "precision", "ms per step", "with a graph", "ratio", "losses and weights"]
    title = "A step as a CUDA graph, every step logged, deterministic algorithms, ResNet-56 → ResNet-20"
    return answer(title, columns, rows, problems)


def _compare_runs(options: Options, folder: Path, method: str, precision: str) -> tuple[float, float, bool]:
    """Return the milliseconds per step without and with a graph, and whether both runs are identical."""
    # The first EAGER_STEPS steps run without a graph, and the next one captures it: none of them is timed.
    steps, found = (EAGER_STEPS + 3 if options.rehearse else _STEPS), []
    for graph in ("false", "auto"):
        run = folder / graph
        shutil.rmtree(run, ignore_errors=True)
        args = [*short_run(options, method), f"precision={precision}", f"graph={graph}", f"stop.steps={steps}"]
        lines = train_short(run, *args)
        found.append(
            (median_milliseconds(lines, skip=EAGER_STEPS + 1), journal_losses(lines), saved_weights(run, steps))
        )
    (eager, *first), (graphed, *second) = found
    return eager, graphed, first == second
