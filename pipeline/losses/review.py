"""ReviewKD: distilling knowledge via knowledge review, Chen et al., CVPR 2021, arXiv:2104.09044.

Levels are visited from the deepest to the shallowest. At each level the student's map is fused with the result of the
deeper levels. The hierarchical context loss compares the fused map with the teacher's. The deepest level is the
embedding, taken as a map of one pixel.

B batch, C channels, D embedding, H W space.
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
from pipeline.losses._stages import EMBEDDING, StageChoices, channels, pair_stages, stage_taps

PYRAMID = (4, 2, 1)
"""Heights and widths of the pooled maps that are compared besides the full map."""
PREACT = ".preact"


def hcl_loss(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """Return the hierarchical context loss of maps of equal shapes, summed over the levels (section 3.3).

    A level's loss is a weighted mean of mean squared errors: of the full maps, and of both pooled to 4×4, 2×2 and 1×1.
    Sizes that are not smaller than the map are left out. Each term has half the weight of the one before. No gradient
    reaches the teacher.
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
    """Attention-based fusion (section 3.3) of a level's map with the result of the deeper levels."""

    def __init__(self, student_C: int, middle_C: int, teacher_C: int, norm: NormFactory, *, deepest: bool) -> None:
        super().__init__()
        self.input = convolution_norm(student_C, middle_C, 1, norm)
        self.output = convolution_norm(middle_C, teacher_C, 3, norm)
        self.attention = None if deepest else nn.Sequential(nn.Conv2d(2 * middle_C, 2, 1), nn.Sigmoid())
        # As in the authors' code; torch's default for a convolution is a = √5.
        for network in (self.input, self.output):
            nn.init.kaiming_uniform_(network[0].weight, a=1)  # type: ignore[arg-type]

    def fuse(self, student_BCHW: Tensor, residual_BCHW: Tensor | None = None, *, size: Sequence[int]) -> Tensor:
        """Return the fused map, resized to the height and width ``size``.

        The next level gets it as ``residual_BCHW``, and ``output`` is applied to it.
        """
        fused_BCHW = self.input(student_BCHW)
        if self.attention is not None and residual_BCHW is not None:
            residual_BCHW = F.interpolate(residual_BCHW, list(fused_BCHW.shape[2:]), mode="nearest")
            level_B1HW, deeper_B1HW = self.attention(torch.cat([fused_BCHW, residual_BCHW], 1)).split(1, 1)
            fused_BCHW = level_B1HW * fused_BCHW + deeper_B1HW * residual_BCHW
        return F.interpolate(fused_BCHW, list(size), mode="nearest")


class Review(ConnectorLoss):
    """Hierarchical context loss of the fused maps.

    The embedding's BatchNorms see one value per row, so at least two rows are needed.
    """

    reads_labels = False

    class Config(ConnectorLoss.Config):
        """The config of ReviewKD; ``configs/methods/review.yaml`` has the published values."""

        stages: StageChoices
        """Stages that are compared, besides the embedding. The teacher's are tapped before their last activation."""
        student_preact: bool
        """Whether the student's stages, too, are tapped before their last activation; otherwise after it."""
        widest: PositiveInt
        """Largest number of channels of the fused maps; below it, they have the width of the student's embedding."""

        def taps(self) -> Taps:
            """Return the stages' taps and the embedding."""
            student = stage_taps(self.stages, self.student_kind).student
            teacher = stage_taps(self.stages, PREACT).teacher
            return Taps(student | {EMBEDDING}, teacher | {EMBEDDING})

        def reads_head(self) -> bool:
            """Return False: only features are compared."""
            return False

        @property
        def student_kind(self) -> str:
            """Ending of the student's taps: ``.preact`` or nothing."""
            return PREACT if self.student_preact else ""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        stages = pair_stages(config.stages, _without_preact(facts))
        self.pairs = [(s + config.student_kind, t + PREACT) for s, t in stages] + [(EMBEDDING, EMBEDDING)]
        middle = min(config.widest, facts.student_shapes[EMBEDDING][0])
        self.fusions = nn.ModuleList(self.fusion(*pair, middle) for pair in self.pairs)

    def fusion(self, student: str, teacher: str, middle: int) -> Fusion:
        """Return the networks of a level; ``middle`` is the number of channels of the fused map."""
        shapes = self.facts.student_shapes, self.facts.teacher_shapes
        if student == EMBEDDING:
            return Fusion(shapes[0][student][0], middle, shapes[1][teacher][0], self.norm, deepest=True)
        return Fusion(channels(shapes[0], student), middle, channels(shapes[1], teacher), self.norm, deepest=False)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``review``."""
        students, teachers = [], []
        residual: tuple[Tensor, ...] = ()
        for (of_student, of_teacher), fusion in zip(reversed(self.pairs), reversed(self.fusions), strict=True):
            target_BCHW = _as_map(teacher.features[of_teacher])
            fuse = partial(fusion.fuse, size=target_BCHW.shape[2:])  # type: ignore[arg-type]
            fused_BCHW = self.autocast_call(fuse, _as_map(student.features[of_student]), *residual)
            # The next level fuses the middle channels, before ``output`` brings them to the teacher's width.
            residual = (fused_BCHW,)
            students.append(self.autocast_call(fusion.output, fused_BCHW))  # type: ignore[arg-type]
            teachers.append(target_BCHW)
        return {"review": hcl_loss(students, teachers)}


def _as_map(feature: Tensor) -> Tensor:
    """Return an embedding [B, D] as a map of one pixel; return a map unchanged."""
    return feature[:, :, None, None] if feature.ndim == 2 else feature


def _without_preact(facts: Facts) -> Facts:
    """Return the facts with the ending ``.preact`` removed from the taps' names.

    Stages are paired by number, but only one of the two networks may be tapped before its ReLU.
    """
    student, teacher = (
        {name.removesuffix(PREACT): shape for name, shape in shapes.items()}
        for shapes in (facts.student_shapes, facts.teacher_shapes)
    )
    return replace(facts, student_shapes=student, teacher_shapes=teacher)
