"""Pictures of ``evaluation.json``: calibration, and the classes that gained and lost most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.commands import as_started
from pipeline.plots.classes import draw_class_gains
from pipeline.plots.reliability import Bins, draw_reliability
from pipeline.reports import page
from pipeline.reports.box_pictures import draw_box_metrics, draw_class_aps
from pipeline.reports.mask_pictures import draw_class_ious, draw_pixel_confusion
from pipeline.reports.methods import ALONE_COLOR, TEACHER_COLOR, MethodRuns, colored
from pipeline.reports.references import References
from pipeline.reports.reported_run import ReportedRun
from pipeline.runs.evaluation_file import EvaluatedTeacher, EvaluationFile, PerClass
from pipeline.tasks._base import Task
from pipeline.tasks._mask_images import class_color

_HEADS = {"nll": "NLL, nats", "ece": "calibration error, %"}
_SHOWN = 10
"""Classes that gained most, and classes that lost most."""
_MOST = 6
"""Networks in one picture."""


class Evaluated(NamedTuple):
    """The evaluation that stands for a method."""

    name: str
    """Of the method."""
    color: int
    run: ReportedRun
    evaluation: EvaluationFile


def draw_evaluations(methods: Sequence[MethodRuns], references: References) -> str:
    """Return the section of the evaluations; without any, the command that makes one."""
    evaluated = _evaluated(methods, references)
    if not evaluated:
        run = methods[0].first_run
        agreement = "" if run.teaches_itself else " agreement=yes"
        text = f"{_also(run).capitalize()} and single classes are shown once the run is evaluated:"
        return page.section(
            _heading(run),
            page.note(text, as_started(f"python pipeline/evaluate.py {run.folder}{agreement}")),
        )
    alone = next((run for run in references.alone if run.evaluation), None)
    task = methods[0].first_run.task
    rows = [_row(f"{each.name}, seed {each.run.recipe.seed}", each.evaluation, task) for each in evaluated]
    teacher = next((each.evaluation.teacher for each in evaluated if each.evaluation.teacher), None)
    rows += [_row(f"teacher {teacher.name}", teacher, task)] if teacher else []
    columns = list(dict.fromkeys(key for row in rows for key in row))
    values = [[row.get(key, "") for key in columns] for row in rows]
    drawn = [_reliability(evaluated[:_MOST], teacher, alone)]
    drawn += [_gains(number, each, alone) for number, each in enumerate(evaluated[:_MOST])]
    drawn += _of_task(task, evaluated)
    sheets = [_sheet(each) for each in evaluated[:_MOST]]
    stale = [
        page.note(f"{run.folder}: evaluation.json is of weights that this run no longer has; evaluate it again.")
        for _, _, run, evaluation in evaluated
        if evaluation.sha256 and run.result and evaluation.sha256 not in run.result.sha256.values()
    ]
    pictures = page.pictures([each for each in drawn if each])
    return page.section(_heading(methods[0].first_run), page.table(columns, values), pictures, *sheets, *stale)


def _heading(run: ReportedRun) -> str:
    return f"Single classes and {_also(run)}"


def _also(run: ReportedRun) -> str:
    known = {"masks": run.task.of_pixels, "boxes": run.task.of_boxes, "restored images": run.task.of_images}
    return next((name for name, is_so in known.items() if is_so), "calibration")


def _of_task(task: Task, evaluated: Sequence[Evaluated]) -> list[tuple[str, str]]:
    """Return the pictures that only masks or boxes have."""
    named = [(each.name, each.color, each.evaluation) for each in evaluated]
    if task.of_boxes:
        return [*draw_box_metrics(named, task.titles), *draw_class_aps(named)]
    if not task.of_pixels:
        return []
    drawn = draw_class_ious(named)
    for number, (name, _, evaluation) in enumerate(named[:_MOST]):
        drawn += draw_pixel_confusion(number, name, evaluation)
    return drawn


def _sheet(evaluated: Evaluated) -> str:
    """Return some images with what networks make of them, and the colours of the classes; empty without the file."""
    name, _, run, evaluation = evaluated
    sheet = evaluation.masks or evaluation.boxes or evaluation.images
    if sheet is None or not (run.folder / sheet.file).is_file():
        return ""
    colours = [(evaluation.classes[number], class_color(number)) for number in sheet.classes]
    masks, boxes = "with their masks. Grey pixels have no class.", "with their boxes. Grey boxes are of crowds."
    what = masks if evaluation.masks else boxes if evaluation.boxes else "as they are restored; the middle of each"
    text = f"{name}: validation images {what}"
    return page.sheet(text, sheet.columns, (run.folder / sheet.file).read_bytes(), colours)


def _evaluated(methods: Sequence[MethodRuns], references: References) -> list[Evaluated]:
    """Return the first run of each method that was evaluated."""
    first = [
        (color, method, next((run for run in method.runs if run.evaluation), method.first_run))
        for color, method in colored(methods, references)
    ]
    return [Evaluated(method.name, color, run, run.evaluation) for color, method, run in first if run.evaluation]


def _row(name: str, evaluation: EvaluationFile | EvaluatedTeacher, task: Task) -> dict[str, str]:
    """Return the figures of a network by the heads of their columns, with units."""
    heads = {key: f"{title}, {task.unit_of(key)}" for key, title in task.titles.items()} | _HEADS
    heads |= {f"bicubic_{key}": f"bicubic {heads[key]}" for key in task.titles}
    known = [(heads.get(key, key), value) for key, value in evaluation.metrics.items()]
    if isinstance(evaluation, EvaluationFile):
        known += [("agreement with the teacher, %", evaluation.agreement), ("KL to the teacher, nats", evaluation.kl)]
    digits = {head: 3 if head.endswith("nats") else 2 for head, _ in known}
    return {"network": name} | {head: f"{value:.{digits[head]}f}" for head, value in known if value is not None}


def _reliability(
    evaluated: Sequence[Evaluated], teacher: EvaluatedTeacher | None, alone: ReportedRun | None
) -> tuple[str, str] | None:
    found = [(each.name, each.color, each.evaluation.reliability) for each in evaluated]
    if alone and alone.evaluation and all(each.color != ALONE_COLOR for each in evaluated):
        found.append(("student alone", ALONE_COLOR, alone.evaluation.reliability))
    found += [("teacher", TEACHER_COLOR, teacher.reliability)] if teacher else []
    bins = [Bins(name, each.samples, each.confidence, each.accuracy, color) for name, color, each in found if each]
    if not bins:
        return None
    errors = ", ".join(
        f"{each.name} {each.evaluation.metrics['ece']:.1f}"
        for each in evaluated
        if each.evaluation.metrics.get("ece") is not None
    )
    title = f"Reliability: the share of images that is right, by confidence. Calibration error in percent: {errors}"
    return "Reliability: right as often as sure?", draw_reliability("reliability", title, bins)


def _gains(number: int, evaluated: Evaluated, alone: ReportedRun | None) -> tuple[str, str] | None:
    """Return the picture of the classes that gained and lost most against the student alone, else the teacher."""
    name, _, run, evaluation = evaluated
    other: PerClass | None = None
    against = ""
    if (
        alone is not None
        and alone is not run
        and alone.evaluation
        and alone.evaluation.per_class
        and not run.teaches_itself
    ):
        other, against = alone.evaluation.per_class, "the student alone"
    elif evaluation.teacher and evaluation.teacher.per_class:
        other, against = evaluation.teacher.per_class, "the teacher"
    if other is None or evaluation.per_class is None or len(other.samples) != len(evaluation.per_class.samples):
        return None
    pairs = zip(evaluation.classes, evaluation.per_class.percent, other.percent, strict=True)
    gains = sorted(
        ((each, ours - theirs) for each, ours, theirs in pairs if ours is not None and theirs is not None),
        key=lambda pair: -pair[1],
    )
    selected = gains if len(gains) <= 2 * _SHOWN else [*gains[:_SHOWN], *gains[-_SHOWN:]]
    if not selected:
        return None
    text = "; ".join(f"{each} {gain:+.1f}" for each, gain in selected)
    measure = "IoU" if run.task.of_pixels else "AP" if run.task.of_boxes else "Accuracy"
    svg = draw_class_gains(
        f"classes-{number}",
        f"{measure} of single classes of {name} against {against}, in points: {text}",
        selected,
        xlabel=f"points against {against}",
    )
    which = "all classes" if len(selected) == len(gains) else f"the {_SHOWN} best and worst of {len(gains)} classes"
    return f"{name} against {against}: {which}", svg
