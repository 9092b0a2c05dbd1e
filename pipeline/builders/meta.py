"""Facts about the networks of a recipe, found on torch's meta device, without weights or data.

They are parameters, multiply-accumulates of one image, and the shapes of taps. Classes and samples are those of the
shards, or ``data.classes`` and ``data.samples`` if there are no shards. A network that needs the values of tensors,
such as one that calls ``.item()``, is built and run on the CPU instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.batch import PSEUDO, Batch, Outputs, Progress, join_peers
from pipeline.builders.extractors import BUILT_CLASSES, extractor_specs
from pipeline.builders.inheriting import inherited_names
from pipeline.builders.model_spec import ModelSpec
from pipeline.builders.peers import trained_specs
from pipeline.builders.student import student_spec
from pipeline.builders.teacher import check_head, teacher_specs
from pipeline.config.recipe import Recipe
from pipeline.data.config import Config as DataConfig
from pipeline.data.holdout import used_rows
from pipeline.data.mixer import unmixed_targets
from pipeline.data.unlabelled import append_unlabelled
from pipeline.distiller import Distiller
from pipeline.distributed import collectives
from pipeline.distributed.sync_batchnorm import check_batchnorms
from pipeline.errors import RecipeError, error_context, one_line
from pipeline.features.cohort import Cohort
from pipeline.features.taps import FeatureTaps, NormParameters
from pipeline.image_size import Resolution, height_width
from pipeline.losses._base import Facts
from pipeline.losses._peers import facts_of_peers
from pipeline.precision import AUTOCAST
from pipeline.tasks._registry import find_task
from pipeline.teachers.cache import Cache
from pipeline.teachers.cached import CachedTeacher
from pipeline.teachers.config import Config
from pipeline.training.flops import FlopCounter
from shards.manifest import MANIFEST, Manifest
from shards.read import SplitReader


class NetworkSummary(NamedTuple):
    """The size of a network and the shapes of its outputs."""

    name: str
    parameters: int
    """Number of parameters."""
    macs: float
    """Multiply-accumulates of the forward of one image."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of each tap that the losses read, and of the logits, without the batch."""


ProbedNetwork = tuple[NetworkSummary, FeatureTaps]


class ProbedModels(NamedTuple):
    """The networks of a recipe, and the facts that its losses are built from."""

    student: ProbedNetwork
    peers: list[ProbedNetwork]
    """The networks that train together, of which the student is one; empty for one alone."""
    teachers: list[ProbedNetwork]
    facts: Facts
    note: str
    """One line on assumed facts, empty if there are none."""


def probe_models(
    recipe: Recipe,
    sources: Sequence[Recipe],
    measure: Callable[[ModelSpec, int, Resolution], ProbedNetwork],
    manifest: Manifest | None = None,
) -> ProbedModels:
    """Return the recipe's networks, each built by ``measure``, and the facts that the losses are built from.

    ``sources`` are the recipes of ``teacher.runs``; ``manifest`` is that of the shards, if it was read already.
    """
    num_classes, labels_by_id, note = training_labels(recipe.data, manifest)
    student, peers = _probe_students(recipe, num_classes, measure)
    specs = teacher_specs(recipe, sources)
    teachers = [measure(spec, num_classes, recipe.data.size) for spec in specs]
    for each, (summary, network) in zip(specs, teachers, strict=True):
        each.check_task(network, recipe.task)
        each.check_logits(summary.shapes, recipe.task, recipe.data.target_size)
    if recipe.student.inherit:
        with error_context("student.inherit"):
            inherited_names(student[1].model, teachers[0][1].model, recipe.student.inherit)
    shapes, norms = _teacher_facts(recipe.teacher, recipe, teachers)
    facts = Facts(
        num_classes=num_classes,
        student_shapes=student[0].shapes,
        teacher_shapes=shapes,
        id_count=len(labels_by_id),
        labels_by_id=labels_by_id,
        teacher_norms=norms,
        student_head=student[1].linear_head(),
        teacher_head_KD=_teacher_head(recipe.teacher, teachers),
        autocast=AUTOCAST[recipe.precision],
        unlabelled_ratio=recipe.data.unlabelled_ratio,
        extractors=_probe_extractors(recipe, measure),
    )
    return ProbedModels(student, peers, teachers, _with_peers(facts, recipe, peers, teachers), note)


