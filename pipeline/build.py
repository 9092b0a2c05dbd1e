"""From a recipe to what it names: loader, teacher, student, Distiller. Each function builds one thing."""

from __future__ import annotations

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
from pipeline.teacher import AnyTeacher, EMATeacher, Network, Normalization, Teacher, TeacherEnsemble
from shards.manifest import Manifest

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_loader(recipe: Recipe, device: torch.device, splits: tuple[str, ...]) -> Loader:
    """Return this rank's loader of those splits. Raises RecipeError where they have other classes than expected."""
    loader = create_loader(
        recipe.data,
        batch=recipe.batch,
        accumulation=recipe.accumulation,
        seed=recipe.seed,
        rank=parallel.rank(),
        world=parallel.world_size(),
        device=device,
        splits=splits,
    )
    expected = recipe.data.classes or loader.num_classes
    if loader.num_classes != expected:
        raise RecipeError(f"data.classes: {recipe.data.path} has {loader.num_classes} classes, expected {expected}")
    return loader


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


def build_teacher(recipe: Recipe, manifest: Manifest, device: torch.device) -> AnyTeacher | None:
    """Return the teacher, or None for a recipe without one.

    Raises RecipeError where its weights do not fit the network or the shards' classes.
    """
    config = recipe.teacher
    if config is None:
        return None
    if config.average is not None:
        _, taps = teacher_network(recipe, manifest.num_classes)
        auto = "fp32" if recipe.precision == "fp32" else "bf16"
        autocast = AUTOCAST[auto if config.dtype == "auto" else config.dtype]
        return EMATeacher(taps, config.average, batch=config.batch or 1, device=device, autocast=autocast)
    if config.members is None:
        return _frozen(recipe, config, recipe.taps.teacher, manifest, device, "teacher")
    assert config.combine is not None
    assert config.temperature is not None
    members = []
    for index, member in enumerate(config.members):
        wanted = recipe.taps.teacher if index == 0 else frozenset[str]()
        members.append(_frozen(recipe, member, wanted, manifest, device, f"teacher.members.{index}"))
    return TeacherEnsemble(members, combine=config.combine, temperature=config.temperature)


def teacher_network(recipe: Recipe, num_classes: int) -> tuple[str, FeatureTaps]:
    """Return the name of the teacher's network and the network, without its weights, with the taps the losses read.

    Of several members it is the first one's, of a moving average the student's.
    """
    config = recipe.teacher
    assert config is not None
    network = config.members[0] if config.members else config
    return _tapped(recipe, network, recipe.taps.teacher, num_classes, "teacher")


def _tapped(
    recipe: Recipe, network: Network, wanted: frozenset[str], num_classes: int, place: str
) -> tuple[str, FeatureTaps]:
    """Return the name of a teacher's network and the network, without its weights, with those taps."""
    named = network
    if network.recipe is not None:
        named = load_dependency(recipe, network.recipe).recipe.student
    elif network.model is None:
        named = recipe.student
    assert named.model is not None
    with about(f"{place}.model"):
        model = create_model(named.model, num_classes)
    with about(f"{place}.stages"):
        return named.model, FeatureTaps(model, stages(model) | (network.stages or named.stages or {}), wanted)


def _frozen(
    recipe: Recipe, network: Network, wanted: frozenset[str], manifest: Manifest, device: torch.device, place: str
) -> Teacher:
    """Return a network with its weights, frozen; ``place`` is the recipe's key that names it."""
    assert recipe.teacher is not None
    weights, normalization = _source(recipe, network)
    name, taps = _tapped(recipe, network, wanted, manifest.num_classes, place)
    with about(f"{place}.weights"):
        load_weights(taps.model, weights, name)
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
    size = recipe.data.size
    facts = Facts(
        num_classes=loader.num_classes,
        student_shapes=tap_shapes(student, size),
        teacher_shapes=tap_shapes(teacher.taps, size) if teacher else {},
        id_count=loader.id_count,
        labels_by_id=loader.labels_by_id,
        teacher_norms=teacher.norms if teacher else {},
        autocast=AUTOCAST[recipe.precision],
    )
    distiller = Distiller(student, recipe.losses, facts).to(device)
    return distiller.to(memory_format=layout(recipe))  # type: ignore[call-overload]
