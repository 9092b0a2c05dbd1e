"""What makes a run this run and no other: its recipe, its folder, its shards and the runs it stands on."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.compose import read_yaml
from pipeline.config.paths import default_folder
from pipeline.config.recipe import LoadedRecipe, Recipe, dump_recipe, load_recipe
from pipeline.distributed.rendezvous import world_size_asked
from pipeline.errors import about, shown
from pipeline.runs.files import ANOTHER, IDENTITY, RECIPE, RESULT, read_json
from pipeline.teachers.cache import Cache, open_cache
from shards.manifest import manifest_sha256, read_manifest

# What a command may change without making another run.
_NOT_IDENTITY = ("folder", "stop", "journal", "checkpoints")
_NOT_IDENTITY_TEACHER = ("accept", "encode")
_NOT_IDENTITY_DATA = ("path", "samples", "threads", "prefetch", "hw_decoder_load")
# What makes another run only where it is asked for.
_OPTIONS = ("cache", "fallback", "compile", "compress", "checkpoint")


@dataclass(frozen=True)
class Run:
    """A recipe, its folder and its identity."""

    recipe: Recipe
    path: Path
    """The recipe file."""
    folder: Path
    identity: dict[str, Any]

    @property
    def result(self) -> dict[str, Any] | None:
        """What the finished run of this identity measured; None if it is not there or not finished."""
        file = self.folder / RESULT
        if not file.is_file():
            return None
        result = read_json(file, "delete it, and the run is measured again")
        return result if result["identity"] == self.digest else None

    @property
    def digest(self) -> str:
        """The identity's sha256."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def command(self) -> str:
        """The command that makes this run."""
        return f"python pipeline/train.py {shlex.quote(shown(self.path))}"


def run_folder(loaded: LoadedRecipe) -> Path:
    """Return ``folder:``, or ``runs/<path under configs/>/seed-<n>`` below the current folder."""
    if loaded.recipe.folder is not None:
        return Path(loaded.recipe.folder)
    return default_folder(loaded.path, loaded.recipe.seed)


def find_run(loaded: LoadedRecipe) -> Run:
    """Return the run of a recipe whose shards are there."""
    recipe, folder = loaded.recipe, run_folder(loaded)
    with about(shown(loaded.path)):
        recipe = _resolved(recipe, folder)
        return Run(recipe, loaded.path, folder, identity(recipe, folder))


def _resolved(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with what it leaves to the run: the teacher's chunk, and the views of a cache.

    A run that has begun keeps its own, so that other ranks ask alike, and a cache may grow; else the chunk is a rank's
    rows, and the views are all.
    """
    teacher, data = recipe.teacher, recipe.data
    if teacher is None:
        return recipe
    begun = (read_yaml(folder / RECIPE) or {}) if (folder / RECIPE).is_file() else {}
    if teacher.batch is None:
        batch = (begun.get("teacher") or {}).get("batch")
        own = max(recipe.batch // (world_size_asked() * recipe.accumulation), 1)
        teacher = teacher.model_copy(update={"batch": batch or own})
    if teacher.cache is not None and data.views is None:
        views = (begun.get("data") or {}).get("views") or _cache(teacher.cache).header.views
        data = data.model_copy(update={"views": views})
    return recipe.model_copy(update={"teacher": teacher, "data": data})


def _cache(folder: str) -> Cache:
    with about("teacher.cache"):
        return Cache(Path(folder))


def _cache_digest(recipe: Recipe, cache: str, folder: Path) -> str:
    """Return what stands for the cache's answers; where it is gone, what the run that began from it kept of it."""
    if open_cache(Path(cache)) is None and (folder / IDENTITY).is_file():
        kept = (read_json(folder / IDENTITY, ANOTHER)["teacher"] or {}).get("cache")
        if kept:
            return kept
    return _cache(cache).digest(recipe.taps.teacher)


def identity(recipe: Recipe, run: Path) -> dict[str, Any]:
    """Return what makes ``run`` this run: the resolved recipe, shards by sha256, a teacher's run or cache by digest."""
    tree = dump_recipe(recipe)
    for key in _NOT_IDENTITY:
        del tree[key]
    for key in _NOT_IDENTITY_DATA:
        del tree["data"][key]
    folder = Path(recipe.data.path)
    tree["data"]["manifest"] = manifest_sha256(folder)
    tree["data"]["classes"] = hashlib.sha256(json.dumps(read_manifest(folder).classes).encode()).hexdigest()
    teacher = tree["teacher"] or {}
    for section in (teacher, *(teacher.get("members") or ()), tree["student"]["start"]):
        if section and section["recipe"]:
            section["recipe"] = find_run(load_dependency(recipe, section["recipe"])).digest
    if teacher.get("cache"):
        teacher["cache"] = _cache_digest(recipe, teacher["cache"], run)
    for key in _NOT_IDENTITY_TEACHER:
        teacher.pop(key, None)
    return _without_unused(tree)


def _without_unused(tree: Any) -> Any:
    """Return the tree without options that are off: a run is the one that it was before there were any."""
    if isinstance(tree, dict):
        return {key: _without_unused(value) for key, value in tree.items() if value or key not in _OPTIONS}
    return [_without_unused(value) for value in tree] if isinstance(tree, list) else tree


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Return the dotted keys at which two identities differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys())
        return [key for name in keys for key in differences(a.get(name), b.get(name), f"{at}.{name}" if at else name)]
    return [] if a == b else [at]


def dependencies(recipe: Recipe) -> list[str]:
    """Return the recipes whose runs ``recipe`` needs, each once: of those it names all but a cached teacher's."""
    cached = recipe.teacher.recipes if recipe.teacher and not recipe.teacher.is_asked else []
    return [path for path in named_recipes(recipe) if path not in cached or path in recipe.compare]


def named_recipes(recipe: Recipe) -> list[str]:
    """Return the recipes that ``recipe`` names, each once."""
    teacher = recipe.teacher.recipes if recipe.teacher else []
    start = [recipe.student.start.recipe] if recipe.student.start and recipe.student.start.recipe else []
    return list(dict.fromkeys([*teacher, *start, *recipe.compare]))


def load_dependency(recipe: Recipe, path: str) -> LoadedRecipe:
    """Return a recipe that ``recipe`` stands on, on the same shards, wherever this command says that they lie.

    A student's own first stage has the student's seed; teachers and compared runs keep theirs.
    """
    return load_recipe(path, overrides_for(recipe, path))


def overrides_for(recipe: Recipe, path: str) -> list[str]:
    """Return the overrides with which ``recipe`` stands on the one at ``path``; where the shards lie comes first."""
    others = (*(recipe.teacher.recipes if recipe.teacher else ()), *recipe.compare)
    start = recipe.student.start
    own = start is not None and start.recipe == path and path not in others
    return [f"data.path={json.dumps(recipe.data.path)}", *([f"seed={recipe.seed}"] if own else [])]