def _probe_extractors(
    recipe: Recipe, measure: Callable[[ModelSpec, int, Resolution], ProbedNetwork]
) -> dict[str, FeatureTaps]:
    """Return the frozen networks whose features losses compare images by, without weights, by the name of the loss."""
    found = extractor_specs(recipe)
    return {name: measure(spec, BUILT_CLASSES, recipe.data.target_size)[1] for name, (spec, _) in found.items()}


def _with_peers(facts: Facts, recipe: Recipe, peers: list[ProbedNetwork], teachers: list[ProbedNetwork]) -> Facts:
    """Return the facts with those of each peer, if there are several."""
    if not peers:
        return facts
    average = recipe.teacher is not None and recipe.teacher.average is not None
    shapes = [network.shapes for network, _ in teachers] if average else [facts.teacher_shapes] * len(peers)
    of_peers = [
        replace(facts, student_shapes=network.shapes, teacher_shapes=of_teacher, student_head=taps.linear_head())
        for (network, taps), of_teacher in zip(peers, shapes, strict=True)
    ]
    return facts_of_peers(of_peers, recipe.student.export)


def _probe_students(
    recipe: Recipe, num_classes: int, measure: Callable[[ModelSpec, int, Resolution], ProbedNetwork]
) -> tuple[ProbedNetwork, list[ProbedNetwork]]:
    """Return the student, and the networks that train together, of which it is one; an empty list for one alone."""
    config, taps = recipe.student, recipe.taps.student
    # BatchNorm over all ranks counts as BatchNorm; torch's works on GPUs only.
    specs = [spec._replace(synced=False) for spec in trained_specs(config, taps)]
    networks = [measure(spec, num_classes, recipe.data.size) for spec in specs]
    student = networks[config.export if config.peers else 0]
    specs[0].check_task(student[1], recipe.task)
    specs[0].check_logits(student[0].shapes, recipe.task, recipe.data.target_size)
    if config.sync_batchnorm:
        with error_context("student.sync_batchnorm"):
            check_batchnorms(student[1].model)
    if (validation_size := recipe.data.for_validation.size) != recipe.data.size:
        for spec in specs:
            measure(spec, num_classes, validation_size)  # raises RecipeError if it cannot take such images
    return student, networks if config.peers else []


def _teacher_facts(
    config: Config | None, recipe: Recipe, measured: list[ProbedNetwork]
) -> tuple[dict[str, tuple[int, ...]], dict[str, NormParameters]]:
    """Return the shapes of the teacher's outputs, and the parameters of the BatchNorms before its taps.

    Of the averages of several peers they are those of the exported one.

    The header of a cache contains both, so that a recipe with only a cache needs no network.
    """
    if config is None:
        return {}, {}
    if config.cache is not None and not config.has_model:
        with error_context("teacher.cache"):
            cache = Cache(Path(config.cache))
            check_head(recipe, cache)
            teacher = CachedTeacher(cache, cache.kinds(recipe.taps.teacher), views=0, device=torch.device("cpu"))
        return teacher.shapes(recipe.data.size), teacher.norms
    network, taps = measured[recipe.student.export if len(measured) > 1 and config.average else 0]
    return network.shapes, {} if config.moves else _initial_norms(taps.norms())


def _teacher_head(config: Config | None, measured: list[ProbedNetwork]) -> Tensor | None:
    """Return the weights of the teacher's last layer, if it is linear and training will know it."""
    if config is None or not config.has_one_head or not measured:
        return None
    head = measured[0][1].linear_head()
    return head and head.weight.detach()


