"""Pictures of ``evaluation.json``: calibration, and the classes that gained and lost most."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.commands import as_started
from pipeline.plots.classes import draw_class_gains
from pipeline.plots.reliability import Bins, draw_reliability
from pipeline.reports import page
from pipeline.reports.methods import MethodRuns
from pipeline.reports.references import References
from pipeline.reports.reported_run import ReportedRun
from pipeline.runs.evaluation_file import EvaluatedTeacher, EvaluationFile, PerClass, Reliability

_SHOWN = 10
"""Classes that gained most, and classes that lost most."""
_MOST = 6
"""Networks in one picture."""


def draw_evaluations(methods: Sequence[MethodRuns], references: References) -> str:
    """Return the section of the evaluations; without any, the command that makes one."""
    evaluated = [(method.name, run, run.evaluation) for method in methods for run in method.runs[:1] if run.evaluation]
    if not evaluated:
        run = methods[0].first_run
        agreement = "" if run.teaches_itself else " agreement=yes"
        text = "Calibration and single classes are shown once the run is evaluated:"
        return page.section(
            "Single classes and calibration",
            page.note(text, as_started(f"python pipeline/evaluate.py {run.folder}{agreement}")),
        )
    alone = next((run for run in references.alone if run.evaluation), None)
    rows = [_row(name, evaluation) for name, _, evaluation in evaluated]
    teacher = next((evaluation.teacher for *_, evaluation in evaluated if evaluation.teacher), None)
    rows += [_row(teacher.name, teacher)] if teacher else []
    columns = list(dict.fromkeys(key for row in rows for key in row))
    values = [[row.get(key, "") for key in columns] for row in rows]
    drawn = [_reliability([(name, evaluation) for name, _, evaluation in evaluated], teacher, alone)]
    drawn += [_gains(number, name, run, alone) for number, (name, run, _) in enumerate(evaluated[:_MOST])]
    stale = [
        page.note(f"{run.folder}: evaluation.json is of weights that this run no longer has; evaluate it again.")
        for _, run, evaluation in evaluated
        if evaluation.sha256 and run.result and evaluation.sha256 not in run.result.sha256.values()
    ]
    pictures = page.pictures([each for each in drawn if each])
    return page.section("Single classes and calibration", page.table(columns, values), pictures, *stale)


def _row(name: str, evaluation: EvaluationFile | EvaluatedTeacher) -> dict[str, str]:
    row = {"network": name}
    row |= {
        key: f"{value:.3f}" if key == "nll" else f"{value:.2f}"
        for key, value in evaluation.metrics.items()
        if value is not None
    }
    if isinstance(evaluation, EvaluationFile):
        row |= {} if evaluation.agreement is None else {"agreement with the teacher, %": f"{evaluation.agreement:.2f}"}
        row |= {} if evaluation.kl is None else {"KL to the teacher": f"{evaluation.kl:.4f}"}
    return row


def _reliability(
    evaluated: Sequence[tuple[str, EvaluationFile]], teacher: EvaluatedTeacher | None, alone: ReportedRun | None
) -> tuple[str, str] | None:
    found: list[tuple[str, Reliability | None]] = [(name, each.reliability) for name, each in evaluated[:_MOST]]
    if alone and alone.evaluation and alone.method not in dict(found):
        found.append(("student alone", alone.evaluation.reliability))
    found += [("teacher", teacher.reliability)] if teacher else []
    bins = [Bins(name, each.samples, each.confidence, each.accuracy) for name, each in found if each]
    if not bins:
        return None
    errors = ", ".join(
        f"{name} {each.metrics['ece']:.1f}" for name, each in evaluated if each.metrics.get("ece") is not None
    )
    title = f"Reliability: the share of images that is right, by confidence. Calibration error in percent: {errors}"
    return "Reliability: right as often as sure?", draw_reliability("reliability", title, bins)


def _gains(number: int, name: str, run: ReportedRun, alone: ReportedRun | None) -> tuple[str, str] | None:
    """Return the picture of the classes that gained and lost most against the student alone, else the teacher."""
    evaluation = run.evaluation
    assert evaluation is not None
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
    svg = draw_class_gains(
        f"classes-{number}",
        f"Accuracy of single classes of {name} against {against}, in points: {text}",
        selected,
        xlabel=f"points against {against}",
    )
    which = "all classes" if len(selected) == len(gains) else f"the {_SHOWN} best and worst of {len(gains)} classes"
    return f"{name} against {against}: {which}", svg
