"""An example of every loss: its config from ``configs/methods/<name>.yaml``, inputs of the shapes it asks for."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from methods import config_of
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs, Progress
from pipeline.features.names import OPTIONAL, deep_stages, levels, numbered
from pipeline.features.taps import NormParameters
from pipeline.losses._base import Facts, Loss
from pipeline.losses._peers import PeersLoss
from pipeline.losses._registry import LossSpec, find_loss, known_losses, load_spec
from pipeline.tasks import _boxes
from pipeline.tasks._high import HIGH
from pipeline.tasks._masks import MASK
from pipeline.tasks.multilabel import LABELS
from shards.manifest import IGNORED_VALUE

# All but those between networks that train together, which have tests of their own.
NAMES = [name for name in known_losses() if not issubclass(find_loss(name), PeersLoss)]
# Past every warm-up.
PROGRESS = Progress(steps_per_epoch=10, step=215)
CLASSES = 5
# Height and width of the masks, larger than any map.
MASK_SIZE = 13
# Height and width of maps of logits.
MAP_SIZE = (3, 4)
# Height and width of images with boxes; a pyramid's level pN has a pixel for 2ᴺ of theirs.
BOXED_SIZE = (64, 96)
# Anchors of an image of 64 × 96 pixels.
ANCHORS = 24
STUDENT_SHAPES = {
    "anchors": (ANCHORS, 4),
    "regression": (ANCHORS, 4),
    "embedding": (6,),
    "cam": (CLASSES, 2, 2),
    "class_head": (CLASSES,),
    "token_head": (CLASSES,),
    "aux": (CLASSES, 2, 3),
    "subclasses": (3 * CLASSES,),
    "last": (8, 4, 4),
    "stem": (3, 8, 8),
    "code": (3, 4, 4),
    "expanding": (5, 6, 4),
    "stage1": (4, 8, 8),
    "stage2": (8, 4, 4),
    "fpn.p3": (8, 8, 12),
    "fpn.p4": (8, 4, 6),
    "head.class.p3": (2 * CLASSES, 8, 12),
    "head.class.p4": (2 * CLASSES, 4, 6),
    "head.box.p3": (8, 8, 12),
    "head.box.p4": (8, 4, 6),
}
# A stage more than the student has, so that ``all`` is paired from the deep end, and a map of another size.
TEACHER_SHAPES = {
    "embedding": (10,),
    "cam": (CLASSES, 4, 4),
    "class_head": (CLASSES,),
    "token_head": (CLASSES,),
    "subclasses": (3 * CLASSES,),
    "last": (16, 4, 4),
    "stem": (4, 6, 8),
    "expanding": (7, 4, 6),
    "stage1": (3, 8, 8),
    "stage2": (6, 8, 8),
    "stage3": (16, 2, 2),
    **{name: shape for name, shape in STUDENT_SHAPES.items() if name.partition(".")[0] in ("fpn", "head")},
    "fpn.p5": (8, 2, 3),
}

HEADS = ("student_head", "teacher_head_KD")
# Of losses that compare equal widths: the channels of the stages, the deepest first.
EQUAL_WIDTHS = (8, 6, 5)

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
        return [x for x in (self.student.logits, *self.student.features.values()) if x.requires_grad]

    def at(self, rows: list[int]) -> Example:
        """Return the case with those rows of its inputs, as leaves of their own."""

        def of(outputs: Outputs) -> Outputs:
            features = {
                stage: x.detach()[rows].requires_grad_(x.requires_grad) for stage, x in outputs.features.items()
            }
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
        if tap.endswith(OPTIONAL):
            found |= {name: shapes[name] for name in deep_stages(dict.fromkeys(shapes, ""), tap)}
            continue
        stage, dot, kind = tap.partition(".")
        if tap in shapes or levels(shapes, tap):
            found |= {name: shapes[name] for name in levels(shapes, tap) or [tap]}
        else:
            names = [name for name in shapes if name.startswith("stage")] if stage == "all" else [stage]
            found |= {f"{name}{dot}{kind}": shapes[name] for name in names}
    return found


def of_equal_widths(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes with the same number of channels in student and teacher, for pairs of the deepest stages."""
    widths = dict(zip(reversed(numbered(shapes)), EQUAL_WIDTHS, strict=False)) | {"stem": 4, "embedding": 7}
    return {name: (widths.get(name, shape[0]), *shape[1:]) for name, shape in shapes.items()}