class FakeModel(nn.Module):
    """A stand-in for a network that returns random tensors of its shapes, which is all that the losses need here."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes = shapes

    def forward(self, images_BCHW: Tensor, targets: Mapping[str, Tensor] | None = None) -> Outputs:
        """Return features and logits with the shapes of the network's."""
        rows, device = len(images_BCHW), images_BCHW.device
        found = {name: torch.rand(rows, *shape, device=device) for name, shape in self.shapes.items()}
        return Outputs(found["logits"], found)  # a map of logits may be a tap, too


class FakePeers(nn.Module):
    """A stand-in for several networks that train together."""

    def __init__(self, peers: Sequence[FakeModel], exported: int) -> None:
        super().__init__()
        self.peers = nn.ModuleList(peers)
        self.exported = exported

    def forward(self, images_BCHW: Tensor, targets: Mapping[str, Tensor] | None = None) -> Outputs:
        """Return the outputs of the exported one, with those of all."""
        return join_peers([peer(images_BCHW) for peer in self.peers], self.exported)


def fake_networks(recipe: Recipe, facts: Facts) -> tuple[nn.Module, nn.Module | None]:
    """Return stand-ins for what the recipe trains and for its teacher, None without one."""
    average = recipe.teacher is not None and recipe.teacher.average is not None
    student, teacher = FakeModel(facts.student_shapes), FakeModel(facts.teacher_shapes)
    if facts.peers:
        students, teachers = (
            [FakeModel(shapes) for shapes in of_each]
            for of_each in zip(*((peer.student_shapes, peer.teacher_shapes) for peer in facts.peers), strict=True)
        )
        student = FakePeers(students, recipe.student.export)
        teacher = FakePeers(teachers, recipe.student.export) if average else teacher
    return student, teacher if facts.teacher_shapes else None


def training_labels(config: DataConfig, manifest: Manifest | None = None) -> tuple[int, np.ndarray, str]:
    """Return the number of classes, the label of every training id, and a note if they are assumed.

    They come from the shards, or from ``data.classes`` and ``data.samples`` if there are no shards. Raises RecipeError
    if ``data.classes`` is needed and not set.
    """
    folder = Path(config.path)
    if manifest or (folder / MANIFEST).is_file():
        reader = SplitReader(folder, "train", manifest)
        rows = used_rows(reader, config.holdout, "train")
        return reader.manifest.num_classes, reader.labels_by_id(rows), ""
    classes, samples = config.classes, config.samples
    if classes is None:
        raise RecipeError(f"data.classes: {folder} contains no shards; set data.classes to their number of classes")
    counted = f"the {samples} samples of data.samples" if samples else f"{2 * classes} assumed samples"
    note = f"no shards at {folder}: the memory of losses per sample is counted for {counted}"
    return classes, np.arange(samples or 2 * classes) % classes, note


@cache  # recipes of one table often have the same networks
def probe(spec: ModelSpec, num_classes: int, image_size: Resolution) -> ProbedNetwork:
    """Return the summary of a network, and the network, on the meta device if it can run there."""
    try:
        with torch.device("meta"):
            return run_probe(spec, num_classes, image_size)
    # A network may need the values of tensors, which the meta device does not have. Any other error comes again here.
    except Exception:
        return run_probe(spec, num_classes, image_size)


def run_probe(spec: ModelSpec, num_classes: int, image_size: Resolution) -> ProbedNetwork:
    """Return the summary of a network, and the network, on torch's default device."""
    taps = spec.build(num_classes)
    spec.select_stages(taps, image_size)
    with FlopCounter() as counted:
        shapes = spec.probe(taps, image_size)
    return NetworkSummary(spec.model, count_parameters(taps), counted.flops / 2, shapes), taps


def _initial_norms(norms: dict[str, NormParameters]) -> dict[str, NormParameters]:
    """Return BatchNorm parameters of the same shapes with their initial values, on the CPU."""
    # Losses compute with these values when they are built, and tensors on the meta device have none.
    with torch.device("cpu"):
        return {k: NormParameters(torch.ones(n.weight_C.shape), torch.zeros(n.bias_C.shape)) for k, n in norms.items()}


