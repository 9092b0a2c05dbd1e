"""Recipes: YAML files under ``configs/`` that name everything a run is made of.

``load_recipe(path, overrides)`` composes the file with its ``base:`` files and the command line's ``key=value`` words,
puts what stands under ``constants:`` where ``${name}`` stands, so that a number that several places share stands once,
and maps the result onto the typed ``Recipe`` strictly. An error is one line: file, dotted key, given, expected.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from pipeline.data.loader import Config as Data
from pipeline.ema import Config as Averaging
from pipeline.losses._base import Losses, LossSpec, Taps, find_loss
from pipeline.optimizers import Config as Optimizer
from pipeline.schedules import Schedule
from pipeline.teacher import Config as TeacherConfig

ROOT = Path(__file__).resolve().parents[1]
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


class RecipeError(ValueError):
    """A recipe that cannot be used; the message is one line."""


@contextmanager
def about(place: str) -> Iterator[None]:
    """Say in front of what a user got wrong inside where it was said: a file or a key."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise RecipeError(f"{place}: {error}") from error


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, and the file it came from."""

    recipe: Recipe
    path: Path


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Return the recipe at ``path`` with its ``base:`` files below it and ``key=value`` overrides above it.

    Raises RecipeError (one line) for a missing file, bad YAML, an unknown key, a wrong type or a value out of range.
    """
    path = _existing(Path(path))
    origins: dict[tuple[str, ...], str] = {}
    tree = composed(path, overrides, origins)
    _unpack_models(tree)
    _resolve_references(tree, path)
    try:
        return LoadedRecipe(Recipe.model_validate(tree), path)
    except ValidationError as error:
        raise RecipeError(_one_line(error, origins, shown(path))) from None


def composed(
    path: Path, overrides: Sequence[str] = (), origins: dict[tuple[str, ...], str] | None = None
) -> dict[str, Any]:
    """Return what a recipe file, a whole one or a part, says with its ``base:`` files, overrides and constants.

    ``origins`` learns which file said what.
    """
    origins = {} if origins is None else origins
    tree = _compose(path, origins, ())
    for word in overrides:
        _merge(tree, _override(word), "command line", origins)
    tree = _without_nulls(tree)
    constants = tree.pop("constants", {})
    return _filled(tree, constants, origins, shown(path), ())


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


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file; a repeated key and bad syntax are a RecipeError."""
    try:
        return yaml.load(path.read_text(), _Yaml)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise RecipeError(f"{shown(path)}: line {line}: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{shown(path)}: not a YAML file: {error}") from None


# -- composition ------------------------------------------------------------------------------------------------------


_SLOT = re.compile(r"\$\{(.*)\}")
_UNDER = "${}"
"""Key of the slot that the other keys of its mapping lie over."""


class _Yaml(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number (YAML 1.2) and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.MarkedYAMLError(problem=f"the key {twice!r} stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _existing(path: Path) -> Path:
    for candidate in (path, ROOT / path):
        if candidate.is_file():
            return candidate.resolve()
    raise RecipeError(f"{path}: no such recipe; recipes stand under {shown(ROOT / 'configs')}")


def _compose(path: Path, origins: dict[tuple[str, ...], str], above: tuple[Path, ...]) -> dict[str, Any]:
    if path in above:
        raise RecipeError(f"{shown(path)}: base: the file is its own base, by way of {shown(above[-1])}")
    own = read_yaml(path)
    if not isinstance(own, dict):
        raise RecipeError(f"{shown(path)}: expected a mapping of keys, got {type(own).__name__}")
    bases = own.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise RecipeError(f"{shown(path)}: base: expected a file or a list of files, got {bases!r}")
    tree: dict[str, Any] = {}
    for base in bases:
        base_path = (path.parent / base).resolve()
        if not base_path.is_file():
            raise RecipeError(f"{shown(path)}: base: there is no file {base!r} beside it")
        _merge(tree, _compose(base_path, origins, (*above, path)), None, origins)
    _anchor_references(own, path)
    _merge(tree, own, shown(path), origins)
    return tree


def _merge(
    tree: dict[str, Any],
    own: dict[str, Any],
    origin: str | None,
    origins: dict[tuple[str, ...], str],
    at: tuple[str, ...] = (),
) -> None:
    """Lay ``own`` over ``tree``: mappings are merged, anything else replaces. ``origins`` learns who said what."""
    for key, value in own.items():
        here = (*at, str(key))
        if origin is not None:
            origins[here] = origin
        if isinstance(value, dict):
            below = tree.get(key)
            if isinstance(below, str) and _SLOT.fullmatch(below):
                below = {_UNDER: below}  # a constant that is a mapping may be changed in part
            tree[key] = below if isinstance(below, dict) else {}
            _merge(tree[key], value, origin, origins, here)
        else:
            tree[key] = value


def _without_nulls(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree without the keys that a null deletes; only now, since a base may delete another base's."""
    kept = ((key, value) for key, value in tree.items() if value is not None)
    return {key: _without_nulls(value) if isinstance(value, dict) else value for key, value in kept}


