"""The foot of the report: recipe, versions, starts, and the command that makes the run again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from pipeline.commands import as_started
from pipeline.reports import page
from pipeline.reports.methods import MethodRuns
from pipeline.reports.reported_run import ReportedRun
from pipeline.runs.files import RECIPE


def draw_foot(methods: Sequence[MethodRuns]) -> str:
    """Return the sections about how the runs were made; of several seeds of a method, the first has its recipe."""
    runs = [run for method in methods for run in method.runs]
    rows = [[str(run.folder), _state(run), _history(run)] for run in runs]
    parts = [page.section("Runs", page.table(["folder", "state", "starts (UTC)"], rows))]
    for method in methods:
        run = method.first_run
        command = f"accelerate launch pipeline/train.py {shlex.quote(str(run.folder / RECIPE))} folder=ANOTHER"
        versions = [[name, str(value)] for name, value in run.versions.items() if value is not None]
        recipe = (run.folder / RECIPE).read_text(encoding="utf-8")
        parts.append(
            page.section(
                f"{method.name}, seed {run.recipe.seed}: recipe and versions",
                page.paragraph("The run again, with every setting:"),
                page.preformatted(as_started(command)),
                page.table(["package", "version"], versions) if versions else "",
                page.recipe(recipe),
            )
        )
    return "\n".join(parts)


def _state(run: ReportedRun) -> str:
    if run.result is None:
        return f"step {run.step:,} of {run.total_steps:,}"
    more = [f"{run.result.epochs} epochs"]
    more += [f"{run.result.seconds / 60:.1f} minutes of training"] if run.result.seconds else []
    more += [run.result.device] if run.result.device else []
    more += [f"{run.result.ranks} rank{'s' if run.result.ranks > 1 else ''}"] if run.result.ranks else []
    return f"finished: {', '.join(more)}"


def _history(run: ReportedRun) -> str:
    """Return how many commands trained the run, and from which step each went on."""
    if not run.starts:
        return "not recorded"
    steps = [f"{start.time[:16].replace('T', ' ')} at step {start.step:,}" for start in run.starts]
    selected = [*steps[:3], "…", steps[-1]] if len(steps) > 5 else steps
    return f"{len(steps)} start{'s' if len(steps) > 1 else ''}: {'; '.join(selected)}"