def heads_of(width: int) -> tuple[nn.Linear, Tensor]:
    """Return some last layer of a student, and the weights of a teacher's, both in float64."""
    student_KD, teacher_KD = torch.from_numpy(np.random.default_rng(1).normal(size=(2, CLASSES, width)))
    head = nn.Linear(width, CLASSES).double()
    head.load_state_dict({"weight": student_KD, "bias": torch.zeros(CLASSES)})
    return head, teacher_KD


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
    """Return the targets of every task: several classes, masks with every sixth stripe of no class, images, boxes."""
    several = (torch.arange(rows * CLASSES).view(rows, CLASSES) % 3 == 0).to(torch.uint8)
    stripes = (torch.arange(rows * MASK_SIZE**2) // 3 % (CLASSES + 1)).view(rows, MASK_SIZE, MASK_SIZE)
    masks = stripes.where(stripes < CLASSES, IGNORED_VALUE).to(torch.uint8)
    high = (torch.arange(rows * 3 * MAP_SIZE[0] * MAP_SIZE[1]) * 37 % 256).view(rows, 3, *MAP_SIZE).to(torch.uint8)
    return {LABELS: several, MASK: masks, HIGH: high, **boxes_of(rows)}


def boxes_of(rows: int) -> dict[str, Tensor]:
    """Return three boxes an image: a large one, a small one in it, and a crowd. Every third image has none."""
    boxes_34 = torch.tensor([[5.0, 3.0, 70.0, 58.0], [20.5, 17.0, 31.0, 30.5], [60.0, 40.0, 96.0, 64.0]])
    boxes_R34 = boxes_34 + torch.arange(rows)[:, None, None] % 4
    classes_R3 = (torch.arange(rows)[:, None] + torch.arange(3)) % CLASSES
    none_R = torch.arange(rows) % 3 == 2
    crowd_R3 = torch.tensor([False, False, True]).expand(rows, 3).clone()
    return {
        _boxes.BOXES: boxes_R34.masked_fill(none_R[:, None, None], 0.0),
        _boxes.CLASSES: classes_R3.masked_fill(none_R[:, None], -1),
        _boxes.CROWD: crowd_R3 & ~none_R[:, None],
        _boxes.DRAWS: torch.arange(2 * rows).view(rows, 2),
    }


def fill_zeros(loss: Loss) -> None:
    """Draw the weights that are zero at the start, which would hide what stands before them."""
    for parameter in loss.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)


