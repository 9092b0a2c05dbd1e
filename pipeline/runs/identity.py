"""The identity of a run, by which two runs are equal or not, and a run with the runs that it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.batch import rows_per_rank
from pipeline.config.paths import default_folder
from pipeline.config.recipe import LoadedRecipe, Recipe, dump_recipe
from pipeline.config.source import RecipeSource
from pipeline.data.buckets import epoch_batches
from pipeline.data.config import Unlabelled
from pipeline.data.holdout import training_images
from pipeline.distributed.launcher import Launch
from pipeline.errors import RecipeError, display_path, error_context
from pipeline.runs.files import IDENTITY, LOSS_MODULES, Identity, Result, read_identity, read_result, route_file
from pipeline.runs.weights import name_by_content, name_extractors, with_normalization
from pipeline.teachers.cache import Cache, open_cache
from pipeline.teachers.config import Config as TeacherConfig
from pipeline.teachers.pseudo import PseudoLabels, has_pseudo_labels
from shards.manifest import Manifest, read_manifest

# Keys that a command may change and still continue the same run.
_NOT_IDENTITY = ("folder", "stop", "journal", "checkpoints", "graph")
_NOT_IDENTITY_STUDENT = ("checkpoint",)
_NOT_IDENTITY_TEACHER = ("accept", "encode")
_NOT_IDENTITY_DATA = ("path", "samples", "threads", "prefetch")
# How a recipe names another run, whose fingerprint stands for it.
_NOT_IDENTITY_REFERENCE = ("method", "with")
# Keys that are part of the identity only if they are set, with the value that is not.
_OPTIONS = {
    "task": "classification",
    "order_seed": None,
    "holdout": None,
    "repeat": 1,
    "validation_size": None,
    "size": None,
    "hw_decoder_load": 0,
    "cache": None,
    "fallback": None,
    "compile": False,
    "compress": None,
    "checkpoint": False,
    "sync_batchnorm": False,
    "weights_key": None,
    "head": "keep",
    "part": "all",
    "parts": [],
    "arguments": {},
    "freeze": [],
    "inherit": [],
    "rates": {},
    "betas": None,
    "eps": None,
    "power": None,
    "every": None,
    "unit": "step",
    "warmup": False,
    "augment": [],
    "scales": None,
    "short": None,
    "long": None,
    "buckets": None,
    "linear": False,
    "level_weight": "equal",
    "class_maps": None,
    "maps": None,
    "cycles": None,
    "pairs": False,
    "peers": None,
    "export": 0,
    "shared": None,
    "within": None,
    "views_per_step": 1,
    "half": False,
    "kd_weight": 1.0,
    "export_exits": False,
    "unlabelled": None,
    "from": "teacher",
    "rows": "all",
    "gaussian": None,
    "steps": [],
    "route": None,
    "snapshots": None,
    "train": [],
    "upscale": 1,
}
# Keys whose values are the user's own names, in which nothing is off.
_VERBATIM = ("arguments", "rates", "within")


@dataclass(frozen=True)
class Run:
    """A recipe with its shards, folder and identity, and with the runs that it names; all are read only once."""

    recipe: Recipe
    source: RecipeSource
    """The recipe's files."""
    folder: Path
    manifest: Manifest
    """Manifest of its shards."""
    identity: dict[str, Any]
    teachers: tuple[Run, ...] = ()
    """Runs of ``recipe.teacher.runs``, in that order."""
    start: Run | None = None
    """Run of ``student.start``."""
    of_losses: tuple[Run, ...] = ()
    """Runs of ``recipe.loss_runs``, in that order."""
    overrides: tuple[str, ...] = ()
    """The overrides with which the recipe was loaded."""
    resolve_compare: Callable[[], tuple[Run, ...]] = field(default=tuple, repr=False, compare=False)

    @cached_property
    def compare(self) -> tuple[Run, ...]:
        """Return the runs of ``recipe.compare``. They are resolved at their first use: no identity depends on them."""
        return self.resolve_compare()

    @property
    def path(self) -> Path:
        """Return the recipe file."""
        return self.source.path

    @property
    def result(self) -> Result | None:
        """Return the results of the finished run with this identity; None if it is missing or not finished."""
        result = read_result(self.folder) if (self.folder / IDENTITY).exists() else None
        return result if result and result.identity == self.fingerprint else None

    @cached_property
    def training_images(self) -> int:
        """Return the number of images that the run trains on."""
        return training_images(self.recipe.data.path, self.manifest, self.recipe.data.holdout)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Return the number of complete global batches in an epoch; 0 if there are fewer images than that."""
        if "train" not in self.manifest.splits:
            return 0
        return epoch_batches(self.recipe.data, self.manifest, self.recipe.batch)

    @property
    def fingerprint(self) -> str:
        """Return the sha256 of the identity."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def command(self) -> str:
        """Return the command that trains this run."""
        return f"python pipeline/train.py {self.source}"

    @property
    def needed(self) -> tuple[Run, ...]:
        """Return the runs that must be finished first: all but a cached teacher's."""
        teacher = self.recipe.teacher
        teachers = self.teachers if teacher and teacher.uses_live_model else ()
        return (*teachers, *([self.start] if self.start else []), *self.of_losses, *self.compare)


