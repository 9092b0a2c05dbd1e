"""Builds this rank's loader from a recipe."""

from __future__ import annotations

import torch

from pipeline.config.recipe import Recipe
from pipeline.data.config import Config
from pipeline.data.loader import Loader, create_loader
from pipeline.distributed import collectives
from pipeline.errors import RecipeError
from pipeline.tasks._registry import find_task
from pipeline.teachers.cached import AnyTeacher, CachedTeacher
from shards.manifest import Manifest


def build_loader(
    recipe: Recipe,
    manifest: Manifest,
    device: torch.device,
    splits: tuple[str, ...],
    teacher: AnyTeacher | None = None,
) -> Loader:
    """Return this rank's loader of those splits. It also reads the cached outputs of ``teacher`` ahead of use.

    Raises RecipeError if the shards are of another task.
    """
    check_task(recipe, manifest)
    return create_loader(
        recipe.data,
        batch=recipe.batch,
        accumulation=recipe.accumulation,
        seed=recipe.order_seed,
        rank=collectives.rank(),
        world=collectives.world_size(),
        device=device,
        columns=teacher.columns if isinstance(teacher, CachedTeacher) else None,
        splits=splits,
        manifest=manifest,
    )


def check_task(recipe: Recipe, manifest: Manifest) -> None:
    """Raise RecipeError if the images of the shards do not have the targets of the recipe's task."""
    if recipe.task == manifest.task:
        return
    if manifest.task == "unlabelled":
        raise RecipeError(
            f"data.path: the images in {recipe.data.path} have no labels; give them as data.unlabelled.path"
        )
    script = find_task(recipe.task).script
    raise RecipeError(
        f"task: {recipe.task}: the images in data.path: {recipe.data.path} {find_task(manifest.task).images_have}; "
        f"set task: {manifest.task}, {f'or prepare shards with {script}, ' if script else ''}or give another data.path"
    )


def training_splits(config: Config, manifest: Manifest) -> tuple[str, ...]:
    """Return ``train`` and, if there are validation images, ``val``."""
    return ("train", "val") if "val" in manifest.splits or config.holdout else ("train",)
