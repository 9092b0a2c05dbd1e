"""What a recipe is made of, found without training, weights or data: all is built on torch's meta device.

Parameters, multiply-accumulates of one image, taps with their shapes and the parts of the losses. Where the shards are
there, their classes and samples count; else ``data.classes`` and ``data.samples``. What computes with numbers, such as
a user's network that calls ``.item()``, is built and run on the CPU instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs, Progress
from pipeline.builders.model_spec import ModelSpec
from pipeline.builders.student import student_spec
from pipeline.builders.teacher import teacher_specs
from pipeline.config.recipe import Recipe
from pipeline.data.config import Config as DataConfig
from pipeline.distiller import Distiller
from pipeline.distributed import collectives
from pipeline.errors import RecipeError, error_context, one_line
from pipeline.features.taps import FeatureTaps, NormParameters
from pipeline.losses._base import Facts
from pipeline.precision import AUTOCAST
from pipeline.teachers.cache import Cache
from pipeline.teachers.cached import CachedTeacher
from pipeline.teachers.config import Config
from pipeline.training.flops import FlopCounter
from shards.manifest import MANIFEST, Manifest
from shards.read import SplitReader


class NetworkSummary(NamedTuple):
    """What a network is made of."""

    name: str
    parameters: int
    macs: float
    """Multiply-accumulates of one image forward."""
    shapes: dict[str, tuple[int, ...]]
    """Of each tap that the losses read, and of the logits, without the batch."""


ProbedNetwork = tuple[NetworkSummary, FeatureTaps]


class ProbedModels(NamedTuple):
    """The networks of a recipe, and what they and the shards tell its losses."""

    student: ProbedNetwork
    teachers: list[ProbedNetwork]
    facts: Facts
    note: str
    """What was not there to be told."""


def probe_models(
    recipe: Recipe,
    sources: Sequence[Recipe],
    measure: Callable[[ModelSpec, int, int], ProbedNetwork],
    manifest: Manifest | None = None,
) -> ProbedModels:
    """Return the recipe's networks, each as ``measure`` builds it, and what they tell the losses.

    ``sources`` are the recipes of ``teacher.recipes``; ``manifest`` is the shards', where it was read already.
    """
    num_classes, labels_by_id, note = training_labels(recipe.data, manifest)
    student = measure(student_spec(recipe.student, recipe.taps.student), num_classes, recipe.data.size)
    named = teacher_specs(recipe, sources)
    teachers = [measure(network, num_classes, recipe.data.size) for network in named]
    shapes, norms = _cached_shapes(recipe.teacher, recipe, teachers)
    facts = Facts(
        num_classes=num_classes,
        student_shapes=student[0].shapes,
        teacher_shapes=shapes,
        id_count=len(labels_by_id),
        labels_by_id=labels_by_id,
        teacher_norms=norms,
        autocast=AUTOCAST[recipe.precision],
    )
    return ProbedModels(student, teachers, facts, note)


def _cached_shapes(
    config: Config | None, recipe: Recipe, measured: list[ProbedNetwork]
) -> tuple[dict[str, tuple[int, ...]], dict[str, NormParameters]]:
    """Return the shapes of the teacher's answers, and the BatchNorms before its taps."""
    if config is None:
        return {}, {}
    if config.cache is not None and not config.has_model:
        with error_context("teacher.cache"):
            cache = Cache(Path(config.cache))
            teacher = CachedTeacher(cache, cache.kinds(recipe.taps.teacher), views=0, device=torch.device("cpu"))
        return teacher.shapes(recipe.data.size), teacher.norms
    network, taps = measured[0]
    return network.shapes, {} if config.average else _plain(taps.norms())