def run_folder(loaded: LoadedRecipe) -> Path:
    """Return the recipe's ``folder``, or its default below the current folder."""
    if loaded.recipe.folder is not None:
        return Path(loaded.recipe.folder)
    return default_folder(loaded.source, loaded.recipe.seed, loaded.recipe.data.holdout is not None)


def resolve(loaded: LoadedRecipe, launch: Launch) -> Run:
    """Return the run of a recipe, with the runs that it names; the shards must exist."""
    with error_context(display_path(loaded.path)):
        manifest = read_manifest(Path(loaded.recipe.data.path))
    return _resolve(loaded, manifest, launch, {}, ())


def _resolve(
    loaded: LoadedRecipe, manifest: Manifest, launch: Launch, known: dict[int, Run], above: tuple[RecipeSource, ...]
) -> Run:
    """Return the run. ``known`` has the runs resolved so far, by the id of their LoadedRecipe, on the same shards.

    ``above`` are the recipes that led to this one. Raises RecipeError if a run depends on itself, because its
    identity would contain itself.
    """
    check_no_cycle(loaded, above)
    if id(loaded) in known:
        return known[id(loaded)]

    def resolve_named(other: LoadedRecipe) -> Run:
        return _resolve(other, manifest, launch, known, (*above, loaded.source))

    folder = run_folder(loaded)
    teachers, start = tuple(map(resolve_named, loaded.teachers)), loaded.start and resolve_named(loaded.start)
    of_losses = tuple(map(resolve_named, loaded.of_losses))
    with error_context(display_path(loaded.path)):
        sources = [run.recipe for run in teachers]
        check_route(loaded.recipe.teacher, sources)
        recipe = _fill_defaults(with_normalization(loaded.recipe, sources), folder, launch)
        ours = identity(recipe, folder, manifest, teachers, start and start.fingerprint, of_losses)
    # The key is the id, because a recipe contains dicts and cannot be hashed. Compared runs are resolved only when they
    # are needed: for a finished run, their caches and recipes may be gone.
    named = (teachers, start, of_losses, loaded.overrides, lambda: tuple(map(resolve_named, loaded.compare)))
    run = known[id(loaded)] = Run(recipe, loaded.source, folder, manifest, ours, *named)
    return run


def check_route(teacher: TeacherConfig | None, sources: Sequence[Recipe]) -> None:
    """Raise RecipeError if a teacher's route goes beyond its run. ``sources`` are the recipes of ``teacher.runs``."""
    if teacher and teacher.route and teacher.route.epochs[-1] > sources[0].epochs:
        raise RecipeError(
            f"teacher.route.epochs: {teacher.route.epochs[-1]} is beyond the teacher's run, whose epochs are "
            f"{sources[0].epochs}; give epochs of that run"
        )


