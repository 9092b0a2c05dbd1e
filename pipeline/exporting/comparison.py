"""The check of an exported file: its outputs are compared with those of the student on validation images."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.errors import RecipeError
from pipeline.exporting.trained import AT_ONCE, TrainedStudent
from pipeline.tasks._registry import find_task
from pipeline.tasks.multilabel import LABELS

LOGIT_TOLERANCE = 1e-3
"""Largest difference of a logit that is accepted, in units of the student's largest logit."""


class OutputComparison(NamedTuple):
    """How close the outputs of an exported file are to the student's."""

    images: int
    largest_difference: float
    """Largest absolute difference of a logit."""
    same: int
    """Number of images of which both have the same answer."""
    answer: str = "top-1"
    """What is the answer: the largest logit, or of images with several classes all decisions, or of a segmenter the
    largest logit of every pixel."""

    def __str__(self) -> str:
        return (
            f"largest difference of a logit {self.largest_difference:.2g}, the same {self.answer} on {self.same} of "
            f"{self.images} validation images"
        )


def compare_outputs(student: TrainedStudent, run: Callable[[Tensor], Tensor]) -> OutputComparison:
    """Run the exported network on the first image alone, then on all. Raises RecipeError if it differs."""
    scale = max(1.0, student.logits_BK.abs().max().item())
    _run_on(student, run, slice(0, 1), scale)
    pieces = [slice(start, start + AT_ONCE) for start in range(0, len(student.images_BCHW), AT_ONCE)]
    logits_BK, expected_BK = torch.cat([_run_on(student, run, piece, scale) for piece in pieces]), student.logits_BK
    difference = (logits_BK - expected_BK).abs().max().item()
    if LABELS in find_task(student.card.task).targets:
        same_B = ((logits_BK > 0) == (expected_BK > 0)).all(1)
        return OutputComparison(len(logits_BK), difference, int(same_B.sum()), "decisions")
    same = logits_BK.argmax(1) == expected_BK.argmax(1)
    answer = "top-1" if same.ndim == 1 else "class of every pixel"
    return OutputComparison(len(logits_BK), difference, int(same.view(len(same), -1).all(1).sum()), answer)


def _run_on(student: TrainedStudent, run: Callable[[Tensor], Tensor], rows: slice, scale: float) -> Tensor:
    """Return the exported network's logits of some images."""
    expected_BK = student.logits_BK[rows]
    try:
        logits_BK = run(student.images_BCHW[rows].contiguous())
    except Exception as error:  # the libraries that run the file raise errors of their own
        raise RecipeError(f"the exported file cannot take {len(expected_BK)} images: {_first_line(error)}") from error
    if logits_BK.shape != expected_BK.shape:
        raise RecipeError(f"the exported file returns {list(logits_BK.shape)} for {list(expected_BK.shape)}")
    difference = (logits_BK - expected_BK).abs().max().item()
    if not difference <= LOGIT_TOLERANCE * scale:
        raise RecipeError(
            f"the exported file gives other outputs than the student: a logit differs by {difference:.2g}, and "
            f"the largest is {scale:.2g}"
        )
    return logits_BK


def _first_line(error: Exception) -> str:
    return " ".join(str(error).partition("\n")[0].split())[:200]
