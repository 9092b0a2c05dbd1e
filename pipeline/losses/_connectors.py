"""Connectors: networks that bring a student's map to the shape of a teacher's map.

They are trained with the student and left out at export.

B batch, C D channels, H W space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.batch import Outputs
from pipeline.distributed.norms import NormFactory, batch_norm
from pipeline.losses._base import Facts, Loss, Taps
from pipeline.losses._functional import pool_to_smaller
from pipeline.losses._stages import FeatureMapLoss, StageChoices, channels, pair_stages, stage_taps


class ConnectorLoss(Loss):
    """A loss with connectors between student and teacher, which contain BatchNorms."""

    scope = "statistics"

    class Config(Loss.Config):
        """The config of every loss with connectors."""

        stat_scope: Literal["rank", "global"] = "rank"
        """Rows that the BatchNorms' statistics cover: this rank's, as published, or all ranks'."""

    def norm(self, width: int) -> nn.Module:
        """Return a BatchNorm of ``width`` channels whose statistics cover ``stat_scope``."""
        return batch_norm(width, self.config.stat_scope)


class PreactLoss(ConnectorLoss):
    """A loss on the pre-activations of several stages.

    ``connectors`` holds a connector for each (student, teacher) pair of taps in ``pairs``.
    """

    class Config(ConnectorLoss.Config):
        """The config of a loss on pre-activations: its stages."""

        stages: StageChoices
        """Stages of both networks, tapped before their last activation."""

        def taps(self) -> Taps:
            """Return the stages' pre-activations."""
            return stage_taps(self.stages, ".preact")

        def reads_head(self) -> bool:
            """Return False: only features are compared."""
            return False

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.pairs = pair_stages(config.stages, facts, ".preact")
        self.connectors = nn.ModuleList(self.connector(*pair) for pair in self.pairs)

    def connector(self, student: str, teacher: str) -> nn.Module:
        """Return the network that brings the student's tap to the teacher's shape."""
        raise NotImplementedError


class AlignedMapLoss(FeatureMapLoss):
    """A loss on pairs of maps of one shape.

    ``connectors`` holds the student's connector of each level. Where both networks have the same number of channels it
    is the identity, elsewhere a 1×1 convolution without bias.
    """

    def __init__(self, config: FeatureMapLoss.Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.connectors = nn.ModuleList(self.connector(*pair) for pair in self.levels)

    def connector(self, student: str, teacher: str) -> nn.Module:
        """Return the network that brings the student's tap to the teacher's channels."""
        return channel_connector(self.facts, student, teacher)

    def aligned_maps(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """Return each level's map of the student and of the teacher, both in one shape.

        Maps of different size are average-pooled to the smaller one. The teacher's get no gradient.
        """
        pairs = []
        for student_BCHW, teacher_BDHW, connector in zip(*self.maps(student, teacher), self.connectors, strict=True):
            student_BCHW, teacher_BDHW = pool_to_smaller(student_BCHW, teacher_BDHW.detach())
            pairs.append((self.autocast_call(connector, student_BCHW), teacher_BDHW))
        return pairs


def channel_connector(facts: Facts, student: str, teacher: str, *, bias: bool = False) -> nn.Module:
    """Return a 1×1 convolution from the student's channels to the teacher's, or the identity if they are equal.

    Raises ValueError if a tap is not a map.
    """
    student_C, teacher_C = channels(facts.student_shapes, student), channels(facts.teacher_shapes, teacher)
    return nn.Identity() if student_C == teacher_C else nn.Conv2d(student_C, teacher_C, 1, bias=bias)


def width_connector(facts: Facts, student: str, teacher: str) -> nn.Module:
    """Return what brings the student's tap to the teacher's width: the identity if both are equal.

    It is a 1×1 convolution for maps and a linear layer for vectors. Raises ValueError if one tap is a map and the other
    is not.
    """
    shapes = facts.student_shapes[student], facts.teacher_shapes[teacher]
    if len(shapes[0]) == len(shapes[1]) == 1:
        (student_D,), (teacher_D,) = shapes
        return nn.Identity() if student_D == teacher_D else nn.Linear(student_D, teacher_D)
    return channel_connector(facts, student, teacher)


def convolution_norm(in_channels: int, out_channels: int, size: int, norm: NormFactory) -> nn.Sequential:
    """Return a convolution of odd size that keeps height and width, followed by a norm.

    The convolution has no bias, which the norm would remove.
    """
    convolution = nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=False)
    return nn.Sequential(convolution, norm(out_channels))


def regressor(facts: Facts, student: str, teacher: str, norm: NormFactory) -> nn.Sequential:
    """Return a convolution from the student's tap to the shape of the teacher's, followed by a norm.

    It is FitNets' hint regressor as built in CRD's benchmark (Tian et al., ICLR 2020, arXiv:1910.10699). Raises
    ValueError if a tap is not a map, or if the student's map is smaller than the teacher's but not half its size.
    """
    student_C, teacher_C = channels(facts.student_shapes, student), channels(facts.teacher_shapes, teacher)
    student_HW, teacher_HW = facts.student_shapes[student][1:], facts.teacher_shapes[teacher][1:]
    convolution = _resizing_convolution(student_C, student_HW, teacher_C, teacher_HW)
    if convolution is None:
        raise ValueError(
            f"no regressor leads from the student's {student!r}, {_size(student_HW)}, to the teacher's {teacher!r}, "
            f"{_size(teacher_HW)}: only larger, equal or half-size maps fit; name another stage"
        )
    return nn.Sequential(convolution, norm(teacher_C))


def _resizing_convolution(
    student_C: int, student_HW: tuple[int, ...], teacher_C: int, teacher_HW: tuple[int, ...]
) -> nn.Module | None:
    """Return a convolution from the student's map shape to the teacher's, or None if none exists."""
    if student_HW == tuple(2 * side for side in teacher_HW):
        return nn.Conv2d(student_C, teacher_C, 3, stride=2, padding=1)
    if teacher_HW == tuple(2 * side for side in student_HW):
        return nn.ConvTranspose2d(student_C, teacher_C, 4, stride=2, padding=1)
    # Without padding, a kernel of size 1 + d makes a map smaller by d.
    height, width = (of_student - of_teacher for of_student, of_teacher in zip(student_HW, teacher_HW, strict=True))
    return nn.Conv2d(student_C, teacher_C, (1 + height, 1 + width)) if min(height, width) >= 0 else None


def sum_halving(losses: Sequence[Tensor]) -> Tensor:
    """Return the weighted sum of the levels' losses, given shallowest first.

    The deepest level has weight 1; each other level has half the weight of the next deeper one.
    """
    return torch.stack([loss / 2**distance for distance, loss in enumerate(reversed(losses))]).sum()


def _size(shape_HW: tuple[int, ...]) -> str:
    return "×".join(map(str, shape_HW))
