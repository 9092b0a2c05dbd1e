"""The runs of a report by method, and the table of their numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.config.measured import mean_and_deviation
from pipeline.reports import page
from pipeline.reports.references import References, paper_teacher, paper_text, published_numbers
from pipeline.reports.reported_run import ReportedRun
from pipeline.training.result import percent


class MethodRuns(NamedTuple):
    """The runs of one method, one per seed."""

    name: str
    runs: tuple[ReportedRun, ...]

    @property
    def first_run(self) -> ReportedRun:
        """Return the run that stands for the method where one picture per method is enough: the first."""
        return self.runs[0]

    def mean(self, values: Sequence[float | None]) -> float | None:
        """Return the mean of the known values."""
        known = [value for value in values if value is not None]
        return statistics.mean(known) if known else None

    @property
    def last(self) -> float | None:
        """Return the mean over the seeds of the metric after the last epoch."""
        return self.mean([run.last for run in self.runs])


def group(runs: Sequence[ReportedRun]) -> list[MethodRuns]:
    """Return the runs by method, in the order in which the methods come, each by seed."""
    names = dict.fromkeys(run.method for run in runs)
    return [
        MethodRuns(name, tuple(sorted((run for run in runs if run.method == name), key=lambda run: run.recipe.seed)))
        for name in names
    ]


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
    title = run.task.title
    found = [(f"student, {title} after the last epoch", percent(run.last)), ("student, best epoch", percent(run.best))]
    if run.teaches_itself:
        return [*found, *_paper(run)]
    if references.alone:
        found.append((f"student trained alone ({_seeds(len(references.alone))})", percent(references.alone_metric)))
    found.append(("teacher", percent(references.teacher_metric)))
    if (gap := references.gap_closed(run.last)) is not None:
        found.append(("of the gap to the teacher closed", f"{gap:.0f} %"))
    return [*found, *_paper(run)]


def _paper(run: ReportedRun) -> list[tuple[str, str]]:
    """Return what the papers print as a big number, with the tables that print it."""
    printed = published_numbers(run)
    if not printed:
        return []
    values = " or ".join(dict.fromkeys(f"{number:.2f}" for number in printed.values()))
    teacher = paper_teacher(run)
    return [(f"in {'; '.join(printed)}{f'; their teacher {teacher}' if teacher else ''}", values)]


def _table(methods: Sequence[MethodRuns], references: References) -> str:
    title = methods[0].first_run.task.title
    head = ["method", "seeds", f"{title}, last epoch", "best epoch", "gap closed", "papers"]
    rows = []
    for name, runs in methods:
        last = [run.last for run in runs]
        taught = [] if runs[0].teaches_itself else [references.gap_closed(MethodRuns(name, runs).last)]
        gap = "".join(f"{value:.0f} %" for value in taught if value is not None)
        values = [mean_and_deviation(last), mean_and_deviation([run.best for run in runs])]
        rows.append([name, str(len(runs)), *values, gap, paper_text(runs[0]) or ""])
    if references.teacher_metric is not None:
        papers = paper_teacher(methods[0].first_run) or ""
        rows.append(["teacher", "", percent(references.teacher_metric), "", "", papers])
    kept = [column for column in range(len(head)) if any(row[column] for row in rows)]
    return page.table([head[column] for column in kept], [[row[column] for column in kept] for row in rows])


def _seeds(count: int) -> str:
    return f"mean of {count} seeds" if count > 1 else "one seed"
