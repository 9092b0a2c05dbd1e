"""From a recipe to what it names: loader, teacher, student, Distiller. Each function builds one thing."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pipeline.config.recipe import Recipe, Start, Student
from pipeline.data.loader import Loader, create_loader
from pipeline.distiller import Distiller
from pipeline.distributed import collectives
from pipeline.distributed.launcher import Launch
from pipeline.errors import RecipeError, about, shown
from pipeline.features.taps import FeatureTaps, tap_shapes
from pipeline.losses._base import Facts
from pipeline.models import create_model
from pipeline.models.stages import stages
from pipeline.models.weights import load_weights
from pipeline.runs.files import STUDENT
from pipeline.runs.identity import Run
from pipeline.teachers.cached import AnyTeacher, CachedTeacher
from shards.manifest import Manifest

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_loader(
    recipe: Recipe,
    manifest: Manifest,
    device: torch.device,
    splits: tuple[str, ...],
    teacher: AnyTeacher | None = None,
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
        manifest=manifest,
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


def student_named(config: Student, taps: frozenset[str]) -> Named:
    """Return the student as the recipe names it, with those taps."""
    return Named("student", config.model, frozenset((config.stages or {}).items()), taps)


def build_student(
    named: Named, num_classes: int, seed: int, layout: torch.memory_format = torch.contiguous_format
) -> FeatureTaps:
    """Return the student as the seed initialises it, its weights in that memory format."""
    torch.manual_seed(seed)
    return named.build(num_classes).to(memory_format=layout)  # type: ignore[call-overload]


def weights_layout(recipe: Recipe, launch: Launch) -> torch.memory_format:
    """Return the memory format of the weights: the images', except under ZeRO, which lays them out in rows.

    In another than the images' every gradient would be copied into DDP's buckets.
    """
    channels_last = recipe.data.channels_last and not launch.use_deepspeed
    return torch.channels_last if channels_last else torch.contiguous_format


def load_start(start: Start, run: Run | None, student: FeatureTaps, model: str) -> None:
    """Load the weights that the student starts from: a file, or the last ones of a finished ``run``."""
    weights = start.weights or str(finished(run).folder / STUDENT)
    with about("student.start"):
        load_weights(student.model, weights, model)


def finished(run: Run | None) -> Run:
    """Return the run. Raises RecipeError unless it is finished."""
    if run is None:
        raise RecipeError("a run that this one stands on is not known")
    if run.result is None:
        raise RecipeError(f"{run.folder} holds no finished run of {shown(run.path)}; make it: {run.command}")
    return run


def build_distiller(
    run: Run, loader: Loader, teacher: AnyTeacher | None, device: torch.device, layout: torch.memory_format
) -> Distiller:
    """Return the student with the recipe's losses, on the device, its weights in that memory format."""
    recipe, start = run.recipe, run.recipe.student.start
    named = student_named(recipe.student, recipe.taps.student)
    student = build_student(named, loader.num_classes, recipe.seed, layout)
    if start is not None:
        load_start(start, run.start, student, recipe.student.model)
    facts = Facts(
        num_classes=loader.num_classes,
        student_shapes=named.probe(student, recipe.data.size),
        teacher_shapes=teacher.shapes(recipe.data.size) if teacher else {},
        id_count=loader.id_count,
        labels_by_id=loader.labels_by_id,
        teacher_norms=teacher.norms if teacher else {},
        autocast=AUTOCAST[recipe.precision],
    )
    distiller = Distiller(student, recipe.losses, facts).to(device)
    if recipe.student.compile:
        student.compile(dynamic=False)  # in place: no key of the state dict changes, as a wrapper's would
    return distiller.to(memory_format=layout)  # type: ignore[call-overload]
