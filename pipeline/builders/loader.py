"""Builds this rank's loader from a recipe."""

from __future__ import annotations

import torch

from pipeline.config.recipe import Recipe
from pipeline.data.config import Config
from pipeline.data.loader import Loader, create_loader
from pipeline.distributed import collectives
from pipeline.teachers.cached import AnyTeacher, CachedTeacher
from shards.manifest import Manifest


def build_loader(
    recipe: Recipe,
    manifest: Manifest,
    device: torch.device,
    splits: tuple[str, ...],
    teacher: AnyTeacher | None = None,
) -> Loader:
    """Return this rank's loader of those splits. It also reads the cached outputs of ``teacher`` ahead of use."""
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


def training_splits(config: Config, manifest: Manifest) -> tuple[str, ...]:
    """Return ``train`` and, if there are validation images, ``val``."""
    return ("train", "val") if "val" in manifest.splits or config.holdout else ("train",)
