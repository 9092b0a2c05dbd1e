"""The runs of a report by method, and the table of their numbers."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.config.measured import mean_and_deviation
from pipeline.reports import page
from pipeline.reports.references import References, paper_teacher, paper_text, published_numbers
from pipeline.reports.reported_run import ReportedRun
from pipeline.runs.drawing import common_folder
from pipeline.training.result import percent

TEACHER_COLOR, ALONE_COLOR = 6, -1
"""Colours of the teacher and of the student alone, in every picture; a method has its number."""


class MethodRuns(NamedTuple):
    """The runs of one method, one per seed."""

    name: str
    runs: tuple[ReportedRun, ...]

    @property
    def first_run(self) -> ReportedRun:
        """Return the run that stands for the method where one picture per method is enough: the first."""
        return self.runs[0]

    @property
    def measured(self) -> tuple[ReportedRun, ...]:
        """Return the runs whose metric counts: the finished ones, or all if none is finished."""
        return tuple(run for run in self.runs if run.result) or self.runs

    @property
    def last(self) -> float | None:
        """Return the mean over the seeds of the metric after the last epoch."""
        known = [run.last for run in self.measured if run.last is not None]
        return statistics.mean(known) if known else None


def group(runs: Sequence[ReportedRun]) -> list[MethodRuns]:
    """Return the runs by method, in the order in which the methods come, each by seed.

    Runs of one method are seeds of it only if they differ in nothing else. Otherwise their folder is in the name.
    """
    alike: dict[tuple[str, str], list[ReportedRun]] = {}
    for run in runs:
        alike.setdefault((run.method, run.settings), []).append(run)
    times = Counter(name for name, _ in alike)
    return [
        MethodRuns(
            name if times[name] == 1 else f"{name} ({common_folder([run.folder for run in members])})",
            tuple(sorted(members, key=lambda run: run.recipe.seed)),
        )
        for (name, _), members in alike.items()
    ]


def colored(methods: Sequence[MethodRuns], references: References) -> list[tuple[int, MethodRuns]]:
    """Return each method with the number of its colour; the student alone beside taught students has the grey."""
    alone = {run.folder.absolute() for run in references.alone}
    numbered = [(method.first_run.folder.absolute(), number, method) for number, method in enumerate(methods)]
    return [(ALONE_COLOR if folder in alone else number, method) for folder, number, method in numbered]


def headline(runs: Sequence[ReportedRun], references: References) -> str:
    """Return the big numbers of one run, or the table of several, and how far an unfinished one is."""
    unfinished = [
        page.paragraph(f"{run.folder} is not finished: step {run.step:,} of {run.total_steps:,}.")
        for run in runs
        if run.result is None
    ]
    selected = page.numbers(_numbers(runs[0], references)) if len(runs) == 1 else _table(group(runs), references)
    notes = [page.note(text) for text in references.notes]
    return "\n".join([*unfinished, selected, *notes])


def _numbers(run: ReportedRun, references: References) -> list[tuple[str, str]]:
    title, unit = run.task.title, run.task.unit
    epoch = "last epoch" if run.result else "last epoch so far"
    found = [
        (f"student, {title} after the {epoch}", _measured(run.last, unit)),
        ("student, best epoch", _measured(run.best, unit)),
    ]
    if run.teaches_itself:
        return [*found, *_paper(run)]
    if references.alone:
        found.append(
            (f"student trained alone ({_seeds(len(references.alone))})", _measured(references.alone_metric, unit))
        )
    found.append(("teacher", _measured(references.teacher_metric, unit)))
    if run.result and (gap := references.gap_closed(run.last)) is not None:
        found.append(("of the gap to the teacher closed", f"{gap:.0f} %"))
    return [*found, *_paper(run)]


def _paper(run: ReportedRun) -> list[tuple[str, str]]:
    """Return what the papers print as a big number, with the tables that print it."""
    printed = published_numbers(run)
    if not printed:
        return []
    values = " or ".join(dict.fromkeys(f"{number:.2f} %" for number in printed.values()))
    teacher = paper_teacher(run)
    return [(f"in {'; '.join(printed)}{f'; their teacher {teacher}' if teacher else ''}", values)]


def _table(methods: Sequence[MethodRuns], references: References) -> str:
    title, unit = methods[0].first_run.task.title, methods[0].first_run.task.unit
    head = ["method", "seeds", f"{title}, last epoch, {unit}", f"best epoch, {unit}", "gap closed", f"papers, {unit}"]
    rows = []
    for method in methods:
        runs, first = method.measured, method.first_run
        # An unfinished run has not closed its share yet.
        known = None if first.teaches_itself or not runs[0].result else references.gap_closed(method.last)
        gap = "" if known is None else f"{known:.0f} %"
        seeds = str(len(runs)) + (f" of {len(method.runs)}" if len(runs) < len(method.runs) else "")
        values = [mean_and_deviation([run.last for run in runs]), mean_and_deviation([run.best for run in runs])]
        rows.append([method.name, seeds, *values, gap, paper_text(first) or ""])
    if references.teacher_metric is not None:
        papers = paper_teacher(methods[0].first_run) or ""
        rows.append(["teacher", "", percent(references.teacher_metric), "", "", papers])
    kept = [column for column in range(len(head)) if any(row[column] for row in rows)]
    return page.table([head[column] for column in kept], [[row[column] for column in kept] for row in rows])


def _measured(value: float | None, unit: str) -> str:
    return percent(value) if value is None else f"{percent(value)} {unit}"


def _seeds(count: int) -> str:
    return f"mean of {count} seeds" if count > 1 else "one seed"
