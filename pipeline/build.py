"""From a recipe to what it names: loader, teacher, student, Distiller. Each function builds one thing."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pipeline import parallel
from pipeline.data.loader import Loader, create_loader
from pipeline.distiller import Distiller
from pipeline.losses._base import Facts
from pipeline.models import create_model
from pipeline.models.stages import stages
from pipeline.models.weights import load_weights
from pipeline.recipe import Recipe, RecipeError, about
from pipeline.runs import STUDENT, Run, find_run, load_dependency
from pipeline.taps import FeatureTaps, tap_shapes
from pipeline.teacher import Normalization, Teacher
from shards.manifest import Manifest

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_loader(recipe: Recipe, device: torch.device, splits: tuple[str, ...]) -> Loader:
    """Return this rank's loader of those splits."""
    return create_loader(
        recipe.data,
        batch=recipe.batch,
        accumulation=recipe.accumulation,
        seed=recipe.seed,
        rank=parallel.rank(),
        world=parallel.world_size(),
        device=device,
        splits=splits,
    )


def training_splits(manifest: Manifest) -> tuple[str, ...]:
    """Return ``train`` and, where the shards have it, ``val``."""
    return ("train", "val") if "val" in manifest.splits else ("train",)


def build_student(recipe: Recipe, num_classes: int) -> FeatureTaps:
    """Return the student as the recipe's seed initialises it, with the taps its losses read."""
    torch.manual_seed(recipe.seed)
    config = recipe.student
    with about("student.model"):
        model = create_model(config.model, num_classes)
    with about("student.stages"):
        taps = FeatureTaps(model, stages(model) | (config.stages or {}), recipe.taps.student)
    # The weights' layout is the images', or every gradient would be copied into DDP's buckets in another.
    return taps.to(memory_format=layout(recipe))  # type: ignore[call-overload]


def layout(recipe: Recipe) -> torch.memory_format:
    """Return the memory format of images and weights."""
    return torch.channels_last if recipe.data.channels_last else torch.contiguous_format


def load_start(recipe: Recipe, student: FeatureTaps) -> None:
    """Load the weights that ``student.start`` names, if it does."""
    start = recipe.student.start
    if start is not None:
        weights = start.weights or str(_finished(recipe, start.recipe).folder / STUDENT)
        with about("student.start"):
            load_weights(student.model, weights, recipe.student.model)


def build_teacher(recipe: Recipe, manifest: Manifest, device: torch.device) -> Teacher | None:
    """Return the frozen teacher, or None for a recipe without one.

    Raises RecipeError where its weights do not fit the network or the shards' classes.
    """
    config = recipe.teacher
    if config is None:
        return None
    source = _teacher_source(recipe)
    with about("teacher.model"):
        model = create_model(source.model, manifest.num_classes)
    with about("teacher.weights"):
        load_weights(model, source.weights, source.model)
    with about("teacher.stages"):
        taps = FeatureTaps(model, stages(model) | (source.stages or {}), recipe.taps.teacher)
    return Teacher(
        taps,
        batch=config.batch or 1,
        image_size=recipe.data.size,
        dtype=config.torch_dtype(device),
        device=device,
        given=Normalization(recipe.data.mean, recipe.data.std),
        expected=Normalization(config.mean or source.normalization.mean, config.std or source.normalization.std),
        fold=config.fold,
    )


class _Source(NamedTuple):
    """Where a teacher comes from, once a recipe it stands on has been looked up."""

    model: str
    weights: str
    stages: dict[str, str] | None
    normalization: Normalization


def _teacher_source(recipe: Recipe) -> _Source:
    config = recipe.teacher
    assert config is not None
    if config.recipe is None:
        assert config.model is not None
        assert config.weights is not None
        return _Source(config.model, config.weights, config.stages, Normalization(recipe.data.mean, recipe.data.std))
    run = _finished(recipe, config.recipe)
    weights = config.weights or str(run.folder / STUDENT)
    student, data = run.recipe.student, run.recipe.data
    return _Source(student.model, weights, config.stages or student.stages, Normalization(data.mean, data.std))


def _finished(recipe: Recipe, path: str | None) -> Run:
    """Return the finished run of another recipe that ``recipe`` stands on."""
    assert path is not None
    run = find_run(load_dependency(recipe, path))
    if run.result is None:
        raise RecipeError(f"{run.folder} holds no finished run of {path}; make it: {run.command}")
    return run


def build_distiller(recipe: Recipe, loader: Loader, teacher: Teacher | None, device: torch.device) -> Distiller:
    """Return the student with the recipe's losses, on the device."""
    student = build_student(recipe, loader.num_classes)
    load_start(recipe, student)
    size = recipe.data.size
    facts = Facts(
        num_classes=loader.num_classes,
        student_shapes=tap_shapes(student, size),
        teacher_shapes=tap_shapes(teacher.taps, size) if teacher else {},
        id_count=loader.id_count,
        labels_by_id=loader.labels_by_id,
        autocast=AUTOCAST[recipe.precision],
    )
    distiller = Distiller(student, recipe.losses, facts).to(device)
    return distiller.to(memory_format=layout(recipe))  # type: ignore[call-overload]
