"""ReviewKD: distilling knowledge via knowledge review, Chen et al., CVPR 2021, arXiv:2104.09044.

Going from the deepest level to the shallowest, the student's map is fused with what the deeper levels left, and the
fused map is compared with the teacher's by the hierarchical context loss. The embedding is the deepest level, a map of
one pixel.   B batch, C channels, D embedding, H W space.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.distributed.norms import NormFactory
from pipeline.losses._base import Facts, Taps
from pipeline.losses._connectors import ConnectorLoss, convolution_norm
from pipeline.losses._stages import StageChoices, channels, pair_stages, stage_taps

PYRAMID = (4, 2, 1)
"""Sides of the pooled maps that are compared beside the whole one."""
EMBEDDING = "embedding"
PREACT = ".preact"


def hcl_loss(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """Return the hierarchical context loss of maps of equal shapes, summed over the levels (section 3.3).

    A level's is the mean of the mean squared distances of the whole maps and of both pooled to 4×4, 2×2 and 1×1 where
    that is smaller, each with half the weight of the one before. No gradient reaches the teacher.
    """
    levels = [_pyramid_distance(s, t.detach()) for s, t in zip(students, teachers, strict=True)]
    return torch.stack(levels).sum()


def _pyramid_distance(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    distances = [F.mse_loss(student_BCHW, teacher_BCHW)]
    for side in PYRAMID:
        if side < student_BCHW.shape[2]:
            student, teacher = (F.adaptive_avg_pool2d(x, side) for x in (student_BCHW, teacher_BCHW))
            distances.append(F.mse_loss(student, teacher))
    weights = [0.5**k for k in range(len(distances))]
    return torch.stack([w * distance for w, distance in zip(weights, distances, strict=True)]).sum() / sum(weights)


class Fusion(nn.Module):
    """Attention-based fusion (section 3.3): a level's map, weighed against what the deeper levels left."""

    def __init__(self, student_C: int, middle_C: int, teacher_C: int, norm: NormFactory, *, deepest: bool) -> None:
        super().__init__()
        self.input = convolution_norm(student_C, middle_C, 1, norm)
        self.output = convolution_norm(middle_C, teacher_C, 3, norm)
        self.attention = None if deepest else nn.Sequential(nn.Conv2d(2 * middle_C, 2, 1), nn.Sigmoid())
        for network in (self.input, self.output):
            nn.init.kaiming_uniform_(network[0].weight, a=1)  # type: ignore[arg-type]

    def fuse(self, student_BCHW: Tensor, residual_BCHW: Tensor | None = None, *, size: Sequence[int]) -> Tensor:
        """Return the fused map of that height and width: what the next level is given and ``output`` is taken of."""
        fused_BCHW = self.input(student_BCHW)
        if self.attention is not None and residual_BCHW is not None:
            residual_BCHW = F.interpolate(residual_BCHW, list(fused_BCHW.shape[2:]), mode="nearest")
            own_B1HW, left_B1HW = self.attention(torch.cat([fused_BCHW, residual_BCHW], 1)).split(1, 1)
            fused_BCHW = own_B1HW * fused_BCHW + left_B1HW * residual_BCHW
        return F.interpolate(fused_BCHW, list(size), mode="nearest")


class Review(ConnectorLoss):
    """Hierarchical context loss of the fused maps. The embedding's norms see one value a row: two rows are needed."""

    class Config(ConnectorLoss.Config):
        """See ``configs/methods/review.yaml``."""

        stages: StageChoices
        """Stages that are reviewed, besides the embedding. The teacher's are tapped before their last activation."""
        student_preact: bool
        """Whether the student's are too; otherwise after it."""
        widest: PositiveInt
        """Width that the fused maps have at most; otherwise it is the student's embedding's."""

        def taps(self) -> Taps:
            """Return the stages' taps and the embedding."""
            student = stage_taps(self.stages, self.student_kind).student
            teacher = stage_taps(self.stages, PREACT).teacher
            return Taps(student | {EMBEDDING}, teacher | {EMBEDDING})

        @property
        def student_kind(self) -> str:
            """What is added to a stage's name for the student's tap."""
            return PREACT if self.student_preact else ""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        stages = pair_stages(config.stages, _without_kinds(facts))
        self.pairs = [(s + config.student_kind, t + PREACT) for s, t in stages] + [(EMBEDDING, EMBEDDING)]
        middle = min(config.widest, facts.student_shapes[EMBEDDING][0])
        self.fusions = nn.ModuleList(self.fusion(*pair, middle) for pair in self.pairs)

    def fusion(self, student: str, teacher: str, middle: int) -> Fusion:
        """Return the networks of a level."""
        shapes = self.facts.student_shapes, self.facts.teacher_shapes
        if student == EMBEDDING:
            return Fusion(shapes[0][student][0], middle, shapes[1][teacher][0], self.norm, deepest=True)
        return Fusion(channels(shapes[0], student), middle, channels(shapes[1], teacher), self.norm, deepest=False)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return ``review``."""
        students, teachers = [], []
        residual: tuple[Tensor, ...] = ()
        for (of_student, of_teacher), fusion in zip(reversed(self.pairs), reversed(self.fusions), strict=True):
            target_BCHW = _as_map(teacher.features[of_teacher])
            fuse = partial(fusion.fuse, size=target_BCHW.shape[2:])  # type: ignore[arg-type]
            fused_BCHW = self.autocast_call(fuse, _as_map(student.features[of_student]), *residual)
            residual = (fused_BCHW,)
            students.append(self.autocast_call(fusion.output, fused_BCHW))  # type: ignore[arg-type]
            teachers.append(target_BCHW)
        return {"review": hcl_loss(students, teachers)}


def _as_map(feature: Tensor) -> Tensor:
    """Return an embedding [B, D] as a map of one pixel, and a map as it is."""
    return feature[:, :, None, None] if feature.ndim == 2 else feature


def _without_kinds(facts: Facts) -> Facts:
    """Return the facts with stages' names alone: levels are paired by number, whichever side of a ReLU they are on."""
    student, teacher = (
        {name.removesuffix(PREACT): shape for name, shape in shapes.items()}
        for shapes in (facts.student_shapes, facts.teacher_shapes)
    )
    return replace(facts, student_shapes=student, teacher_shapes=teacher)
