"""Recipes: YAML files under ``configs/`` that name everything a run is made of.

``load_recipe(path, overrides)`` maps what a file, its bases, the command line's ``key=value`` words and the constants
say together (``compose.py``) onto the typed ``Recipe``, strictly. An error is one line: file, dotted key, given,
expected.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from pipeline.config.compose import Origins, compose, find_recipe, network_sections, references
from pipeline.config.messages import check_nulls, validation_message
from pipeline.config.values import check_numbers, check_switches
from pipeline.data.config import Config as Data
from pipeline.errors import RecipeError, display_path
from pipeline.frozen_model import FrozenModel
from pipeline.losses._base import Taps
from pipeline.losses._registry import Losses
from pipeline.optim.ema import Config as Averaging
from pipeline.optim.optimizer import Config as Optimizer
from pipeline.optim.schedule import Schedule
from pipeline.teachers.config import Config as TeacherConfig


class StartConfig(FrozenModel):
    """Where a student begins: a weights file, or the student of another recipe's run."""

    weights: str | None = None
    weights_key: str | None = None
    """Which of several weights in the file are meant, such as ``model_ema``; default: the raw ones."""
    recipe: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> StartConfig:
        if (self.weights is None) == (self.recipe is None):
            raise ValueError("give either weights (a file) or recipe (a run's student)")
        return self


class StudentConfig(FrozenModel):
    """The network that is trained."""

    model: str
    """A name that ``create_model`` knows, or a user's own factory as ``package.module:factory``."""
    stages: dict[str, str] | None = None
    """Module path by canonical stage name, for a network whose stages the project does not know."""
    start: StartConfig | None = None
    compile: bool = False
    """Whether torch compiles it: a minute or more where a command begins, quicker steps, other last bits."""


class StopConfig(FrozenModel):
    """Where this command ends early, resumably; not part of what the run is."""

    epoch: PositiveInt | None = None
    steps: PositiveInt | None = None
    minutes: float | None = Field(default=None, gt=0)


class CheckpointConfig(FrozenModel):
    """When the run is saved (0 is never), and how much is kept."""

    every_steps: NonNegativeInt = 0
    every_epochs: NonNegativeInt = 1
    keep: PositiveInt = 2
    poll_steps: PositiveInt = 50
    """How often the ranks agree on whether one of them was told to stop."""


