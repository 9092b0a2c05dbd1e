"""Recipes: YAML files under ``configs/`` that name everything a run is made of.

``load_recipe(path, overrides)`` maps what a file, its bases, the command line's ``key=value`` words and the constants
say together (``composition.py``) onto the typed ``Recipe``, strictly. An error is one line: file, dotted key, given,
expected.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from pipeline.composition import ROOT, Origins, RecipeError, composed, existing, networks, references, shown
from pipeline.data.loader import Config as Data
from pipeline.ema import Config as Averaging
from pipeline.losses._base import Losses, LossSpec, Taps, find_loss
from pipeline.optimizers import Config as Optimizer
from pipeline.schedules import Schedule
from pipeline.teacher import Config as TeacherConfig

Words = TypeVar("Words", bound=BaseModel)

DEFAULT = ROOT / "configs" / "demo.yaml"


class Section(BaseModel):
    """A part of a recipe: frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class Start(Section):
    """Where a student begins: a weights file, or the student of another recipe's run."""

    weights: str | None = None
    recipe: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Start:
        if (self.weights is None) == (self.recipe is None):
            raise ValueError("give either weights (a file) or recipe (a run's student)")
        return self


class Student(Section):
    """The network that is trained."""

    model: str
    """A name that ``create_model`` knows, or a user's own factory as ``package.module:factory``."""
    stages: dict[str, str] | None = None
    """Module path by canonical stage name, for a network whose stages the project does not know."""
    start: Start | None = None
    compile: bool = False
    """Whether torch compiles it: a minute or more where a command begins, quicker steps, other last bits."""


class Stop(Section):
    """Where this command ends early, resumably; not part of what the run is."""

    epoch: PositiveInt | None = None
    steps: PositiveInt | None = None
    minutes: float | None = Field(default=None, gt=0)


class Checkpoints(Section):
    """When the run is saved (0 is never), and how much is kept."""

    every_steps: NonNegativeInt = 0
    every_epochs: NonNegativeInt = 1
    keep: PositiveInt = 2
    poll_steps: PositiveInt = 50
    """How often the ranks agree on whether one of them was told to stop."""


class Journal(Section):
    """What is written down while training."""

    every_steps: PositiveInt = 50
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers of Accelerate."""


class Recipe(Section):
    """Everything a run is made of."""

    student: Student
    teacher: TeacherConfig | None = None
    losses: Losses
    data: Data
    epochs: PositiveInt
    batch: PositiveInt
    """Global batch: over all ranks and micro-batches."""
    accumulation: PositiveInt = 1
    """Micro-batches per global batch. Batch statistics are those of a micro-batch over all ranks."""
    seed: int = Field(default=0, ge=0)
    """Keys initialisation, order and random draws; ``data.seed`` keys crops and flips."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    optimizer: Optimizer = Optimizer()
    schedule: Schedule
    clip: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient."""
    compress: Literal["auxiliary", "all"] | None = None
    """Gradients that go from rank to rank in bfloat16: those of the losses' own modules, or the student's, too."""
    ema: Averaging | None = None
    compare: tuple[str, ...] = ()
    """Recipes whose results stand in the closing table; a run that is not there is made first."""
    checkpoints: Checkpoints = Checkpoints()
    journal: Journal = Journal()
    stop: Stop = Stop()
    folder: str | None = None
    """The run folder; default ``runs/<path of the recipe under configs/>/seed-<seed>``."""

    @model_validator(mode="after")
    def _losses_have_their_teacher(self) -> Recipe:
        needy = [name for name, spec in self.losses.items() if spec.loss.needs_teacher]
        if needy and self.teacher is None:
            sources = "teacher: {model: …, weights: …} or teacher: {recipe: …}"
            raise ValueError(f"the loss {needy[0]!r} needs a teacher; add {sources}")
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
    """A recipe, and the file it came from."""

    recipe: Recipe
    path: Path


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Return the recipe at ``path`` with its ``base:`` files below it and ``key=value`` overrides above it.

    Raises RecipeError (one line) for a missing file, bad YAML, an unknown key, a wrong type or a value out of range.
    """
    path = existing(Path(path))
    origins: Origins = {}
    tree = composed(path, overrides, origins)
    _unpack_models(tree)
    _resolve_references(tree, path)
    try:
        return LoadedRecipe(Recipe.model_validate(tree), path)
    except ValidationError as error:
        raise RecipeError(_one_line(error, tree, origins, shown(path))) from None


