"""From a recipe to what it names: loader, teacher, student, Distiller. Each function builds one thing."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pipeline import parallel, zero
from pipeline.composition import RecipeError, about
from pipeline.data.loader import Loader, create_loader
from pipeline.distiller import Distiller
from pipeline.losses._base import Facts
from pipeline.models import create_model
from pipeline.models.stages import stages
from pipeline.models.weights import load_weights
from pipeline.recipe import Recipe
from pipeline.runs import STUDENT, Run, find_run, load_dependency
from pipeline.taps import FeatureTaps, tap_shapes
from pipeline.teacher import AnyTeacher, EMATeacher, Network, Normalization, Teacher, TeacherEnsemble
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
    return torch.channels_last if recipe.data.channels_last and not zero.asked() else torch.contiguous_format


def load_start(recipe: Recipe, student: FeatureTaps) -> None:
    """Load the weights that ``student.start`` names, if it does."""
    start = recipe.student.start
    if start is not None:
        weights = start.weights or str(_finished(recipe, start.recipe).folder / STUDENT)
        with about("student.start"):
            load_weights(student.model, weights, recipe.student.model)


def build_teacher(recipe: Recipe, manifest: Manifest, device: torch.device) -> AnyTeacher | None:
    """Return the teacher, or None for a recipe without one.

    Raises RecipeError where its weights do not fit the network or the shards' classes.
    """
    config = recipe.teacher
    if config is None:
        return None
    if config.average is not None:
        taps = teacher_named(recipe, "teacher").build(manifest.num_classes)
        auto = "fp32" if recipe.precision == "fp32" else "bf16"
        autocast = AUTOCAST[auto if config.dtype == "auto" else config.dtype]
        return EMATeacher(taps, config.average, batch=config.batch or 1, device=device, autocast=autocast)
    teachers = [_frozen(recipe, place, manifest, device) for place in teacher_places(recipe)]
    if config.members is None:
        return teachers[0]
    assert config.combine is not None
    assert config.temperature is not None
    return TeacherEnsemble(teachers, combine=config.combine, temperature=config.temperature)


def teacher_places(recipe: Recipe) -> dict[str, Network]:
    """Return what the recipe says of each of the teacher's networks, by the key where it says it."""
    config = recipe.teacher
    if config is None or config.members is None:
        return {"teacher": config} if config else {}
    return {f"teacher.members.{index}": member for index, member in enumerate(config.members)}


def teacher_named(recipe: Recipe, place: str) -> Named:
    """Return one of the teacher's networks as the recipe, or the one that it stands on, names it.

    The first of ``teacher_places`` has the taps that the losses read. A moving average is the student's network.
    """
    places = teacher_places(recipe)
    network = source = places[place]
    if network.recipe is not None:
        source = load_dependency(recipe, network.recipe).recipe.student
    elif network.model is None:
        source = recipe.student
    assert source.model is not None
    own = network.stages or source.stages or {}
    wanted = recipe.taps.teacher if place == next(iter(places)) else frozenset[str]()
    return Named(place, source.model, frozenset(own.items()), wanted)


def _frozen(recipe: Recipe, place: str, manifest: Manifest, device: torch.device) -> Teacher:
    """Return the network of ``teacher_places`` with its weights, frozen."""
    assert recipe.teacher is not None
    network = teacher_places(recipe)[place]
    weights, normalization = _source(recipe, network)
    named = teacher_named(recipe, place)
    taps = named.build(manifest.num_classes)
    named.probe(taps, recipe.data.size)  # folding would run it on the same images, and not say what it cannot take
    with about(f"{place}.weights"):
        load_weights(taps.model, weights, named.model)
    return Teacher(
        taps,
        batch=recipe.teacher.batch or 1,
        image_size=recipe.data.size,
        dtype=network.torch_dtype(device),
        device=device,
        given=Normalization(recipe.data.mean, recipe.data.std),
        expected=Normalization(network.mean or normalization.mean, network.std or normalization.std),
        fold=network.fold,
    )


def _source(recipe: Recipe, network: Network) -> tuple[str, Normalization]:
    """Return a network's weights, and what its images were normalised with."""
    if network.recipe is None:
        assert network.weights is not None
        return network.weights, Normalization(recipe.data.mean, recipe.data.std)
    run = _finished(recipe, network.recipe)
    data = run.recipe.data
    return network.weights or str(run.folder / STUDENT), Normalization(data.mean, data.std)


def _finished(recipe: Recipe, path: str | None) -> Run:
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
        teacher_shapes=tap_shapes(teacher.taps, recipe.data.size) if teacher else {},
        id_count=loader.id_count,
        labels_by_id=loader.labels_by_id,
        teacher_norms=teacher.norms if teacher else {},
        autocast=AUTOCAST[recipe.precision],
    )
    distiller = Distiller(student, recipe.losses, facts).to(device)
    return distiller.to(memory_format=layout(recipe))  # type: ignore[call-overload]
