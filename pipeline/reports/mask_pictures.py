"""Pictures of an evaluation of masks: IoU of each class, and confusion of pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.plots.pixels import draw_confusion
from pipeline.reports.class_pictures import draw_classes, largest_classes
from pipeline.runs.evaluation_file import EvaluationFile


def draw_class_ious(evaluated: Sequence[tuple[str, int, EvaluationFile]]) -> list[tuple[str, str]]:
    """Return bars of the classes' IoU: of evaluations, each with a name and a colour, and of their teacher."""
    return draw_classes(evaluated, measure="IoU", spoken="Intersection over union", samples="pixels")


def draw_pixel_confusion(number: int, name: str, evaluation: EvaluationFile) -> list[tuple[str, str]]:
    """Return the confusion of the pixels of an evaluation; empty without any pixel."""
    if not evaluation.confusion:
        return []
    chosen, which = largest_classes(evaluation, "pixels")
    counts_KK = np.zeros((len(evaluation.classes), len(evaluation.classes)))
    for label, predicted, count in evaluation.confusion:
        counts_KK[label, predicted] = count
    with np.errstate(invalid="ignore"):  # a class without a pixel has no share
        shares_KK = (100 * counts_KK / counts_KK.sum(1, keepdims=True))[np.ix_(chosen, chosen)]
    classes = [evaluation.classes[each] for each in chosen]
    wrong = sorted(
        ((shares_KK[row, column], row, column) for row, column in np.ndindex(shares_KK.shape) if row != column),
        key=lambda each: -np.nan_to_num(each[0]),
    )
    text = "; ".join(
        f"{share:.1f} % of {classes[row]} taken for {classes[column]}" for share, row, column in wrong[:10]
    )
    title = f"Which class pixels of {name} are taken for, in percent of the pixels of the class. {text}"
    svg = draw_confusion(f"confusion-{number}", title, classes, shares_KK)
    return [(f"{name}: pixels of {which}, taken for which class, %", svg)]