def own_words(words: Sequence[str], keys: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return (values by key, the other words) of those ``key=value`` words that are a command's own, no recipe's."""
    own = {key: value for key, _, value in (word.partition("=") for word in words) if key in keys}
    others = {word.partition("=")[0] for word in words if "=" in word} - own.keys() - Recipe.model_fields.keys()
    for key in sorted(key for key in others if "." not in key):
        if near := difflib.get_close_matches(key, keys, n=1):
            raise RecipeError(f"command line: {key}: unknown key; did you mean {near[0]!r}?")
    return own, [word for word in words if word.partition("=")[0] not in keys]


def typed_words(own: dict[str, str], kind: type[Words]) -> Words:
    """Return a command's own words, in YAML syntax, as ``kind`` knows them. Raises RecipeError."""
    try:
        return kind.model_validate({key: yaml.safe_load(text) for key, text in own.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise RecipeError(f"command line: {key}: {first['msg']}, got {first['input']!r}") from None
    except yaml.YAMLError:
        raise RecipeError(f"command line: {' '.join(own.values())} is not YAML") from None


def split_words(words: Sequence[str], default: Path = DEFAULT) -> tuple[Path, list[str]]:
    """Return (recipe, overrides) of a command line ``[RECIPE] [key=value …]``."""
    paths = [word for word in words if "=" not in word]
    if len(paths) > 1:
        raise RecipeError(
            f"command line: expected one recipe, got {' and '.join(paths)}; overrides are written key=value"
        )
    return (Path(paths[0]) if paths else default), [word for word in words if "=" in word]


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return the resolved recipe as plain data that ``load_recipe`` reads back."""
    return recipe.model_dump(mode="json", by_alias=True)


def _unpack_models(tree: dict[str, Any]) -> None:
    """Turn ``model: {path: package.module:factory, stages: {…}}`` into the keys ``model`` and ``stages``."""
    for section in networks(tree):
        own = section.get("model")
        if isinstance(own, dict) and own.keys() <= {"path", "stages"}:
            section |= {"model": own.get("path"), "stages": own.get("stages", section.get("stages"))}


def _resolve_references(tree: dict[str, Any], path: Path) -> None:
    for container, key in references(tree):
        try:
            container[key] = shown(existing(Path(str(container[key]))))
        except RecipeError as error:
            raise RecipeError(f"{shown(path)}: another recipe is named that is not there: {error}") from None


def _one_line(error: ValidationError, tree: dict[str, Any], origins: Origins, default: str) -> str:
    found: dict[tuple[str, ...], list[Any]] = {}
    for each in error.errors(include_url=False):
        found.setdefault(_key(each, tree), []).append(each)
    location, errors = next(iter(found.items()))
    where = next((origins[location[:n]] for n in range(len(location), 0, -1) if location[:n] in origins), default)
    key = ".".join(location)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{where}: {key + ': ' if key else ''}{_explained(errors, location)}{more}"


def _key(error: Any, tree: Any) -> tuple[str, ...]:
    """Return the key that an error is about, without the names that pydantic gives to what may stand there."""
    location = tuple(map(str, error["loc"]))
    for depth, part in enumerate(error["loc"]):
        if isinstance(tree, list) and isinstance(part, int):
            tree = tree[part] if part < len(tree) else None
        elif isinstance(tree, dict) and (part in tree or error["type"] == "missing"):
            tree = tree.get(part)
        else:
            return location[:depth]
    return location


def _explained(errors: list[Any], location: tuple[str, ...]) -> str:
    """Return what is wrong at a key; of several errors each is about another thing that might have stood there."""
    first = errors[0]
    if first["type"] == "extra_forbidden":
        known = sorted(_known_keys(location[:-1]))
        near = difflib.get_close_matches(location[-1], known, n=1)
        return f"unknown key; did you mean {near[0]!r}?" if near else f"unknown key; known here are {', '.join(known)}"
    if first["type"] == "missing":
        return "this key is required"
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    message = ", or ".join(each["msg"].removeprefix("Input ") for each in errors)
    return f"{message}, got {first['input']!r}"


def _known_keys(location: Iterable[str]) -> list[str]:
    """Return the keys that may stand in the section at ``location``."""
    section: Any = Recipe
    for part in location:
        if part.isdecimal():  # a place in a list, whose sections are all alike
            continue
        if section is LossSpec:  # what stands here is the name of a loss
            section = find_loss(part).Config
            continue
        annotation = section.model_fields[part].annotation
        candidates = [kind for kind in (annotation, *_unpacked(annotation)) if isinstance(kind, type)]
        section = next(kind for kind in candidates if kind is LossSpec or issubclass(kind, BaseModel))
    return [field.alias or name for name, field in section.model_fields.items()]


def _unpacked(annotation: Any) -> Iterator[Any]:
    for argument in get_args(annotation):
        yield argument
        yield from _unpacked(argument)
