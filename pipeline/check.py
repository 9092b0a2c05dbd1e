"""What a recipe is made of, found without training, weights or data: everything is built on torch's meta device.

Parameters, multiply-accumulates of one image, taps with their shapes and the parts of the losses. Where the shards are
there, their classes and samples count; else ``data.classes``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.batch import Batch, Outputs, Progress
from pipeline.build import AUTOCAST, build_student, teacher_network
from pipeline.distiller import Distiller
from pipeline.losses._base import Facts
from pipeline.recipe import LoadedRecipe, Recipe, RecipeError, about, shown
from pipeline.taps import FeatureTaps, NormParameters, tap_shapes
from shards.manifest import MANIFEST
from shards.read import SplitReader


class Network(NamedTuple):
    """What a network is made of."""

    name: str
    parameters: int
    macs: float
    """Multiply-accumulates of one image forward."""
    shapes: dict[str, tuple[int, ...]]
    """Of each tap that the losses read, and of the logits, without the batch."""


class Report(NamedTuple):
    """What a recipe is made of."""

    path: Path
    student: Network
    teacher: Network | None
    parts: list[str]
    """Of the losses, by the names they have in the journal."""
    auxiliary: dict[str, int]
    """Parameters that are trained with the student and left out at export, by loss."""
    auxiliary_macs: float
    """Of the losses forward, for one image of a whole batch."""

    @property
    def training_macs(self) -> float:
        """Of one image: a backward costs what two forwards do, and the teacher has none."""
        return 3 * (self.student.macs + self.auxiliary_macs) + (self.teacher.macs if self.teacher else 0)

    def __str__(self) -> str:
        """Return the report as a user reads it."""
        lines = [shown(self.path), *_described("student", self.student)]
        lines += _described("teacher", self.teacher) if self.teacher else []
        own = ", ".join(f"{name} {count:,}" for name, count in self.auxiliary.items() if count) or "no"
        lines += [f"losses    {', '.join(self.parts)}"]
        lines += [f"          {own} parameters of their own, {self.auxiliary_macs / 1e9:.3f} GMAC"]
        lines += [f"training  {self.training_macs / 1e9:.3f} GMAC an image"]
        return "\n".join(lines)


def _described(role: str, network: Network) -> list[str]:
    taps = [f"          {name:<16} {' × '.join(map(str, shape))}" for name, shape in network.shapes.items()]
    return [f"{role}   {network.name}, {network.parameters:,} parameters, {network.macs / 1e9:.3f} GMAC", *taps]


def check(loaded: LoadedRecipe) -> Report:
    """Build the recipe and run it once forward, all on the meta device, and return what it is made of.

    Raises RecipeError for what training would refuse of networks, taps and losses.
    """
    recipe = loaded.recipe
    num_classes, labels_by_id = _labels(recipe)
    size = recipe.data.size
    student = _measured(*_on_meta(lambda: (recipe.student.model, build_student(recipe, num_classes))), size)
    teacher, norms = None, {}
    if recipe.teacher:
        name, taps = _on_meta(lambda: teacher_network(recipe, num_classes))
        teacher, norms = _measured(name, taps, size), _plain(taps.norms())
    with torch.device("meta"):
        facts = Facts(
            num_classes=num_classes,
            student_shapes=student.shapes,
            teacher_shapes=teacher.shapes if teacher else {},
            id_count=len(labels_by_id),
            labels_by_id=labels_by_id,
            teacher_norms=norms,
            autocast=AUTOCAST[recipe.precision],
        )
        with about("losses"):
            distiller = Distiller(cast(FeatureTaps, _Answers(student)), recipe.losses, facts).to("meta")
            parts, macs = _tried(distiller, _Answers(teacher) if teacher else None, recipe.batch)
    return Report(loaded.path, student, teacher, parts, {k: _count(loss) for k, loss in distiller.losses.items()}, macs)


class _Answers(nn.Module):
    """Stands for a network and answers tensors of its shapes: the losses need no more of it here."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.shapes = network.shapes

    def forward(self, images_BCHW: Tensor) -> Outputs:
        """Return features and logits as the network would."""
        found = {name: images_BCHW.new_empty(len(images_BCHW), *shape) for name, shape in self.shapes.items()}
        return Outputs(found.pop("logits"), found)


def _labels(recipe: Recipe) -> tuple[int, np.ndarray]:
    """Return the number of classes and the label of every training id, from the shards or else made up."""
    folder = Path(recipe.data.path)
    if (folder / MANIFEST).is_file():
        reader = SplitReader(folder, "train")
        return reader.manifest.num_classes, reader.labels_by_id()
    if recipe.data.classes is None:
        raise RecipeError(f"data.classes: {folder} holds no shards, and how many classes they have is not said")
    return recipe.data.classes, np.repeat(np.arange(recipe.data.classes), 2)


def _on_meta(build: Callable[[], tuple[str, FeatureTaps]]) -> tuple[str, FeatureTaps]:
    """Return what ``build`` builds, without memory for it; a network that computes while it is built is moved."""
    try:
        with torch.device("meta"):
            return build()
    except RuntimeError:
        name, taps = build()
        return name, taps.to("meta")


@torch.no_grad()
def _measured(name: str, taps: FeatureTaps, size: int) -> Network:
    with FlopCounterMode(display=False) as counter:
        shapes = tap_shapes(taps, size)
    return Network(name, _count(taps), counter.get_total_flops() / 2, shapes)


@torch.no_grad()
def _tried(distiller: Distiller, teacher: _Answers | None, rows: int) -> tuple[list[str], float]:
    """Return the names of the loss parts, and the multiply-accumulates of the losses for one of that many rows."""
    images_BCHW, zeros_B = torch.empty(rows, 3, 1, 1), torch.zeros(rows, dtype=torch.int64)
    batch = Batch(images_BCHW, zeros_B, zeros_B, {})
    with FlopCounterMode(display=False) as counter:
        losses = distiller(batch, teacher(images_BCHW) if teacher else None, Progress(steps_per_epoch=1))
    return [name for name in losses if name not in ("total", "top1")], counter.get_total_flops() / 2 / rows


def _plain(norms: dict[str, NormParameters]) -> dict[str, NormParameters]:
    """Return a BatchNorm's first scales and shifts: losses compute with them, and on the meta device are no numbers."""
    with torch.device("cpu"):
        return {k: NormParameters(torch.ones(n.weight_C.shape), torch.zeros(n.bias_C.shape)) for k, n in norms.items()}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
