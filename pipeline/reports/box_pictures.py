"""Pictures of an evaluation of boxes: AP by threshold and size, and of each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.plots.percents import draw_percents
from pipeline.reports.class_pictures import MOST_NETWORKS, draw_classes, first_teacher, spoken_percents
from pipeline.reports.methods import TEACHER_COLOR
from pipeline.runs.evaluation_file import EvaluationFile


def draw_box_metrics(
    evaluated: Sequence[tuple[str, int, EvaluationFile]], titles: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Return bars of AP and AR, by the titles of the task's metrics: of evaluations, and of their teacher."""
    networks = {name: (color, evaluation.metrics) for name, color, evaluation in evaluated[:MOST_NETWORKS]}
    if (teacher := first_teacher(evaluated)) is not None:
        networks["teacher"] = (TEACHER_COLOR, teacher.metrics)
    found = {name: (color, [metrics.get(key) for key in titles]) for name, (color, metrics) in networks.items()}
    labels = list(titles.values())
    title = f"Average precision and recall of boxes in percent. {spoken_percents(labels, found)}"
    return [("AP and AR by size of the objects", draw_percents("box-metrics", title, labels, found, "%"))]


def draw_class_aps(evaluated: Sequence[tuple[str, int, EvaluationFile]]) -> list[tuple[str, str]]:
    """Return bars of the classes' AP: of evaluations, each with a name and a colour, and of their teacher."""
    return draw_classes(evaluated, measure="AP", spoken="Average precision", samples="objects")