def check_no_cycle(loaded: LoadedRecipe, above: tuple[RecipeSource, ...]) -> None:
    """Raise RecipeError if the recipe is one of those that led to it."""
    if loaded.source in above:
        raise RecipeError(f"{loaded.source}: the recipe depends on itself, through {above[-1]}")


def _fill_defaults(recipe: Recipe, folder: Path, launch: Launch) -> Recipe:
    """Return the recipe with ``teacher.batch`` and ``data.views`` set, where it leaves them to the run.

    A run that has begun keeps its values. Then another number of ranks runs the teacher on equal batches, and views
    that a cache gets later change nothing. In a new run, the batch is a rank's rows, and all views are used.
    """
    teacher, data = recipe.teacher, recipe.data
    if teacher is None:
        return recipe
    begun = read_identity(folder)
    if teacher.batch is None:
        batch = begun and begun.teacher and begun.teacher.batch
        rows = rows_per_rank(recipe.batch, launch.world_size, recipe.accumulation)
        teacher = teacher.model_copy(update={"batch": batch or rows})
    if teacher.cache is not None and data.views is None:
        views = (begun and begun.data.views) or _read_cache(teacher.cache).header.views
        data = data.model_copy(update={"views": views})
    return recipe.model_copy(update={"teacher": teacher, "data": data})


def _read_cache(folder: str) -> Cache:
    with error_context("teacher.cache"):
        return Cache(Path(folder))


def _cache_digest(recipe: Recipe, cache: str, folder: Path) -> str:
    """Return the digest of the cached outputs; if the cache is gone, that of the run in ``folder``, which used it."""
    if open_cache(Path(cache)) is None and (begun := read_identity(folder)) and begun.teacher and begun.teacher.cache:
        return begun.teacher.cache
    return _read_cache(cache).digest(recipe.taps.teacher)


def fixed_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain data, without keys that a command may change and still continue the same run."""
    tree = dump_recipe(recipe)
    for key in _NOT_IDENTITY:
        del tree[key]
    for key in _NOT_IDENTITY_DATA:
        del tree["data"][key]
    for key in _NOT_IDENTITY_STUDENT:
        del tree["student"][key]
    for key in _NOT_IDENTITY_TEACHER:
        (tree["teacher"] or {}).pop(key, None)
    tree["compare"] = []  # a table at the end changes no number
    if tree["data"]["validation_size"] == tree["data"]["size"]:
        tree["data"]["validation_size"] = None  # two words for the same images
    tree["data"]["validation_batch"] = None  # null in the identities of old runs, and training does not depend on it
    if not recipe.data.unlabelled_ratio:
        tree["data"]["unlabelled"] = None  # nothing of it is read
    return tree


def identity(
    recipe: Recipe,
    run: Path,
    manifest: Manifest,
    teachers: Sequence[Run],
    start: str | None,
    of_losses: Sequence[Run] = (),
) -> dict[str, Any]:
    """Return the identity of the run in folder ``run``: the resolved recipe, with digests in place of paths.

    Shards, and a teacher's run or cache, have a digest; files of weights have that of their tensors. ``teachers`` are
    the runs that the recipe names. ``start`` is the fingerprint of the run whose student this one begins with.
    ``of_losses`` are those whose auxiliary modules the losses begin with.
    """
    tree = fixed_settings(recipe)
    tree["data"]["manifest"] = manifest.sha256
    tree["data"]["classes"] = classes_sha256(manifest)
    if recipe.data.unlabelled and recipe.data.unlabelled_ratio:
        tree["data"]["unlabelled"] = _name_unlabelled(recipe.data.unlabelled, run)
    if begun := read_identity(run):  # earlier code wrote the recipe's value, and a run keeps its identity
        tree["data"]["validation_batch"] = begun.data.validation_batch
    teacher = tree["teacher"] or {}
    networks = [section for section in (teacher.get("members") or (teacher,)) if section.get("recipe")]
    for section, teacher_run in zip(networks, teachers, strict=True):
        section["recipe"] = teacher_run.fingerprint
    name_by_content(tree, recipe, [teacher_run.recipe for teacher_run in teachers], run, manifest.num_classes)
    if tree["student"]["start"] and start:
        tree["student"]["start"]["recipe"] = start
    if teacher:
        teacher["expect_top1"] = teacher.pop("expect")  # its name in the identities of old runs
    if teacher.get("cache"):
        teacher["cache"] = _cache_digest(recipe, teacher["cache"], run)
    if route := teacher.get("route"):
        route["sha256"] = _route_digests(recipe, teachers[0], begun)
    _name_loss_runs(tree, recipe, of_losses, begun)
    name_extractors(tree, recipe, run)
    for section in (*(teacher.get("members") or ()), teacher, tree["student"]["start"] or {}):
        for key in _NOT_IDENTITY_REFERENCE:
            section.pop(key, None)
    return _without_unused(tree)


def _route_digests(recipe: Recipe, teacher: Run, begun: Identity | None) -> list[str | None]:
    """Return the digests of the weights of a teacher's route; while they are not there, those of ``begun``."""
    assert recipe.teacher is not None
    assert recipe.teacher.route is not None
    if teacher.result:
        return [teacher.result.sha256.get(route_file(epoch)) for epoch in recipe.teacher.route.epochs]
    return (begun.teacher.route or {}).get("sha256", []) if begun and begun.teacher else []


