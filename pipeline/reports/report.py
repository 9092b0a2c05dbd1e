"""The whole report of runs, as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.reports import page
from pipeline.reports.comparison_pictures import draw_methods, draw_networks
from pipeline.reports.denoiser_pictures import draw_denoisers
from pipeline.reports.evaluation_pictures import draw_evaluations
from pipeline.reports.foot import draw_foot
from pipeline.reports.methods import group, headline
from pipeline.reports.references import find_references
from pipeline.reports.reported_run import ReportedRun
from pipeline.reports.training_pictures import draw_learning, draw_losses, draw_time

_MOST = 6
"""Methods that have pictures of their own; more of them would be a long page, and colours that repeat."""


def report_page(runs: Sequence[ReportedRun]) -> str:
    """Return the report of runs on the same data, in HTML."""
    references, methods = find_references(runs), group(runs)
    selected = methods[:_MOST]
    left_out = ", ".join(method.name for method in methods[_MOST:])
    more = page.note(f"Without pictures of their own: {left_out}; name fewer runs to see them.") if left_out else ""
    first = methods[0].first_run
    taught = next((run for run in runs if not run.teaches_itself), first)
    networks = " from ".join([first.recipe.student.model, *([teacher] if (teacher := _teacher(taught)) else [])])
    title = f"{' / '.join(method.name for method in selected)}{' / …' if left_out else ''}: {networks}"
    commit = first.versions.get("commit")
    facts = [f"torch {first.versions.get('torch')}"] if first.versions.get("torch") else []
    facts += [f"commit {str(commit)[:7]}"] if commit else []
    facts += [first.recipe.data.path]
    return page.html_page(
        title,
        [
            f"<h1>{page.escaped(title)}</h1>",
            page.note(", ".join(facts)),
            headline(runs, references),
            more,
            draw_learning(selected, references),
            draw_losses(selected),
            draw_methods(methods, references),
            draw_networks(selected, references),
            draw_evaluations(methods, references),
            draw_denoisers(selected),
            draw_time(selected, references),
            draw_foot(methods),
        ],
    )


def _teacher(run: ReportedRun) -> str | None:
    """Return the name of the run's teacher network, None without one."""
    teacher = run.recipe.teacher
    if teacher is None:
        return None
    if teacher.model:
        return teacher.model
    try:
        named = [each.recipe.student.model for each in run.loaded.teachers]
    except ValueError:  # the teacher's recipe is gone, which the references note
        named = []
    return " + ".join(named) or None
