"""The student's plain weights, written where a run leaves them."""

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

AnswerT = TypeVar("AnswerT")


def export(student: FeatureTaps, path: Path, accelerator: Accelerator, best: Best | None = None) -> None:
    """Write the weights, with BatchNorm statistics averaged over the ranks; every rank calls it."""
    with collectives.average_buffers(student), zero.gather_parameters(student):
        if accelerator.is_main_process:
            export_student(student.model, path, best)


def export_average(
    ema: EMA, student: FeatureTaps, path: Path, accelerator: Accelerator, measure: Callable[[], AnswerT]
) -> AnswerT:
    """Write the averaged weights, and return what ``measure`` finds while the student has them."""
    with ema.applied():
        export(student, path, accelerator)
        return measure()
