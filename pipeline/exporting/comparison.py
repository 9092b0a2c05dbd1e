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
    largest logit of every pixel. An enlarged image has none, and ``same`` is 0."""

    def __str__(self) -> str:
        if not self.answer:
            return f"largest difference of a value {self.largest_difference:.2g} on {self.images} parts in two sizes"
        return (
            f"largest difference of a logit {self.largest_difference:.2g}, the same {self.answer} on {self.same} of "
            f"{self.images} validation images"
        )


def compare_outputs(student: TrainedStudent, run: Callable[[Tensor], Tensor]) -> OutputComparison:
    """Run the exported network on the first image alone, then on all. Raises RecipeError if it differs."""
    images_BCHW, expected_BK = student.images_BCHW, student.logits_BK
    scale = max(1.0, expected_BK.abs().max().item())
    _run_on(images_BCHW[:1], expected_BK[:1], run, scale)
    logits_BK = _run_pieces(images_BCHW, expected_BK, run, scale)
    difference = (logits_BK - expected_BK).abs().max().item()
    if student.other_size:
        others_BK = _run_pieces(*student.other_size, run, scale)
        largest = max(difference, (others_BK - student.other_size[1]).abs().max().item())
        return OutputComparison(len(logits_BK), largest, 0, "")
    if LABELS in find_task(student.card.task).targets:
        same_B = ((logits_BK > 0) == (expected_BK > 0)).all(1)
        return OutputComparison(len(logits_BK), difference, int(same_B.sum()), "decisions")
    same = logits_BK.argmax(1) == expected_BK.argmax(1)
    answer = "top-1" if same.ndim == 1 else "class of every pixel"
    return OutputComparison(len(logits_BK), difference, int(same.view(len(same), -1).all(1).sum()), answer)


def _run_pieces(images_BCHW: Tensor, expected_BK: Tensor, run: Callable[[Tensor], Tensor], scale: float) -> Tensor:
    """Return the exported network's logits of all images, some at once."""
    pieces = zip(images_BCHW.split(AT_ONCE), expected_BK.split(AT_ONCE), strict=True)
    return torch.cat([_run_on(*piece, run, scale) for piece in pieces])


def _run_on(images_BCHW: Tensor, expected_BK: Tensor, run: Callable[[Tensor], Tensor], scale: float) -> Tensor:
    """Return the exported network's logits of some images. Raises RecipeError if they differ from the student's."""
    try:
        logits_BK = run(images_BCHW.contiguous())
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
