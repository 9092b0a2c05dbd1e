"""A run as the report reads it from its folder, finished or not."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.config.compose import own_tree, read_source
from pipeline.config.recipe import LoadedRecipe, Recipe
from pipeline.config.source import RecipeSource, find_recipe
from pipeline.errors import ROOT, RecipeError
from pipeline.runs.evaluation_file import EVALUATIONS, EvaluationFile, read_evaluation
from pipeline.runs.files import (
    IDENTITY,
    JOURNAL_FILE,
    RECIPE,
    RESULT_FILE,
    STUDENT,
    Identity,
    Result,
    Start,
    Versions,
    read_identity,
    read_result,
    read_starts,
    read_versions,
)
from pipeline.runs.folder import load_run
from pipeline.runs.ownership import SEARCH_FILE
from pipeline.tasks._base import Task
from pipeline.tasks._registry import find_task
from pipeline.training.journal import read_journal

_BY_RUN = (
    *(("data", key) for key in ("order_seed", "validation_batch", "views")),
    *(("teacher", key) for key in ("recipe", "batch", "cache", "fallback")),
    ("student", "start"),
)
"""Keys of an identity that may differ between the seeds of one method."""


@dataclass(frozen=True)
class ReportedRun:
    """The files of a run folder."""

    folder: Path
    loaded: LoadedRecipe
    identity: Identity
    lines: list[dict[str, Any]]
    """The whole lines of the journal, at least one of a training step."""
    result: Result | None
    """None for a run that is not finished."""
    versions: Versions
    starts: list[Start]
    evaluation: EvaluationFile | None

    @property
    def recipe(self) -> Recipe:
        """Return the recipe, with every key."""
        return self.loaded.recipe

    @property
    def task(self) -> Task:
        """Return the task."""
        return find_task(self.recipe.task)

    @cached_property
    def training(self) -> list[dict[str, Any]]:
        """Return the journal's lines of training steps."""
        return [line for line in self.lines if "timing" in line]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """Return the journal's lines of evaluations."""
        return [line for line in self.lines if "timing" not in line]

    @property
    def step(self) -> int:
        """Return the last step in the journal."""
        return self.lines[-1]["step"]

    @property
    def total_steps(self) -> int:
        """Return the number of steps of the whole run."""
        last = self.lines[-1]
        return round(last["step"] / last["epoch"]) * self.recipe.epochs if last["epoch"] else 0

    @property
    def last(self) -> float | None:
        """Return the main metric after the last epoch so far."""
        return self.result.last if self.result else next(iter(self._metrics[-1:]), None)

    @property
    def best(self) -> float | None:
        """Return the largest main metric after any epoch so far."""
        if self.result and self.result.best is not None and self.result.best >= 0:
            return self.result.best
        return max(self._metrics, default=None)

    @property
    def _metrics(self) -> list[float]:
        values = [line.get(self.task.metric) for line in self.evaluations]
        return [value for value in values if value is not None]

    @cached_property
    def source(self) -> RecipeSource | None:
        """Return the project's recipe that the run was started with, None for another one or an unfinished run."""
        if self.result is None or self.result.recipe is None:
            return None
        path, *selection = shlex.split(self.result.recipe)
        try:
            return read_source(ROOT / path, selection)[0]
        except ValueError:  # the recipe was renamed since
            return None

    @cached_property
    def method(self) -> str:
        """Return the name of the method: the recipe's, that of the folder above ``seed-N``, or the losses."""
        if self.source and (name := self.source.cell or str(own_tree(self.source.path).get("method") or "")):
            return name
        above = self.folder.absolute().parent
        is_pair = any(above.glob("*/seed-*"))  # a pair's own method has no folder
        named = above.name if re.fullmatch(r"seed-\d+.*", self.folder.name) and not is_pair else ""
        return named if self.source is None and named else " + ".join(self.identity.losses)

    @property
    def teaches_itself(self) -> bool:
        """Return whether the student is trained without a teacher."""
        return self.recipe.teacher is None

    @cached_property
    def settings(self) -> str:
        """Return what the run has in common with those that differ in the seed only, as text."""
        tree = self.identity.values()
        sections = {name: dict(tree[name] or {}) for name in ("data", "teacher", "student")}
        for name, key in _BY_RUN:
            sections[name].pop(key, None)
        return json.dumps({**tree, **sections, "seed": None}, sort_keys=True)


def read_run(folder: Path) -> ReportedRun:
    """Return the run in a folder. Raises RecipeError if it has not begun, and DamagedFile for a damaged file."""
    identity = read_identity(folder)
    journal = folder / JOURNAL_FILE
    lines = read_journal(journal) if journal.is_file() else []
    if identity is None or not any("timing" in line for line in lines):
        missing = IDENTITY if identity is None else f"step in {JOURNAL_FILE}"
        raise RecipeError(f"{folder}: this run has not begun (no {missing} yet); train it first")
    evaluation = folder / EVALUATIONS[STUDENT]
    return ReportedRun(
        folder,
        _load(folder),
        identity,
        lines,
        read_result(folder),
        read_versions(folder) or {},
        read_starts(folder),
        read_evaluation(evaluation) if evaluation.is_file() else None,
    )


def _load(folder: Path) -> LoadedRecipe:
    """Return the recipe of a run; without its losses if one of them is gone, such as a file of the user's own."""
    try:
        return load_run(folder)
    except RecipeError:
        return load_run(folder, losses=False)


def find_folders(targets: Sequence[Path]) -> list[Path]:
    """Return the run folders that a command line names: by folder, or by a pair, whose finished runs are meant.

    A folder that is no run stands for the finished runs below it. Raises RecipeError if there is none.
    """
    found = [folder for target in targets for folder in _folders_of(target)]
    return list(dict.fromkeys(found))


def _folders_of(target: Path) -> list[Path]:
    if target.is_dir() and ((target / RECIPE).is_file() or (target / IDENTITY).is_file()):
        return [target]
    if target.is_dir():
        above = target
    elif target.suffix == ".yaml":
        above = Path("runs") / RecipeSource(find_recipe(target)).run_name
    else:
        raise RecipeError(f"{target}: there is no such folder; name a run's folder, or the recipe of a pair")
    if folders := [path.parent for path in sorted(above.rglob(RESULT_FILE)) if not _is_trial(path.parent, above)]:
        return folders
    raise RecipeError(
        f"{above}: there is no finished run in it; train one first, or name the folder of an unfinished one"
    )


def _is_trial(folder: Path, above: Path) -> bool:
    """Return whether the run is a trial of a search below ``above``, which has a report of its own."""
    between = [parent for parent in folder.parents if parent.is_relative_to(above) and parent != above]
    return any((parent / SEARCH_FILE).is_file() for parent in between)


def check_same_data(runs: Sequence[ReportedRun]) -> None:
    """Raise RecipeError if two runs are of different tasks, shards, classes or held-out images."""
    first = runs[0]
    for run in runs[1:]:
        for what, ours, theirs in zip(
            ("task", "classes", "shards", "data.holdout"), _data(first), _data(run), strict=True
        ):
            if ours != theirs:
                raise RecipeError(
                    f"{first.folder} and {run.folder} are of different data ({what}), so their numbers cannot be "
                    "compared; make a report of each"
                )


def _data(run: ReportedRun) -> tuple[object, ...]:
    return run.recipe.task, run.identity.data.classes, run.identity.data.manifest, run.recipe.data.holdout


def same_data(run: ReportedRun, other: ReportedRun) -> bool:
    """Return whether two runs were measured on the same images."""
    return _data(run) == _data(other)