def _filled(
    tree: dict[str, Any],
    constants: dict[str, Any],
    origins: dict[tuple[str, ...], str],
    default: str,
    at: tuple[str, ...],
) -> dict[str, Any]:
    """Return the tree with each ``${name}`` replaced by what ``constants`` hold under that dotted name."""
    filled: dict[str, Any] = {}
    for key, value in tree.items():
        here = at if key == _UNDER else (*at, str(key))
        slot = _SLOT.fullmatch(value) if isinstance(value, str) else None
        where = f"{origins.get(here, default)}: {'.'.join(here)}"
        if isinstance(value, dict):
            found: Any = _filled(value, constants, origins, default, here)
        else:
            found = _constant(constants, slot[1], where) if slot else value
        if key == _UNDER and not isinstance(found, dict):
            raise RecipeError(f"{where}: ${{{slot[1] if slot else ''}}} is one value, {found!r}, and has no keys")
        _merge(filled, found if key == _UNDER else {key: found}, None, {})
    return filled


def _constant(constants: Any, name: str, where: str) -> Any:
    found = constants
    for part in name.split("."):
        if not isinstance(found, dict) or part not in found:
            known = f"known are {', '.join(constants)}" if constants else "there are none"
            raise RecipeError(f"{where}: there is no constant {name!r}; {known}")
        found = found[part]
    return deepcopy(found)


def _override(word: str) -> dict[str, Any]:
    key, _, text = word.partition("=")
    try:
        value = yaml.load(text, _Yaml)
    except yaml.YAMLError:
        raise RecipeError(f"command line: {key}: {text!r} is not YAML") from None
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _unpack_models(tree: dict[str, Any]) -> None:
    """Turn ``model: {path: package.module:factory, stages: {…}}`` into the keys ``model`` and ``stages``."""
    teacher = tree.get("teacher")
    members = teacher.get("members") if isinstance(teacher, dict) else None
    for section in (tree.get("student"), teacher, *(members if isinstance(members, list) else ())):
        own = section.get("model") if isinstance(section, dict) else None
        if isinstance(own, dict) and isinstance(section, dict) and own.keys() <= {"path", "stages"}:
            section |= {"model": own.get("path"), "stages": own.get("stages", section.get("stages"))}


def _references(tree: dict[str, Any]) -> Iterator[tuple[dict[str, Any] | list[Any], Any]]:
    """Yield every place, as container and key, that names another recipe."""
    for keys in (("teacher",), ("student", "start")):
        section: Any = tree
        for key in keys:
            section = section.get(key) if isinstance(section, dict) else None
        members = section.get("members") if isinstance(section, dict) else None
        for one in (section, *(members if isinstance(members, list) else ())):
            if isinstance(one, dict) and isinstance(one.get("recipe"), str):
                yield one, "recipe"
    if isinstance(tree.get("compare"), list):
        yield from ((tree["compare"], index) for index in range(len(tree["compare"])))


def _anchor_references(own: dict[str, Any], path: Path) -> None:
    """Make what a file says of other recipes relative to that file hold wherever the file is used as a base."""
    for container, key in _references(own):
        beside = path.parent / str(container[key])
        if beside.is_file():
            container[key] = shown(beside.resolve())


def _resolve_references(tree: dict[str, Any], path: Path) -> None:
    for container, key in _references(tree):
        try:
            container[key] = shown(_existing(Path(str(container[key]))))
        except RecipeError as error:
            raise RecipeError(f"{shown(path)}: another recipe is named that is not there: {error}") from None


def shown(path: Path) -> str:
    """Return the path as a message shows it: relative to the project where it lies inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


# -- errors -----------------------------------------------------------------------------------------------------------


def _one_line(error: ValidationError, origins: dict[tuple[str, ...], str], default: str) -> str:
    first = error.errors(include_url=False)[0]
    location = tuple(str(part) for part in first["loc"])
    where = next((origins[location[:n]] for n in range(len(location), 0, -1) if location[:n] in origins), default)
    key = ".".join(location)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {key + ': ' if key else ''}{_explained(dict(first), location)}{more}"


def _explained(first: dict[str, Any], location: tuple[str, ...]) -> str:
    if first["type"] == "extra_forbidden":
        known = sorted(_known_keys(location[:-1]))
        near = difflib.get_close_matches(location[-1], known, n=1)
        return f"unknown key; did you mean {near[0]!r}?" if near else f"unknown key; known here are {', '.join(known)}"
    if first["type"] == "missing":
        return "this key is required"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if first["type"] == "value_error":
        return message
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
