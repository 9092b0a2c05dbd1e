"""An example of every loss: its config from ``configs/methods/<name>.yaml``, inputs of the shapes it asks for."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from methods import config_of
from torch import Tensor

from pipeline.batch import Batch, Outputs, Progress
from pipeline.features.taps import NormParameters
from pipeline.losses._base import Facts, Loss
from pipeline.losses._registry import LossSpec, known_losses, load_spec
from pipeline.tasks._masks import MASK
from pipeline.tasks.multilabel import LABELS
from shards.manifest import IGNORED_VALUE

NAMES = known_losses()
# Past every warm-up.
PROGRESS = Progress(steps_per_epoch=10, step=215)
CLASSES = 5
# Height and width of the masks, larger than any map.
MASK_SIZE = 13
# Height and width of maps of logits.
MAP_SIZE = (3, 4)
STUDENT_SHAPES = {
    "embedding": (6,),
    "cam": (CLASSES, 2, 2),
    "class_head": (CLASSES,),
    "token_head": (CLASSES,),
    "aux": (CLASSES, 2, 3),
    "last": (8, 4, 4),
    "stage1": (4, 8, 8),
    "stage2": (8, 4, 4),
}
# A stage more than the student has, so that ``all`` is paired from the deep end, and a map of another size.
TEACHER_SHAPES = {
    "embedding": (10,),
    "cam": (CLASSES, 4, 4),
    "class_head": (CLASSES,),
    "token_head": (CLASSES,),
    "last": (16, 4, 4),
    "stage1": (3, 8, 8),
    "stage2": (6, 8, 8),
    "stage3": (16, 2, 2),
}

every_loss = pytest.mark.parametrize("name", NAMES)


class Example(NamedTuple):
    loss: Loss
    student: Outputs
    teacher: Outputs
    batch: Batch

    def parts(self, seed: int = 0) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return self.loss.parts(self.student, self.teacher, self.batch, PROGRESS)

    def total(self, seed: int = 0) -> Tensor:
        return torch.stack(list(self.parts(seed).values())).sum()

    def student_tensors(self) -> list[Tensor]:
        return [self.student.logits, *self.student.features.values()]

    def at(self, rows: list[int]) -> Example:
        """Return the case with those rows of its inputs, as leaves of their own."""

        def of(outputs: Outputs) -> Outputs:
            features = {stage: x.detach()[rows].requires_grad_() for stage, x in outputs.features.items()}
            return Outputs(outputs.logits.detach()[rows].requires_grad_(), features)

        targets = {name: x[rows] for name, x in self.batch.targets.items()}
        batch = Batch(*(x[rows] for x in self.batch[:3]), {}, targets)
        return Example(self.loss, of(self.student), of(self.teacher), batch)


def with_global_statistics(spec: LossSpec) -> LossSpec:
    """Return the spec with every ``stat_scope`` in it set to ``global``."""

    def turned(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: "global" if key == "stat_scope" else turned(below) for key, below in value.items()}

    return load_spec(spec.name, turned(spec.config.model_dump(mode="json", by_alias=True)))


def shapes_of(taps: frozenset[str], shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what a network of those ``shapes`` answers for ``taps``, as FeatureTaps names it."""
    found = {}
    for tap in sorted(taps):
        stage, dot, kind = tap.partition(".")
        names = [name for name in shapes if name.startswith("stage")] if stage == "all" else [stage]
        found |= {f"{name}{dot}{kind}": shapes[name] for name in names}
    return found


def norms_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, NormParameters]:
    """Return some BatchNorm's scale and shift for each ``.preact`` tap; one channel has a negative scale."""
    draw = np.random.default_rng(0)
    found = {}
    for name, shape in shapes.items():
        if name.endswith(".preact"):
            weight, bias = draw.normal(1.0, 0.3, shape[0]), draw.normal(0.0, 0.5, shape[0])
            weight[0] = -weight[0]
            found[name] = NormParameters(torch.from_numpy(weight), torch.from_numpy(bias))
    return found


