"""Check every method in every precision, without a graph: its loss is finite, and no step waits for the GPU."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from options import Options
from stages import all_methods, short_run

from checks import CheckAnswer, answer, cuda_device, journal_losses, median_milliseconds, train_short
from pipeline.training.step import Step, StepOutput

_STEPS = 12


def check(options: Options, folder: Path) -> CheckAnswer:
    """Train a few steps of each method, and return its milliseconds per step."""
    on_gpu = cuda_device().type == "cuda"
    precisions = ("fp32", "bf16", "fp16") if on_gpu else ("fp32",)
    methods = ["ce", "kd", "ddkd"] if options.rehearse else all_methods()
    rows, problems = [], []
    for method in methods:
        cells = []
        for precision in precisions:
            try:
                cells.append(_milliseconds(options, folder / "run", method, precision, on_gpu))
            except Exception as error:
                problems.append(f"{method} {precision}: {' '.join(str(error).split())[:160]}")
                cells.append("failed")
        rows.append([method, *cells])
    batch = 16 if options.rehearse else 64
    title = f"Milliseconds per step of every method, ResNet-56 → ResNet-20, B {batch}"
    return answer(title, ["method", *precisions], rows, problems)


def _milliseconds(options: Options, run: Path, method: str, precision: str, strict: bool) -> str:
    shutil.rmtree(run, ignore_errors=True)
    args = [*short_run(options, method), f"precision={precision}", "graph=false"]
    with _forbid_synchronization() if strict else mock.MagicMock():
        lines = train_short(run, *args, f"stop.steps={4 if options.rehearse else _STEPS}", "checkpoints.every_epochs=0")
    if not all(map(math.isfinite, journal_losses(lines))):
        raise ValueError("the loss is not finite")
    return f"{median_milliseconds(lines, skip=2):.2f}"


@contextmanager
def _forbid_synchronization() -> Iterator[None]:
    """Raise RuntimeError inside the context if a step makes the host wait for the GPU, from the third step on."""
    call, calls = Step.__call__, 0

    def strict(*args: Any) -> StepOutput:
        nonlocal calls
        calls += 1
        # Libraries may wait in the first two steps, while they allocate memory and choose algorithms.
        torch.cuda.set_sync_debug_mode("error" if calls > 2 else "default")
        try:
            return call(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with mock.patch.object(Step, "__call__", strict):
        yield
