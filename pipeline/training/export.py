"""Export of the student's plain weights and of their moving average."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator

from pipeline.distributed import collectives
from pipeline.features.taps import FeatureTaps
from pipeline.optim.ema import EMA
from pipeline.training import zero
from pipeline.training.checkpoint import Best, export_student

_T = TypeVar("_T")


def export(student: FeatureTaps, path: Path, accelerator: Accelerator, best: Best | None = None) -> None:
    """Write the weights, with BatchNorm statistics averaged over the ranks; every rank calls it."""
    # Both contexts run collectives, so every rank enters them before the main process writes.
    with collectives.average_buffers(student), zero.gather_parameters(student):
        if accelerator.is_main_process:
            export_student(student.model, path, best)


def export_average(
    ema: EMA, student: FeatureTaps, path: Path, accelerator: Accelerator, measure: Callable[[], _T]
) -> _T:
    """Write the averaged weights, and return the result of ``measure`` while the student uses them."""
    with ema.applied():
        export(student, path, accelerator)
        return measure()
