"""What a recipe is made of, found without training, weights or data: all is built on torch's meta device.

Parameters, multiply-accumulates of one image, taps with their shapes and the parts of the losses. Where the shards are
there, their classes and samples count; else ``data.classes`` and ``data.samples``. What computes with numbers, such as
a user's network that calls ``.item()``, is built and run on the CPU instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs, Progress
from pipeline.build import AUTOCAST, Named, student_named
from pipeline.build_teacher import teacher_named, teacher_places
from pipeline.composition import RecipeError, about, shown
from pipeline.distiller import Distiller
from pipeline.flops import FlopCounter
from pipeline.losses._base import Facts
from pipeline.recipe import LoadedRecipe, Recipe
from pipeline.taps import FeatureTaps, NormParameters
from pipeline.teacher_cache import Cache, CachedTeacher
from shards.manifest import MANIFEST
from shards.read import SplitReader

FEW = 32
"""Rows with which losses run on the CPU, where a batch's maps take memory."""


class Network(NamedTuple):
    """What a network is made of."""

    name: str
    parameters: int
    macs: float
    """Multiply-accumulates of one image forward."""
    shapes: dict[str, tuple[int, ...]]
    """Of each tap that the losses read, and of the logits, without the batch."""


Measured = tuple[Network, FeatureTaps]


class Built(NamedTuple):
    """The networks of a recipe, and what they and the shards tell its losses."""

    student: Measured
    teachers: list[Measured]
    facts: Facts
    note: str
    """What was not there to be told."""


class Report(NamedTuple):
    """What a recipe is made of."""

    path: Path
    student: Network
    teachers: list[Network]
    """None, one, or each member; taps are read of the first."""
    cache: str | None
    """Where the answers are that training takes instead of running them."""
    parts: list[str]
    """Of the losses, by the names they have in the journal."""
    auxiliary: dict[str, int]
    """Parameters that are trained with the student and left out at export, by loss."""
    auxiliary_macs: float
    """Of the losses forward, for one image of a whole batch; ``FEW`` images where they run on the CPU."""
    note: str = ""
    """What was not there to be counted."""

    @property
    def training_macs(self) -> float:
        """Of one image, about: a backward costs what two forwards do, and the teachers have none.

        Losses that compare with what is kept, as CRD with its banks, have less of a backward.
        """
        asked = 0.0 if self.cache else sum(teacher.macs for teacher in self.teachers)
        return 3 * (self.student.macs + self.auxiliary_macs) + asked

    def __str__(self) -> str:
        """Return the report as a user reads it."""
        lines = [shown(self.path), *_described("student", self.student)]
        lines += [line for teacher in self.teachers for line in _described("teacher", teacher)]
        lines += [f"          answers from {self.cache}"] if self.cache else []
        own = ", ".join(f"{name} {count:,}" for name, count in self.auxiliary.items() if count) or "no"
        lines += [f"losses    {', '.join(self.parts)}"]
        lines += [f"          {own} parameters of their own, {self.auxiliary_macs / 1e9:.3f} GMAC"]
        lines += [f"training  about {self.training_macs / 1e9:.3f} GMAC an image"]
        lines += [self.note] if self.note else []
        return "\n".join(lines)


def _described(role: str, network: Network) -> list[str]:
    taps = [f"          {name:<16} {' × '.join(map(str, shape))}" for name, shape in network.shapes.items()]
    return [f"{role}   {network.name}, {network.parameters:,} parameters, {network.macs / 1e9:.3f} GMAC", *taps]


def check(loaded: LoadedRecipe) -> Report:
    """Build the recipe, run it once forward, and return what it is made of.

    Raises RecipeError for what training would refuse of networks, taps and losses.
    """
    recipe = loaded.recipe
    built = build_parts(recipe, measure)
    losses = _tried(recipe, built.facts)
    cache = recipe.teacher.cache if recipe.teacher and not recipe.teacher.is_asked else None
    return Report(loaded.path, built.student[0], [network for network, _ in built.teachers], cache, *losses, built.note)


def build_parts(recipe: Recipe, measure: Callable[[Named, int, int], Measured]) -> Built:
    """Return the recipe's networks, each as ``measure`` builds it, and what they tell the losses."""
    num_classes, labels_by_id, note = training_labels(recipe)
    student = measure(student_named(recipe), num_classes, recipe.data.size)
    named = [teacher_named(recipe, place) for place in teacher_places(recipe)]
    teachers = [measure(network, num_classes, recipe.data.size) for network in named]
    shapes, norms = _answers(recipe, teachers)
    facts = Facts(
        num_classes=num_classes,
        student_shapes=student[0].shapes,
        teacher_shapes=shapes,
        id_count=len(labels_by_id),
        labels_by_id=labels_by_id,
        teacher_norms=norms,
        autocast=AUTOCAST[recipe.precision],
    )
    return Built(student, teachers, facts, note)