class FakeModel(nn.Module):
    """Stands for a network and answers tensors of its shapes: the losses need no more of it here."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes = shapes

    def forward(self, images_BCHW: Tensor) -> Outputs:
        """Return features and logits as the network would."""
        rows, device = len(images_BCHW), images_BCHW.device
        found = {name: torch.rand(rows, *shape, device=device) for name, shape in self.shapes.items()}
        return Outputs(found.pop("logits"), found)


def training_labels(config: DataConfig, manifest: Manifest | None = None) -> tuple[int, np.ndarray, str]:
    """Return the number of classes, the label of every training id, and what of this was made up."""
    folder = Path(config.path)
    if manifest or (folder / MANIFEST).is_file():
        reader = SplitReader(folder, "train", manifest)
        return reader.manifest.num_classes, reader.labels_by_id(), ""
    classes, samples = config.classes, config.samples
    if classes is None:
        raise RecipeError(f"data.classes: {folder} holds no shards, and how many classes they have is not said")
    counted = f"the {samples} that data.samples says" if samples else f"{2 * classes} made-up ones"
    note = f"no shards at {folder}: what is kept of every sample is counted for {counted}"
    return classes, np.arange(samples or 2 * classes) % classes, note


@cache  # the rows of a table share their networks
def probe(named: ModelSpec, num_classes: int, image_size: int) -> ProbedNetwork:
    """Return what the network is made of, and the network."""
    try:
        with torch.device("meta"):
            return run_probe(named, num_classes, image_size)
    except Exception:  # it computes with numbers, which the meta device has none of; or what is wrong is so here, too
        return run_probe(named, num_classes, image_size)


def run_probe(named: ModelSpec, num_classes: int, image_size: int) -> ProbedNetwork:
    """Return what the network is made of, and the network, which is on torch's default device."""
    taps = named.build(num_classes)
    with FlopCounter() as counted:
        shapes = named.probe(taps, image_size)
    return NetworkSummary(named.model, count_parameters(taps), counted.flops / 2, shapes), taps


def _plain(norms: dict[str, NormParameters]) -> dict[str, NormParameters]:
    """Return a BatchNorm's first scales and shifts: losses compute with them, and on the meta device are no numbers."""
    with torch.device("cpu"):
        return {k: NormParameters(torch.ones(n.weight_C.shape), torch.zeros(n.bias_C.shape)) for k, n in norms.items()}


def count_parameters(module: nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def image_flops(recipe: Recipe, sources: Sequence[Recipe] = (), manifest: Manifest | None = None) -> float | None:
    """Return the operations (``flops.py``) that one image of a batch takes, or None where they cannot be counted.

    Student and losses forward and backward, as autograd goes: where nothing asks for a gradient, as at the images, none
    is counted. The teachers forward, if they are asked. No optimizer, and nothing that ranks do twice or that backward
    computes again to save memory. One rank may ask, once all is built for training: what
    a module keeps for all networks is then not kept on the meta device. What computes with numbers, such as a network
    that calls ``.item()``, finds none there, and is None.
    """
    try:
        with torch.device("meta"), collectives.single_process():
            parts = probe_models(recipe, sources, run_probe, manifest)
            return _student_flops(recipe, parts) + _teacher_flops(recipe, parts)
    except Exception as error:
        reason = one_line(error, 200)
        print(f"note: the journal will not say TFLOP/s: what this recipe computes cannot be counted ({reason})")
        return None


def _student_flops(recipe: Recipe, parts: ProbedModels) -> float:
    """Return the operations of a micro-batch's forward and backward, by image."""
    rows, size = recipe.batch // recipe.accumulation, recipe.data.size
    zeros_B = torch.zeros(rows, dtype=torch.int64)
    batch = Batch(torch.empty(rows, 3, size, size), zeros_B, zeros_B, {})
    teacher = FakeModel(parts.facts.teacher_shapes)(batch.images_BCHW) if parts.facts.teacher_shapes else None
    distiller = Distiller(parts.student[1], recipe.losses, parts.facts).to("meta")
    with FlopCounter() as counted:
        distiller(batch, teacher, Progress(steps_per_epoch=1))["total"].backward()
    return counted.flops / rows


def _teacher_flops(recipe: Recipe, parts: ProbedModels) -> float:
    """Return the operations of the networks that are asked, by image."""
    config = recipe.teacher
    if config is None or not config.uses_live_model:
        return 0.0
    if config.cache is not None and not Cache(Path(config.cache)).missing(recipe.taps.teacher):
        return 0.0
    return sum(2 * network.macs for network, _ in parts.teachers)
