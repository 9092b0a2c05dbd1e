"""Every method in every precision: it trains, its loss stays finite, and no step waits for the GPU; without a graph."""

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

from checks import CheckAnswer, answer, cuda_device, losses_of, milliseconds, train_short
from pipeline.training.step import Step, StepOutput

_STEPS = 12


def check(options: Options, folder: Path) -> CheckAnswer:
    """Train a few steps of each, and return its milliseconds a step."""
    on_gpu = cuda_device().type == "cuda"
    precisions = ("fp32", "bf16", "fp16") if on_gpu else ("fp32",)
    methods = ["ce", "kd", "ddkd"] if options.rehearse else all_methods()
    rows, wrong = [], []
    for method in methods:
        cells = []
        for precision in precisions:
            try:
                cells.append(_milliseconds(options, folder / "run", method, precision, on_gpu))
            except Exception as error:
                wrong.append(f"{method} {precision}: {' '.join(str(error).split())[:160]}")
                cells.append("failed")
        rows.append([method, *cells])
    batch = 16 if options.rehearse else 64
    title = f"Milliseconds a step of every method, ResNet-56 → ResNet-20, B {batch}"
    return answer(title, ["method", *precisions], rows, wrong)


def _milliseconds(options: Options, run: Path, method: str, precision: str, strict: bool) -> str:
    shutil.rmtree(run, ignore_errors=True)
    words = [*short_run(options, method), f"precision={precision}", "graph=false"]
    with _no_waiting() if strict else mock.MagicMock():
        lines = train_short(
            run, *words, f"stop.steps={4 if options.rehearse else _STEPS}", "checkpoints.every_epochs=0"
        )
    if not all(map(math.isfinite, losses_of(lines))):
        raise ValueError("the loss is not finite")
    return f"{milliseconds(lines, after=2):.2f}"


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Let torch raise where a step has the host wait for the GPU, from the third on."""
    call, calls = Step.__call__, 0

    def strict(*args: Any) -> StepOutput:
        nonlocal calls
        calls += 1
        torch.cuda.set_sync_debug_mode("error" if calls > 2 else "default")
        try:
            return call(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with mock.patch.object(Step, "__call__", strict):
        yield
