"""What a run is compared with: its teacher, the student trained alone, and the paper's number."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.tables import TEACHER, load_tables
from pipeline.errors import one_line
from pipeline.reports.reported_run import ReportedRun, read_run, same_data
from pipeline.runs.files import RESULT_FILE
from pipeline.runs.identity import run_folder


@dataclass(frozen=True)
class References:
    """The runs and numbers that a report's runs are compared with."""

    teacher: ReportedRun | None
    """The teacher's run, None for a teacher from a file or of several networks."""
    teacher_metric: float | None
    """The teacher's main metric on the same validation images."""
    alone: tuple[ReportedRun, ...]
    """Finished runs of the same student without a teacher, one per seed."""
    notes: tuple[str, ...] = ()
    """Why something could not be found."""

    @property
    def alone_metric(self) -> float | None:
        """Return the mean over the seeds of what the student reaches without a teacher."""
        known = [run.last for run in self.alone if run.last is not None]
        return statistics.mean(known) if known else None

    def gap_closed(self, student: float | None) -> float | None:
        """Return (student − alone) / (teacher − alone) in percent; None if that makes no sense."""
        alone, teacher = self.alone_metric, self.teacher_metric
        if student is None or alone is None or teacher is None or teacher - alone < 0.1:
            return None
        return 100 * (student - alone) / (teacher - alone)


def find_references(runs: Sequence[ReportedRun]) -> References:
    """Return what the runs are compared with, searched among them, in their recipes, and beside their folders.

    Runs of several teachers or students have no common reference, which is noted.
    """
    notes: list[str] = []
    taught = [run for run in runs if not run.teaches_itself]
    teacher = metric = None
    if len({name for run in taught if (name := _teacher_name(run))}) > 1:
        notes.append("The runs have different teachers, so no teacher and no share of the gap is shown.")
    else:
        teacher, metric = _teacher(runs, notes)
    alone: list[ReportedRun] = []
    if len({_student_name(run) for run in taught}) > 1:
        notes.append("The runs have different students, or are of different length, so no student alone is shown.")
    else:
        alone = _alone(runs, notes)
    return References(teacher, metric, tuple(alone), tuple(dict.fromkeys(notes)))


def _teacher(runs: Sequence[ReportedRun], notes: list[str]) -> tuple[ReportedRun | None, float | None]:
    """Return the teacher's run, and its metric on the images of the runs."""
    teacher = _first(_teachers(runs), notes)
    known = [
        run.evaluation.teacher.metrics.get(run.task.metric) for run in runs if run.evaluation and run.evaluation.teacher
    ]
    metric = next((value for value in known if value is not None), None)
    if metric is None and teacher is not None and same_data(teacher, runs[0]):
        if any(run.recipe.teacher and run.recipe.teacher.weights for run in runs):
            notes.append("The teacher has other weights than its run's last; evaluate.py agreement=yes measures them.")
        else:
            metric = teacher.last
    return teacher, metric


def _teacher_name(run: ReportedRun) -> str | None:
    """Return what tells the teacher of a run from others, None for a cache alone, or a recipe that is gone."""
    config = run.recipe.teacher
    if config is None or config.follows_student:
        return None
    try:
        folders = [str(run_folder(teacher)) for teacher in run.loaded.teachers]
    except ValueError:  # which the search for the teacher notes
        return None
    files = [f"{each.model} {each.weights}" for each in config.members or (config,) if each.model]
    return ", ".join([*folders, *files]) or None


def _student_name(run: ReportedRun) -> tuple[str, str, int]:
    student = run.recipe.student
    return student.model, str(student.arguments), run.recipe.epochs


def paper_text(run: ReportedRun) -> str | None:
    """Return what the papers print of the run's recipe, None if they have no such pair."""
    tables = load_tables()
    if run.source is None or tables.table_of(run.source) is None:
        return None
    return tables.published_text(run.source)


def published_numbers(run: ReportedRun) -> dict[str, float]:
    """Return the top-1 that papers print of the run's recipe, by paper and table."""
    printed = load_tables().published(run.source) if run.source else {}
    return {table: number for table, number in printed.items() if not table.endswith("top-5")}


def paper_teacher(run: ReportedRun) -> str | None:
    """Return what the papers print of the pair's teacher, None if they print nothing."""
    pair = load_tables().table_of(run.source) if run.source else None
    rows = [row for table, row in pair.published.items() if not table.endswith("top-5")] if pair else []
    numbers = {f"{row[TEACHER]:.2f}" for row in rows if TEACHER in row}
    return ", ".join(sorted(numbers)) or None


def _teachers(runs: Sequence[ReportedRun]) -> Iterator[Path]:
    for run in runs:
        if run.recipe.teacher and len(run.recipe.teacher.runs) == 1 and not run.recipe.teacher.members:
            yield from map(run_folder, run.loaded.teachers)


def _first(folders: Iterator[Path], notes: list[str]) -> ReportedRun | None:
    """Return the first finished run of the folders. What cannot be read is noted."""
    try:
        for folder in folders:
            if (folder / RESULT_FILE).is_file():
                return read_run(folder)
    except (ValueError, OSError) as error:
        notes.append(f"the teacher's run is left out: {one_line(error, 200)}")
    return None


def _alone(runs: Sequence[ReportedRun], notes: list[str]) -> list[ReportedRun]:
    """Return the finished runs of the student without a teacher: those given, else those that belong to the seeds."""
    given = [run for run in runs if run.teaches_itself and run.result]
    taught = [run for run in runs if not run.teaches_itself]
    if not taught:
        return []
    if found := [run for run in given if any(_is_alone_of(run, other) for other in taught)]:
        return [run for run in found if run.settings == found[0].settings]  # one method, such as ce
    by_seed: dict[int, ReportedRun] = {}
    for run in taught:
        if run.recipe.seed not in by_seed and (alone := _search(run, notes)):
            by_seed[run.recipe.seed] = alone
    return list(by_seed.values())


def _search(run: ReportedRun, notes: list[str]) -> ReportedRun | None:
    """Return the run of the student alone: of the recipe's ``compare``, else beside its folder, with the same seed."""
    candidates: list[Path] = []
    try:
        candidates += map(run_folder, run.loaded.compare)
    except ValueError as error:
        notes.append(f"runs of compare are left out: {one_line(error, 200)}")
    here = run.folder.absolute()
    for above in (here.parent, here.parent.parent):
        candidates += sorted(above.glob(f"*/{here.name}"))
    for folder in dict.fromkeys(candidates):
        if (folder / RESULT_FILE).is_file() and folder.absolute() != here:
            try:
                other = read_run(folder)
            except (ValueError, OSError) as error:
                notes.append(f"{folder} is left out: {one_line(error, 200)}")
                continue
            if _is_alone_of(other, run):
                return other
    return None


def _is_alone_of(run: ReportedRun, taught: ReportedRun) -> bool:
    """Return whether ``run`` is the student of ``taught`` without a teacher, as long and on the same images."""
    return run.teaches_itself and _student_name(run) == _student_name(taught) and same_data(run, taught)