def anchors_of(rows: int) -> Tensor:
    """Return squares of 16 and 56 pixels around twelve places, [rows, ``ANCHORS``, 4]."""
    middles_P2 = torch.cartesian_prod(torch.arange(12, 96, 24), torch.arange(10, 64, 20)).repeat_interleave(2, 0)
    halves_P1 = torch.tensor([8, 28]).repeat(ANCHORS // 2)[:, None]
    return torch.cat([middles_P2 - halves_P1, middles_P2 + halves_P1], 1).expand(rows, -1, -1)


def with_anchors(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the features with boxes as anchors, if there are some."""
    return {name: anchors_of(len(x)).to(x.dtype) if name == "anchors" else x for name, x in features.items()}


def logits_shape(spec: LossSpec, *, of_pixels: bool) -> tuple[int, ...]:
    """Return the shape of an image's logits: of a classifier, a segmenter, a detector, or an enlarged image."""
    if "anchors" in spec.config.taps().student:
        return (ANCHORS, CLASSES)
    if HIGH in spec.targets or spec.takes_images:
        return (3, *MAP_SIZE)
    return (CLASSES, *MAP_SIZE) if of_pixels or (spec.takes_pixels and MASK in spec.targets) else (CLASSES,)


def facts_of(
    spec: LossSpec,
    rows: int,
    logits: tuple[int, ...],
    student_shapes: dict[str, tuple[int, ...]],
    teacher_shapes: dict[str, tuple[int, ...]],
    autocast: torch.dtype | None,
) -> Facts:
    """Return what a loss of such networks is built from. The data set goes on after the batch, and has a hole."""
    labels_by_id = np.append(np.arange(rows + 8) * 2 % CLASSES, [-1, 0])
    shapes = ({"logits": logits, **shapes} for shapes in (student_shapes, teacher_shapes))
    facts = Facts(CLASSES, *shapes, len(labels_by_id), labels_by_id, norms_of(teacher_shapes), autocast=autocast)
    if spec.config.reads_head_weights():
        facts = replace(facts, **dict(zip(HEADS, heads_of(student_shapes["embedding"][0]), strict=True)))
    return facts


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
    if "needs equal widths" in getattr(oracle(name), "PROPERTIES", ()):
        student, teacher = of_equal_widths(student), of_equal_widths(teacher)
    student_shapes, teacher_shapes = shapes_of(taps.student, student), shapes_of(taps.teacher, teacher)
    logits = logits_shape(spec, of_pixels=of_pixels)
    facts = facts_of(spec, rows, logits, student_shapes, teacher_shapes, autocast)
    assert facts.labels_by_id is not None
    labels = facts.labels_by_id[:rows]
    torch.manual_seed(zlib.crc32(name.encode()) + seed)
    loss = spec.build(facts).to(torch.float64 if dtype == torch.float64 else torch.float32)
    fill_zeros(loss)

    def outputs(shapes: dict[str, tuple[int, ...]]) -> Outputs:
        def made(shape: tuple[int, ...]) -> Tensor:
            return (scale * torch.randn(rows, *shape, dtype=torch.float64)).to(dtype).requires_grad_()

        return Outputs(made(logits), with_anchors({stage: made(shape) for stage, shape in shapes.items()}))

    read = {*spec.targets, MASK} if of_pixels else spec.targets
    batch = batch_of(rows, torch.from_numpy(labels), read, dtype, student_shapes.get("code"))
    return Example(loss, outputs(student_shapes), outputs(teacher_shapes), batch)


def batch_of(
    rows: int, labels_B: Tensor, read: Iterable[str], dtype: torch.dtype, code: tuple[int, ...] | None
) -> Batch:
    """Return blank images with those of the targets that a loss reads; for a ``code``, images of its shape."""
    targets = {name: x for name, x in targets_of(rows).items() if name in read}
    images_BCHW = torch.zeros(rows, 3, *(BOXED_SIZE if _boxes.BOXES in targets else (4, 4)), dtype=dtype)
    if code is not None:
        images_BCHW = (torch.arange(rows * math.prod(code)) * 37 % 256).view(rows, *code).to(dtype) / 255
    return Batch(images_BCHW, labels_B, torch.arange(rows), {}, targets)


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
    image_size: tuple[int, ...]
    """Height and width of the images."""
    images: list[Any]
    heads: list[list[list[float]]]
    """Weights of the last layers of student and teacher, if the loss reads them."""


def inputs_of(case: Example, seed: int) -> Inputs:
    facts = case.loss.facts
    return Inputs(
        case.student.logits_BK.tolist(),
        case.teacher.logits_BK.tolist(),
        case.batch.labels_B.tolist(),
        {stage: x.tolist() for stage, x in case.student.features.items()},
        {stage: x.tolist() for stage, x in case.teacher.features.items()},
        {key: value.numpy() for key, value in case.loss.state_dict().items()},
        {key: (norm.weight_C.tolist(), norm.bias_C.tolist()) for key, norm in facts.teacher_norms.items()},
        case.batch.ids_B.tolist(),
        [] if facts.labels_by_id is None else facts.labels_by_id.tolist(),
        seed,
        {name: x.tolist() for name, x in case.batch.targets.items()},
        tuple(case.student.logits.shape[2:]),
        tuple(case.batch.images_BCHW.shape[2:]),
        case.batch.images_BCHW.tolist(),
        [
            x.tolist()
            for x in (facts.student_head and facts.student_head.weight, facts.teacher_head_KD)
            if x is not None
        ],
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