class JournalConfig(FrozenModel):
    """What is written down while training."""

    every_steps: PositiveInt = 50
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers of Accelerate."""


class Recipe(FrozenModel):
    """Everything a run is made of."""

    student: StudentConfig
    teacher: TeacherConfig | None = None
    losses: Losses
    data: Data
    epochs: int = Field(gt=0, le=10**6)
    batch: int = Field(gt=0, le=2**24)
    """Global batch: over all ranks and micro-batches."""
    accumulation: int = Field(default=1, gt=0, le=2**24)
    """Micro-batches per global batch. Batch statistics are those of a micro-batch over all ranks."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Keys initialisation, order and random draws; ``data.seed`` keys crops and flips."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    optimizer: Optimizer = Optimizer()
    schedule: Schedule
    clip: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient."""
    compress: Literal["auxiliary", "all"] | None = None
    """Gradients that go from rank to rank in bfloat16: those of the losses' own modules, or the student's, too."""
    ema: Averaging | None = None
    graph: Literal["auto"] | bool = "auto"
    """Whether steps are replays of a CUDA graph, the same numbers. ``auto``: on one GPU, without accumulation."""
    compare: tuple[str, ...] = ()
    """Recipes whose results stand in the closing table; a run that is not there is made first."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    journal: JournalConfig = JournalConfig()
    stop: StopConfig = StopConfig()
    folder: str | None = None
    """The run folder; default ``runs/<path of the recipe under configs/>/seed-<seed>``."""

    @model_validator(mode="after")
    def _losses_have_their_teacher(self) -> Recipe:
        needy = [name for name, spec in self.losses.items() if spec.loss.needs_teacher]
        if needy and self.teacher is None:
            sources = "teacher: {model: …, weights: …} or teacher: {recipe: …}"
            raise ValueError(f"the loss {needy[0]!r} needs a teacher; add {sources}")
        return self

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Recipe:
        if self.schedule.warmup_epochs > self.epochs:
            warmup = f"schedule.warmup_epochs: {self.schedule.warmup_epochs:g}"
            raise ValueError(f"{warmup} is longer than the run, epochs: {self.epochs}; give at most {self.epochs}")
        return self

    @property
    def taps(self) -> Taps:
        """Every tap the recipe's losses read."""
        taps = Taps()
        for spec in self.losses.values():
            taps = taps.union(spec.config.taps())
        return taps


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, the file it came from, and the recipes that it names, which are loaded when they are asked for.

    They are read once, on the same shards, wherever this command says that they lie; a student's own first stage has
    the student's seed, teachers and compared runs keep theirs.
    """

    recipe: Recipe
    path: Path
    loaded: RecipeTree = field(default_factory=dict, repr=False, compare=False)
    """What this command has loaded."""

    @property
    def teachers(self) -> tuple[LoadedRecipe, ...]:
        """Those of ``recipe.teacher.recipes``, in that order."""
        return tuple(map(self._named, self.recipe.teacher.recipes if self.recipe.teacher else ()))

    @property
    def start(self) -> LoadedRecipe | None:
        """That of ``student.start.recipe``."""
        start = self.recipe.student.start
        return self._named(start.recipe) if start and start.recipe else None

    @property
    def compare(self) -> tuple[LoadedRecipe, ...]:
        """Those of ``recipe.compare``, in that order."""
        return tuple(map(self._named, self.recipe.compare))

    def _named(self, name: str) -> LoadedRecipe:
        key = (find_recipe(Path(name)), tuple(inherited_overrides(self.recipe, name)))
        if key not in self.loaded:
            self.loaded[key] = LoadedRecipe(_load_one(*key), key[0], self.loaded)
        return self.loaded[key]


RecipeTree = dict[tuple[Path, tuple[str, ...]], LoadedRecipe]
"""Recipes by file and overrides."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Return the recipe at ``path`` with its ``base:`` files below it and ``key=value`` overrides above it.

    Raises RecipeError (one line) for a missing file, bad YAML, an unknown key, a wrong type or a value out of range.
    """
    path = find_recipe(Path(path))
    return LoadedRecipe(_load_one(path, overrides), path)


def inherited_overrides(recipe: Recipe, path: str) -> list[str]:
    """Return the overrides with which ``recipe`` stands on the one at ``path``; where the shards lie comes first."""
    others = (*(recipe.teacher.recipes if recipe.teacher else ()), *recipe.compare)
    start = recipe.student.start
    own = start is not None and start.recipe == path and path not in others
    return [f"data.path={json.dumps(recipe.data.path)}", *([f"seed={recipe.seed}"] if own else [])]


def _load_one(path: Path, overrides: Sequence[str]) -> Recipe:
    origins: Origins = {}
    tree = compose(path, overrides, origins)
    _unpack_models(tree)
    _resolve_references(tree, path)
    check_numbers(tree, origins, display_path(path))
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(validation_message(error, Recipe, tree, origins, display_path(path))) from None
    check_nulls(Recipe, tree, origins, display_path(path))
    check_switches(tree, dump_recipe(recipe), origins, display_path(path))
    return recipe


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return the resolved recipe as plain data that ``load_recipe`` reads back."""
    return recipe.model_dump(mode="json", by_alias=True)


def _unpack_models(tree: dict[str, Any]) -> None:
    """Turn ``model: {path: package.module:factory, stages: {…}}`` into the keys ``model`` and ``stages``."""
    for section in network_sections(tree):
        own = section.get("model")
        if isinstance(own, dict) and own.keys() <= {"path", "stages"}:
            section |= {"model": own.get("path"), "stages": own.get("stages", section.get("stages"))}


def _resolve_references(tree: dict[str, Any], path: Path) -> None:
    for container, key in references(tree):
        try:
            container[key] = display_path(find_recipe(Path(str(container[key]))))
        except RecipeError as error:
            raise RecipeError(f"{display_path(path)}: another recipe is named that is not there: {error}") from None
