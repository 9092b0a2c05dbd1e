"""Every method by a CUDA graph: the same losses and weights as without one, and how much quicker."""

from __future__ import annotations

import shutil
from pathlib import Path

from options import Options
from stages import all_methods, short_run

from checks import CheckAnswer, answer, cuda_device, deterministic, losses_of, milliseconds, saved_weights, train_short
from pipeline.training.graph import EAGER_STEPS

_STEPS = 24
PRECISE = ("kd", "crd", "ddkd")
"""Methods that are tried in half precision, too."""


def check(options: Options, folder: Path) -> CheckAnswer:
    """Train a few steps of each both ways, and compare. Where there is no GPU both are without a graph."""
    methods = ["kd", "review"] if options.rehearse else all_methods()
    cases = [(method, "fp32") for method in methods]
    if cuda_device().type == "cuda":
        cases += [(method, precision) for method in methods if method in PRECISE for precision in ("bf16", "fp16")]
    rows, wrong = [], []
    with deterministic():
        for method, precision in cases:
            try:
                eager, graphed, same = _both(options, folder, method, precision)
            except Exception as error:
                wrong.append(f"{method} {precision}: {' '.join(str(error).split())[:300]}")
                rows.append([method, precision, "failed", "", "", ""])
                continue
            wrong += [] if same else [f"{method} {precision}: a graph's run differs"]
            ratio = f"{eager / graphed:.2f}"
            rows.append([method, precision, f"{eager:.2f}", f"{graphed:.2f}", ratio, "equal" if same else "differ"])
    columns = ["method", "precision", "ms a step", "by a graph", "ratio", "losses and weights"]
    title = "A step as a CUDA graph, every step written down, deterministic algorithms, ResNet-56 → ResNet-20"
    return answer(title, columns, rows, wrong)


def _both(options: Options, folder: Path, method: str, precision: str) -> tuple[float, float, bool]:
    """Return the milliseconds of a step without a graph and with one, and whether both runs are the same."""
    steps, found = (EAGER_STEPS + 3 if options.rehearse else _STEPS), []
    for graph in ("false", "auto"):
        run = folder / graph
        shutil.rmtree(run, ignore_errors=True)
        words = [*short_run(options, method), f"precision={precision}", f"graph={graph}", f"stop.steps={steps}"]
        lines = train_short(run, *words)
        found.append((milliseconds(lines, after=EAGER_STEPS + 1), losses_of(lines), saved_weights(run, steps)))
    (eager, *first), (graphed, *second) = found
    return eager, graphed, first == second
