"""From a recipe to what it names: loader, teacher, student, Distiller. Each function builds one thing."""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

import torch

from pipeline import parallel
from pipeline.data.loader import Loader, create_loader
from pipeline.distiller import Distiller
from pipeline.losses._base import Facts
from pipeline.models import create_model
from pipeline.models.stages import stages
from pipeline.models.weights import load_weights
from pipeline.recipe import Recipe, RecipeError, load_recipe
from pipeline.runs import STUDENT, Run, find_run
from pipeline.taps import FeatureTaps, tap_shapes
from pipeline.teacher import Normalization, Teacher

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_loader(recipe: Recipe, device: torch.device, splits: tuple[str, ...] = ("train", "val")) -> Loader:
    """Return this rank's loader."""
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


def build_student(recipe: Recipe, num_classes: int) -> FeatureTaps:
    """Return the student as the recipe's seed initialises it, with the taps its losses read."""
    torch.manual_seed(recipe.seed)
    config = recipe.student
    model = create_model(config.model, num_classes)
    return FeatureTaps(model, stages(model) | (config.stages or {}), recipe.taps.student)


def load_start(recipe: Recipe, student: FeatureTaps) -> None:
    """Load the weights that ``student.start`` names, if it does."""
    start = recipe.student.start
    if start is not None:
        weights = start.weights or str(_run_of(start.recipe).folder / STUDENT)
        load_weights(student.model, weights, recipe.student.model)


def build_teacher(recipe: Recipe, loader: Loader, device: torch.device) -> Teacher | None:
    """Return the frozen teacher, or None for a recipe without one.

    Raises RecipeError where it learned other classes than the shards'.
    """
    config = recipe.teacher
    if config is None:
        return None
    source = _teacher_source(recipe, loader)
    model = create_model(source.model, loader.num_classes)
    load_weights(model, source.weights, source.model)
    given = Normalization(recipe.data.mean, recipe.data.std)
    return Teacher(
        FeatureTaps(model, stages(model) | (source.stages or {}), recipe.taps.teacher),
        batch=config.batch or 1,
        image_size=recipe.data.size,
        dtype=config.torch_dtype(device),
        device=device,
        given=given,
        expected=Normalization(config.mean or source.normalization.mean, config.std or source.normalization.std),
        fold=config.fold,
    )


class _Source(NamedTuple):
    """Where a teacher comes from, once a recipe it stands on has been looked up."""

    model: str
    weights: str
    stages: dict[str, str] | None
    normalization: Normalization


def _teacher_source(recipe: Recipe, loader: Loader) -> _Source:
    config = recipe.teacher
    assert config is not None
    if config.recipe is None:
        assert config.model is not None
        assert config.weights is not None
        return _Source(config.model, config.weights, config.stages, Normalization(recipe.data.mean, recipe.data.std))
    run = _run_of(config.recipe)
    result = run.result or {}
    if result.get("classes") != classes_sha256(loader):
        raise RecipeError(
            f"data.path: the classes of {recipe.data.path} are not those that the teacher of {config.recipe} learned; "
            "prepare the shards with the same --classes, or train the teacher on these"
        )
    weights = config.weights or str(run.folder / STUDENT)
    student, data = run.recipe.student, run.recipe.data
    return _Source(student.model, weights, config.stages or student.stages, Normalization(data.mean, data.std))


def _run_of(recipe: str | None) -> Run:
    assert recipe is not None
    return find_run(load_recipe(recipe))


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
    return Distiller(student, recipe.losses, facts).to(device)


def classes_sha256(loader: Loader) -> str:
    """Return what identifies the class names of the shards in the order of their labels."""
    return hashlib.sha256(json.dumps(loader.manifest.classes).encode()).hexdigest()
