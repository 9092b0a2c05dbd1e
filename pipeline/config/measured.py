"""Measured results of the recipes, ``configs/results/<data set>/<pair>/<method>.json``: a list of runs, one per seed.

``configs/results.py`` writes these files from finished runs, and makes the tables of ``docs/results.md`` from them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from pipeline.config.source import CONFIGS, RecipeSource
from pipeline.frozen_model import FrozenModel
from shards.documents import read_document

RESULTS = CONFIGS / "results"
_Percent = Annotated[float, Field(ge=0, le=100)]


class MeasuredRun(FrozenModel):
    """A finished run of a recipe without overrides: its result, and what it was made with."""

    seed: NonNegativeInt
    last: _Percent
    """Top-1 on the validation images after the last epoch."""
    best: _Percent
    """Largest top-1 after any epoch."""
    top5: _Percent | None
    """Top-5 after the last epoch."""
    epochs: PositiveInt
    minutes: NonNegativeFloat | None
    """Minutes of training, of all commands together; evaluations and the start of a command are not counted."""
    card: str | None
    """Name of the GPU, or of the processor of a run without one."""
    ranks: PositiveInt | None
    side: PositiveInt | None = None
    """Number of runs that were trained side by side, in the same minutes; None for one alone."""
    commit: str | None
    """Commit with which the run began; None on a machine without git."""
    uncommitted_changes: bool
    """Whether the checkout differed from that commit."""
    versions: dict[str, str]
    """Versions of Python and the packages with which the run began."""
    teacher: str | None
    """The teacher's weights: ``sha256:`` and that of a file's tensors, ``run:`` and a run's identity, or names."""
    identity: str
    """Digest of the run's identity."""
    student: str
    """Sha256 of the file with the student's last weights."""


def results_file(source: RecipeSource, folder: Path = RESULTS) -> Path:
    """Return the file with the results of a recipe, whether it exists or not."""
    name = source.run_name
    return folder / name.with_name(f"{name.name}.json")


def read_results(path: Path) -> list[MeasuredRun]:
    """Return the runs in a file, none if there is no file. Raises DamagedFile if it is not valid."""
    advice = "restore it, for example with git checkout"
    return read_document(path, list[MeasuredRun], advice) if path.exists() else []


def measured(source: RecipeSource) -> list[MeasuredRun]:
    """Return the recorded runs of a recipe. Raises DamagedFile if their file is not valid."""
    return read_results(results_file(source)) if source.path.is_relative_to(CONFIGS) else []


def count_seeds(runs: Sequence[MeasuredRun]) -> str:
    """Return how many seeds the runs have, such as ``3 seeds``."""
    return f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"


def mean_and_deviation(values: Sequence[float | None]) -> str:
    """Return mean ± sample standard deviation; a single value alone, or a dash if nothing was measured."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    deviation = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.2f}{deviation}"