def _name_unlabelled(config: Unlabelled, folder: Path) -> dict[str, Any]:
    """Return the images without labels by their digests, and that of their pseudo-labels.

    If the pseudo-labels are gone, it is that of the run in ``folder``, which used them.
    """
    with error_context("data.unlabelled.path"):
        manifest = read_manifest(Path(config.path))
    digest, begun = None, read_identity(folder)
    if config.pseudo is not None:
        known = begun and begun.data.unlabelled and begun.data.unlabelled.pseudo
        with error_context("data.unlabelled.pseudo"):
            gone = known and not has_pseudo_labels(Path(config.pseudo))
            digest = known if gone else PseudoLabels(Path(config.pseudo)).digest
    return {"manifest": manifest.sha256, "ratio": config.ratio, "pseudo": digest}


def _name_loss_runs(tree: dict[str, Any], recipe: Recipe, runs: Sequence[Run], begun: Identity | None) -> None:
    """Replace each run that a loss names by its fingerprint, and the digest of the modules that it left.

    While they are not there, the digest is that of ``begun``, the identity of a run that used them.
    """
    remaining = iter(runs)
    for name, spec in recipe.losses.items():
        for key in spec.runs:
            run = next(remaining)
            known = (begun.losses.get(name) or {}).get(key) if begun else None
            digest = run.result.sha256.get(LOSS_MODULES) if run.result else (known or {}).get("sha256")
            tree["losses"][name][key] = {"recipe": run.fingerprint, **({"sha256": digest} if digest else {})}


def classes_sha256(manifest: Manifest) -> str:
    """Return the digest of the names of the classes, in their order."""
    return hashlib.sha256(json.dumps(manifest.classes).encode()).hexdigest()


def _without_unused(tree: Any) -> Any:
    """Return the tree without options that are off, so that a new option does not change the identity of old runs."""
    if isinstance(tree, dict):
        unused = {key for key, off in _OPTIONS.items() if tree.get(key) in (None, off)}
        kept = {key: value for key, value in tree.items() if key not in unused}
        return {key: value if key in _VERBATIM else _without_unused(value) for key, value in kept.items()}
    return [_without_unused(value) for value in tree] if isinstance(tree, list) else tree


def differing_keys(a: Any, b: Any, at: str = "") -> list[str]:
    """Return the dotted keys at which two identities differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys())
        return [
            key for name in keys for key in differing_keys(a.get(name), b.get(name), f"{at}.{name}" if at else name)
        ]
    return [] if a == b else [at]