def targets_of(rows: int) -> dict[str, Tensor]:
    """Return the targets of every task: several classes an image, and masks whose every sixth stripe has no class."""
    several = (torch.arange(rows * CLASSES).view(rows, CLASSES) % 3 == 0).to(torch.uint8)
    stripes = (torch.arange(rows * MASK_SIZE**2) // 3 % (CLASSES + 1)).view(rows, MASK_SIZE, MASK_SIZE)
    return {LABELS: several, MASK: stripes.where(stripes < CLASSES, IGNORED_VALUE).to(torch.uint8)}


def example(
    name: str,
    spec: LossSpec | None = None,
    *,
    rows: int = 6,
    dtype: torch.dtype = torch.float64,
    autocast: torch.dtype | None = None,
    scale: float = 1.0,
    seed: int = 0,
    student: dict[str, tuple[int, ...]] = STUDENT_SHAPES,
    teacher: dict[str, tuple[int, ...]] = TEACHER_SHAPES,
    of_pixels: bool = False,
) -> Example:
    """Return the loss with float32 parameters (float64 ones for float64 inputs) and random inputs of that size.

    With ``of_pixels``, or for a loss that needs that, the logits are maps.
    """
    spec = spec or load_spec(name, config_of(name))
    taps = spec.config.taps()
    student_shapes, teacher_shapes = shapes_of(taps.student, student), shapes_of(taps.teacher, teacher)
    logits = (CLASSES, *MAP_SIZE) if of_pixels or (spec.takes_pixels and MASK in spec.targets) else (CLASSES,)
    # The data set goes on after the batch, and has a hole.
    labels_by_id = np.append(np.arange(rows + 8) * 2 % CLASSES, [-1, 0])
    labels = labels_by_id[:rows]
    norms = norms_of(teacher_shapes)
    facts_of = ({"logits": logits, **shapes} for shapes in (student_shapes, teacher_shapes))
    facts = Facts(CLASSES, *facts_of, len(labels_by_id), labels_by_id, norms, autocast)
    torch.manual_seed(zlib.crc32(name.encode()) + seed)
    loss = spec.build(facts).to(torch.float64 if dtype == torch.float64 else torch.float32)

    def outputs(shapes: dict[str, tuple[int, ...]]) -> Outputs:
        def made(shape: tuple[int, ...]) -> Tensor:
            return (scale * torch.randn(rows, *shape, dtype=torch.float64)).to(dtype).requires_grad_()

        return Outputs(made(logits), {stage: made(shape) for stage, shape in shapes.items()})

    read = {*spec.targets, MASK} if of_pixels else spec.targets
    targets = {name: x for name, x in targets_of(rows).items() if name in read}
    batch = Batch(torch.zeros(rows, 3, 4, 4, dtype=dtype), torch.from_numpy(labels), torch.arange(rows), {}, targets)
    return Example(loss, outputs(student_shapes), outputs(teacher_shapes), batch)


def at_the_teacher(name: str, *, scale: float = 1.0, seed: int = 0, rows: int = 6) -> Example:
    """Return a case whose student answers exactly what its teacher does."""
    case = example(name, scale=scale, seed=seed, rows=rows, student=TEACHER_SHAPES)
    same = {stage: case.teacher.features[stage].detach().clone().requires_grad_() for stage in case.student.features}
    return case._replace(student=Outputs(case.teacher.logits.detach().clone().requires_grad_(), same))


class Inputs(NamedTuple):
    """What an oracle sees: lists of float64 numbers."""

    student_logits: list[list[float]]
    teacher_logits: list[list[float]]
    labels: list[int]
    student_features: dict[str, list[Any]]
    teacher_features: dict[str, list[Any]]
    parameters: dict[str, np.ndarray]
    """Parameters and buffers of the loss, by name."""
    teacher_norms: dict[str, tuple[list[float], list[float]]]
    """Scale and shift of the BatchNorm that ends each ``.preact`` tap of the teacher."""
    ids: list[int]
    labels_by_id: list[int]
    seed: int
    """torch's seed before the loss draws."""
    targets: dict[str, list[Any]]
    map_size: tuple[int, ...]
    """Height and width of maps of logits, whose pixels are the rows of logits; () for other logits."""


def inputs_of(case: Example, seed: int) -> Inputs:
    return Inputs(
        case.student.logits_BK.tolist(),
        case.teacher.logits_BK.tolist(),
        case.batch.labels_B.tolist(),
        {stage: x.tolist() for stage, x in case.student.features.items()},
        {stage: x.tolist() for stage, x in case.teacher.features.items()},
        {key: value.numpy() for key, value in case.loss.state_dict().items()},
        {key: (norm.weight_C.tolist(), norm.bias_C.tolist()) for key, norm in case.loss.facts.teacher_norms.items()},
        case.batch.ids_B.tolist(),
        [] if case.loss.facts.labels_by_id is None else case.loss.facts.labels_by_id.tolist(),
        seed,
        {name: x.tolist() for name, x in case.batch.targets.items()},
        tuple(case.student.logits.shape[2:]),
    )


def oracle(name: str) -> Any:
    """Return the loss's module of ``tests/oracles``; a loss without one fails."""
    try:
        return import_module(f"oracles.{name}")
    except ModuleNotFoundError:
        pytest.fail(f"the loss {name} has no oracle; write its formula in plain loops as tests/oracles/{name}.py")


def those_with(trait: str) -> pytest.MarkDecorator:
    """Parametrise over the losses whose oracle declares that property."""
    found = [name for name in NAMES if trait in getattr(oracle(name), "PROPERTIES", ())]
    return pytest.mark.parametrize("name", found)


@contextmanager
def draws_of_the_global_batch(rank: int, world: int) -> Iterator[None]:
    """Give a rank the rows of what one process with all rows would draw."""
    rand, randn, randint = torch.rand, torch.randn, torch.randint

    def rows(size: int) -> slice:
        return slice(rank * size, (rank + 1) * size)

    def randn_like(x: Tensor, **_: Any) -> Tensor:
        return randn(world * len(x), *x.shape[1:], dtype=x.dtype)[rows(len(x))]

    def randint_rows(high: int, size: tuple[int, ...], **options: Any) -> Tensor:
        return randint(high, (world * size[0], *size[1:]), **options)[rows(size[0])]

    def rand_rows(size: tuple[int, ...], **options: Any) -> Tensor:
        return rand(world * size[0], *size[1:], **options)[rows(size[0])]

    drawn = {"randn_like": randn_like, "randint": randint_rows, "rand": rand_rows}
    with mock.patch.multiple("torch", **drawn):
        yield
