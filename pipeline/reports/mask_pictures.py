"""Pictures of an evaluation of masks: IoU of each class, confusion of pixels, and some images with their masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.plots.pixels import draw_confusion, draw_ious
from pipeline.reports import page
from pipeline.reports.methods import TEACHER_COLOR
from pipeline.runs.evaluation_file import EvaluationFile
from pipeline.tasks._mask_images import class_color

_CLASSES = 20
"""Classes in a picture; of more, those with most pixels."""
_NETWORKS = 3
"""Networks in one picture besides the teacher."""


def draw_class_ious(evaluated: Sequence[tuple[str, int, EvaluationFile]]) -> list[tuple[str, str]]:
    """Return bars of the classes' IoU: of evaluations, each with a name and a colour, and of their teacher.

    The list is empty for another task.
    """
    networks: dict[str, tuple[int, list[float | None]]] = {}
    first = evaluated[0][2]
    for name, color, evaluation in evaluated[:_NETWORKS]:
        if evaluation.per_class and evaluation.per_class.iou:
            networks[name] = (color, list(evaluation.per_class.iou))
    if not networks:
        return []
    teacher = next((each.teacher for _, _, each in evaluated if each.teacher), None)
    if teacher is not None and teacher.per_class and teacher.per_class.iou:
        networks["teacher"] = (TEACHER_COLOR, list(teacher.per_class.iou))
    chosen, which = _largest(first)
    classes = [first.classes[number] for number in chosen]
    ious = {name: (color, [values[number] for number in chosen]) for name, (color, values) in networks.items()}
    text = "; ".join(
        f"{label}: {', '.join(f'{name} {_percent(values[row])}' for name, (_, values) in ious.items())}"
        for row, label in enumerate(classes)
    )
    svg = draw_ious("class-ious", f"Intersection over union of each class in percent. {text}", classes, ious)
    return [(f"IoU of {which}", svg)]


def draw_pixel_confusion(number: int, name: str, evaluation: EvaluationFile) -> list[tuple[str, str]]:
    """Return the confusion of the pixels of an evaluation; empty for another task."""
    if not (evaluation.per_class and evaluation.per_class.iou and evaluation.confusion):
        return []
    chosen, which = _largest(evaluation)
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


def draw_mask_sheet(name: str, folder: Path, evaluation: EvaluationFile) -> str:
    """Return some images with their masks, and the colours of the classes; empty without the file."""
    sheet = evaluation.masks
    if sheet is None or not (folder / sheet.file).is_file():
        return ""
    colours = [(evaluation.classes[number], class_color(number)) for number in sheet.classes]
    text = f"{name}: validation images with their masks. Grey pixels have no class."
    return page.sheet(text, sheet.columns, (folder / sheet.file).read_bytes(), colours)


def _largest(evaluation: EvaluationFile) -> tuple[list[int], str]:
    """Return the numbers of the classes that are drawn, and which these are in words."""
    samples = evaluation.per_class.samples if evaluation.per_class else ()
    if len(samples) <= _CLASSES:
        return list(range(len(samples))), "all classes"
    chosen = sorted(range(len(samples)), key=lambda number: -samples[number])[:_CLASSES]
    return chosen, f"the {_CLASSES} classes with most pixels of {len(samples)}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