def trial_targets(recipe: Recipe, labels_B: Tensor, num_classes: int) -> dict[str, Tensor]:
    """Return targets of images with those labels, for a trial of the losses: the task's, and those of mixed images."""
    blank = find_task(recipe.task).blank_targets(len(labels_B), num_classes, recipe.data.target_size)
    return blank | unmixed_targets(recipe.data, labels_B, num_classes)


def with_unlabelled(recipe: Recipe, batch: Batch, num_classes: int) -> Batch:
    """Return a trial's batch with images without labels behind the others, as many as the recipe has for each."""
    ratio = recipe.data.unlabelled_ratio
    if ratio == 0:
        return batch
    images_BCHW, labels_B, ids_B = (torch.cat([x] * ratio) for x in batch[:3])
    pseudo = {PSEUDO: torch.zeros(len(labels_B), num_classes, device=images_BCHW.device)}
    return append_unlabelled(batch, Batch(images_BCHW, labels_B, ids_B, pseudo))


def count_parameters(module: nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def image_flops(recipe: Recipe, sources: Sequence[Recipe] = (), manifest: Manifest | None = None) -> float | None:
    """Return the operations (``flops.py``) for one image of a training batch, or None if they cannot be counted.

    Counted are the forward and backward of student and losses, and the forward of teachers that run during training.
    Gradients that autograd does not compute, such as those of the images, are not counted. Neither are the optimizer,
    work that several ranks repeat, and what gradient checkpointing computes again. A single rank may call this, after
    all modules for training are built. A module might otherwise create tensors that it shares among networks on the
    meta device. The result is None for a network that needs the values of tensors, such as one that calls ``.item()``.
    """
    try:
        with torch.device("meta"), collectives.single_process():
            parts = probe_models(recipe, sources, run_probe, manifest)
            return _student_flops(recipe, parts) + _teacher_flops(recipe, parts)
    except Exception as error:
        reason = one_line(error, 200)
        print(f"note: the journal will have no TFLOP/s: the operations of this recipe cannot be counted ({reason})")
        return None


def student_macs(recipe: Recipe, manifest: Manifest) -> float | None:
    """Return the multiply-accumulates of the student's forward for one image, or None if they cannot be counted.

    A single rank may call this, as ``image_flops``.
    """
    try:
        with torch.device("meta"), collectives.single_process():
            network, _ = run_probe(
                student_spec(recipe.student, recipe.taps.student), manifest.num_classes, recipe.data.size
            )
            return network.macs
    except Exception:  # ``image_flops`` says why
        return None


def _student_flops(recipe: Recipe, parts: ProbedModels) -> float:
    """Return the operations of the forward and backward of a micro-batch, per image."""
    rows, size = recipe.batch // recipe.accumulation, height_width(recipe.data.size)
    zeros_B = torch.zeros(rows, dtype=torch.int64)
    task = find_task(recipe.task)
    targets = trial_targets(recipe, zeros_B, parts.facts.num_classes)
    batch = Batch(torch.empty(rows, 3, *size), zeros_B, zeros_B, {}, targets)
    batch = with_unlabelled(recipe, batch, parts.facts.num_classes)
    _, fake = fake_networks(recipe, parts.facts)
    trained = Cohort([taps for _, taps in parts.peers], recipe.student.export) if parts.peers else parts.student[1]
    distiller = Distiller(trained, recipe.losses, parts.facts, task).to("meta")
    teacher = fake and fake(batch.images_BCHW)
    with FlopCounter() as counted:
        distiller(batch, teacher, Progress(steps_per_epoch=1))["total"].backward()
    return counted.flops / len(batch.labels_B)


def _teacher_flops(recipe: Recipe, parts: ProbedModels) -> float:
    """Return the operations of the teacher networks that run during training, per image."""
    config = recipe.teacher
    if config is None or not (config.uses_live_model and recipe.runs_teacher):
        return 0.0
    if config.cache is not None and not Cache(Path(config.cache)).missing(recipe.taps.teacher):
        return 0.0
    return sum(2 * network.macs for network, _ in parts.teachers)