def _answers(recipe: Recipe, measured: list[Measured]) -> tuple[dict[str, tuple[int, ...]], dict[str, NormParameters]]:
    """Return the shapes of the teacher's answers, and the BatchNorms before its taps."""
    config = recipe.teacher
    if config is None:
        return {}, {}
    if not config.is_named:
        assert config.cache is not None
        with about("teacher.cache"):
            cache = Cache(Path(config.cache))
            teacher = CachedTeacher(cache, cache.kinds(recipe.taps.teacher), views=0, device=torch.device("cpu"))
        return teacher.shapes(recipe.data.size), teacher.norms
    network, taps = measured[0]
    return network.shapes, {} if config.average else _plain(taps.norms())


class Answers(nn.Module):
    """Stands for a network and answers tensors of its shapes: the losses need no more of it here."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes = shapes

    def forward(self, images_BCHW: Tensor) -> Outputs:
        """Return features and logits as the network would."""
        rows, device = len(images_BCHW), images_BCHW.device
        found = {name: torch.rand(rows, *shape, device=device) for name, shape in self.shapes.items()}
        return Outputs(found.pop("logits"), found)


def training_labels(recipe: Recipe) -> tuple[int, np.ndarray, str]:
    """Return the number of classes, the label of every training id, and what of this was made up."""
    folder = Path(recipe.data.path)
    if (folder / MANIFEST).is_file():
        reader = SplitReader(folder, "train")
        return reader.manifest.num_classes, reader.labels_by_id(), ""
    classes, samples = recipe.data.classes, recipe.data.samples
    if classes is None:
        raise RecipeError(f"data.classes: {folder} holds no shards, and how many classes they have is not said")
    counted = f"the {samples} that data.samples says" if samples else f"{2 * classes} made-up ones"
    note = f"no shards at {folder}: what is kept of every sample is counted for {counted}"
    return classes, np.arange(samples or 2 * classes) % classes, note


@cache  # the rows of a table share their networks
def measure(named: Named, num_classes: int, image_size: int) -> Measured:
    """Return what the network is made of, and the network."""
    try:
        with torch.device("meta"):
            return run_once(named, num_classes, image_size)
    except Exception:  # it computes with numbers, which the meta device has none of; or what is wrong is so here, too
        return run_once(named, num_classes, image_size)


def run_once(named: Named, num_classes: int, image_size: int) -> Measured:
    """Return what the network is made of, and the network, which is on torch's default device."""
    taps = named.build(num_classes)
    with FlopCounter() as counted:
        shapes = named.probe(taps, image_size)
    return Network(named.model, _count(taps), counted.flops / 2, shapes), taps


def _tried(recipe: Recipe, facts: Facts) -> tuple[list[str], dict[str, int], float]:
    """Return the names of the parts, each loss's parameters, and the losses' multiply-accumulates for one row."""
    try:
        with torch.device("meta"):
            return _run(recipe, facts, recipe.batch)
    except (RuntimeError, TypeError):  # a loss that computes with numbers
        return _run(recipe, facts, min(recipe.batch, FEW))


@torch.no_grad()
def _run(recipe: Recipe, facts: Facts, rows: int) -> tuple[list[str], dict[str, int], float]:
    """Run the losses forward on that many rows, on torch's default device."""
    images_BCHW, zeros_B = torch.empty(rows, 3, 1, 1), torch.zeros(rows, dtype=torch.int64)
    batch = Batch(images_BCHW, zeros_B, zeros_B, {})
    student = cast(FeatureTaps, Answers(facts.student_shapes))
    answers = Answers(facts.teacher_shapes)(images_BCHW) if facts.teacher_shapes else None
    with about("losses"), FlopCounter() as counted:
        distiller = Distiller(student, recipe.losses, facts).to(images_BCHW.device)
        losses = distiller(batch, answers, Progress(steps_per_epoch=1))
    parts = [name for name in losses if name not in ("total", "top1")]
    parameters = {name: _count(loss) for name, loss in distiller.losses.items()}
    return parts, parameters, counted.flops / 2 / rows


def _plain(norms: dict[str, NormParameters]) -> dict[str, NormParameters]:
    """Return a BatchNorm's first scales and shifts: losses compute with them, and on the meta device are no numbers."""
    with torch.device("cpu"):
        return {k: NormParameters(torch.ones(n.weight_C.shape), torch.zeros(n.bias_C.shape)) for k, n in norms.items()}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
