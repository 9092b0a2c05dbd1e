"""From a recipe to what it names: loader, teacher, student, Distiller. Each function builds one thing."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pipeline.config.recipe import Recipe
from pipeline.data.loader import Loader, create_loader
from pipeline.distiller import Distiller
from pipeline.distributed import collectives
from pipeline.distributed.rendezvous import deepspeed_asked
from pipeline.errors import RecipeError, about
from pipeline.features.taps import FeatureTaps, tap_shapes
from pipeline.losses._base import Facts
from pipeline.models import create_model
from pipeline.models.stages import stages
from pipeline.models.weights import load_weights
from pipeline.runs.files import STUDENT
from pipeline.runs.identity import Run, find_run, load_dependency
from pipeline.teachers.cached import AnyTeacher, CachedTeacher
from shards.manifest import Manifest

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_loader(
    recipe: Recipe, device: torch.device, splits: tuple[str, ...], teacher: AnyTeacher | None = None
) -> Loader:
    """Return this rank's loader of those splits, which reads ahead what a cached teacher answers with."""
    return create_loader(
        recipe.data,
        batch=recipe.batch,
        accumulation=recipe.accumulation,
        seed=recipe.seed,
        rank=collectives.rank(),
        world=collectives.world_size(),
        device=device,
        columns=teacher.columns if isinstance(teacher, CachedTeacher) else None,
        splits=splits,
    )


def training_splits(manifest: Manifest) -> tuple[str, ...]:
    """Return ``train`` and, where the shards have it, ``val``."""
    return ("train", "val") if "val" in manifest.splits else ("train",)


class Named(NamedTuple):
    """A network as a recipe names it."""

    place: str
    """The key where it does."""
    model: str
    stages: frozenset[tuple[str, str]]
    """What the recipe says of its stages."""
    taps: frozenset[str]
    """Those that the losses read."""

    def build(self, num_classes: int) -> FeatureTaps:
        """Return the network, freshly initialised."""
        with about(f"{self.place}.model"):
            model = create_model(self.model, num_classes)
        with about(f"{self.place}.stages"):
            return FeatureTaps(model, stages(model) | dict(self.stages), self.taps)

    def probe(self, network: FeatureTaps, image_size: int) -> dict[str, tuple[int, ...]]:
        """Return ``tap_shapes`` of the network on images of that size."""
        with about(f"{self.place}.model"):
            return tap_shapes(network, image_size)


def student_named(recipe: Recipe) -> Named:
    """Return the student as the recipe names it."""
    config = recipe.student
    return Named("student", config.model, frozenset((config.stages or {}).items()), recipe.taps.student)


def build_student(recipe: Recipe, num_classes: int) -> FeatureTaps:
    """Return the student as the recipe's seed initialises it, with the taps its losses read."""
    torch.manual_seed(recipe.seed)
    # The weights' layout is the images', or every gradient would be copied into DDP's buckets in another.
    return student_named(recipe).build(num_classes).to(memory_format=layout(recipe))  # type: ignore[call-overload]


def layout(recipe: Recipe) -> torch.memory_format:
    """Return the memory format of the weights: the images', except under ZeRO, which lays them out in rows."""
    return torch.channels_last if recipe.data.channels_last and not deepspeed_asked() else torch.contiguous_format


def load_start(recipe: Recipe, student: FeatureTaps) -> None:
    """Load the weights that ``student.start`` names, if it does."""
    start = recipe.student.start
    if start is not None:
        weights = start.weights or str(finished(recipe, start.recipe).folder / STUDENT)
        with about("student.start"):
            load_weights(student.model, weights, recipe.student.model)


def finished(recipe: Recipe, path: str | None) -> Run:
    """Return the finished run of another recipe that ``recipe`` stands on."""
    assert path is not None
    run = find_run(load_dependency(recipe, path))
    if run.result is None:
        raise RecipeError(f"{run.folder} holds no finished run of {path}; make it: {run.command}")
    return run


def build_distiller(recipe: Recipe, loader: Loader, teacher: AnyTeacher | None, device: torch.device) -> Distiller:
    """Return the student with the recipe's losses, on the device."""
    student = build_student(recipe, loader.num_classes)
    load_start(recipe, student)
    facts = Facts(
        num_classes=loader.num_classes,
        student_shapes=student_named(recipe).probe(student, recipe.data.size),
        teacher_shapes=teacher.shapes(recipe.data.size) if teacher else {},
        id_count=loader.id_count,
        labels_by_id=loader.labels_by_id,
        teacher_norms=teacher.norms if teacher else {},
        autocast=AUTOCAST[recipe.precision],
    )
    distiller = Distiller(student, recipe.losses, facts).to(device)
    if recipe.student.compile:
        student.compile(dynamic=False)  # in place: no key of the state dict changes, as a wrapper's would
    return distiller.to(memory_format=layout(recipe))  # type: ignore[call-overload]
