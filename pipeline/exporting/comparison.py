"""The check of an exported file: its outputs are compared with those of the student on validation images."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from pipeline.errors import RecipeError
from pipeline.exporting.trained import TrainedStudent

TOLERANCE = 1e-3
"""Largest difference of a logit that is accepted, in units of the student's largest logit."""


class Comparison(NamedTuple):
    """How close the outputs of an exported file are to the student's."""

    images: int
    largest_difference: float
    """Largest absolute difference of a logit."""
    same_top1: int
    """Number of images of which both have the same largest logit."""

    def __str__(self) -> str:
        return (
            f"largest difference of a logit {self.largest_difference:.2g}, the same top-1 on {self.same_top1} of "
            f"{self.images} validation images"
        )


def compare_outputs(student: TrainedStudent, run: Callable[[Tensor], Tensor]) -> Comparison:
    """Run the exported network on the images, all at once and the first alone. Raises RecipeError if it differs."""
    for rows in (1, len(student.images_BCHW)):
        expected_BK = student.logits_BK[:rows]
        try:
            logits_BK = run(student.images_BCHW[:rows].contiguous())
        except Exception as error:  # the libraries that run the file raise errors of their own
            raise RecipeError(f"the exported file cannot take {rows} images: {_first_line(error)}") from error
        if logits_BK.shape != expected_BK.shape:
            raise RecipeError(f"the exported file returns {list(logits_BK.shape)} for {list(expected_BK.shape)}")
        difference, scale = (logits_BK - expected_BK).abs().max().item(), max(1.0, expected_BK.abs().max().item())
        if not difference <= TOLERANCE * scale:
            raise RecipeError(
                f"the exported file gives other outputs than the student: a logit differs by {difference:.2g}, and "
                f"the largest is {scale:.2g}"
            )
    return Comparison(rows, difference, int((logits_BK.argmax(1) == expected_BK.argmax(1)).sum()))


def _first_line(error: Exception) -> str:
    return " ".join(str(error).partition("\n")[0].split())[:200]
