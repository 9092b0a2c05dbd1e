"""Pictures of single classes of networks that find pixels or boxes."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.plots.percents import Percents, draw_percents
from pipeline.reports.methods import TEACHER_COLOR
from pipeline.runs.evaluation_file import EvaluatedTeacher, EvaluationFile

_MOST_CLASSES = 20
"""Classes in a picture; of more, those with most pixels or objects."""
MOST_NETWORKS = 3
"""Networks in one picture besides the teacher."""


def draw_classes(
    evaluated: Sequence[tuple[str, int, EvaluationFile]], *, measure: str, spoken: str, samples: str
) -> list[tuple[str, str]]:
    """Return bars of a measure of the classes: of evaluations, each with a name and a colour, and of their teacher.

    ``spoken`` is the measure in words, and ``samples`` what a class has many of.
    """
    networks = {
        name: (color, evaluation.per_class.percent)
        for name, color, evaluation in evaluated[:MOST_NETWORKS]
        if evaluation.per_class
    }
    teacher = first_teacher(evaluated)
    if teacher is not None and teacher.per_class:
        networks["teacher"] = (TEACHER_COLOR, teacher.per_class.percent)
    chosen, which = largest_classes(evaluated[0][2], samples)
    classes = [evaluated[0][2].classes[number] for number in chosen]
    found = {name: (color, [values[number] for number in chosen]) for name, (color, values) in networks.items()}
    title = f"{spoken} of each class in percent. {spoken_percents(classes, found)}"
    svg = draw_percents(f"class-{measure.lower()}s", title, classes, found, f"{measure}, %")
    return [(f"{measure} of {which}", svg)]


def first_teacher(evaluated: Sequence[tuple[str, int, EvaluationFile]]) -> EvaluatedTeacher | None:
    """Return the teacher of the first evaluation that has one."""
    return next((each.teacher for _, _, each in evaluated if each.teacher), None)


def spoken_percents(labels: Sequence[str], networks: Percents) -> str:
    """Return the percentages as text, for those who cannot see the picture."""
    return "; ".join(
        f"{label}: {', '.join(f'{name} {_percent(values[row])}' for name, (_, values) in networks.items())}"
        for row, label in enumerate(labels)
    )


def largest_classes(evaluation: EvaluationFile, samples: str) -> tuple[list[int], str]:
    """Return the numbers of the classes that are drawn, and which these are in words."""
    counts = evaluation.per_class.samples if evaluation.per_class else ()
    if len(counts) <= _MOST_CLASSES:
        return list(range(len(counts))), "all classes"
    chosen = sorted(range(len(counts)), key=lambda number: -counts[number])[:_MOST_CLASSES]
    return chosen, f"the {_MOST_CLASSES} classes with most {samples} of {len(counts)}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
