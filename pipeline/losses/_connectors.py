"""Networks that bring a student's map to a teacher's shape; they learn with the student and are left out at export.

B batch, C channels, H W space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.distributed.norms import NormFactory, batch_norm
from pipeline.losses._base import Facts, Loss, Taps
from pipeline.losses._stages import StageChoices, channels, pair_stages, stage_taps


class ConnectorLoss(Loss):
    """A loss with networks between student and teacher, which hold BatchNorms."""

    scope = "statistics"

    class Config(Loss.Config):
        """What every such loss may be told."""

        stat_scope: Literal["rank", "global"] = "rank"
        """Rows that the BatchNorms' statistics cover: this rank's, as published, or all ranks'."""

    def norm(self, width: int) -> nn.Module:
        """Return a BatchNorm of that many channels, of the scope that the recipe asks for."""
        return batch_norm(width, self.config.stat_scope)


class PreactLoss(ConnectorLoss):
    """A loss of the pre-activations of several stages, with a connector for each: ``connectors``, of ``pairs``."""

    class Config(ConnectorLoss.Config):
        """Which stages."""

        stages: StageChoices
        """Stages of both networks, tapped before their last activation."""

        def taps(self) -> Taps:
            """Return the stages' pre-activations."""
            return stage_taps(self.stages, ".preact")

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.pairs = pair_stages(config.stages, facts, ".preact")
        self.connectors = nn.ModuleList(self.connector(*pair) for pair in self.pairs)

    def connector(self, student: str, teacher: str) -> nn.Module:
        """Return what brings the student's tap to the teacher's shape."""
        raise NotImplementedError


def convolution_norm(in_channels: int, out_channels: int, size: int, norm: NormFactory) -> nn.Sequential:
    """Return a convolution of odd size that keeps height and width, without the bias a norm takes away, and a norm."""
    convolution = nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=False)
    return nn.Sequential(convolution, norm(out_channels))


def regressor(facts: Facts, student: str, teacher: str, norm: NormFactory) -> nn.Sequential:
    """Return a convolution from the student's tap to the shape of the teacher's, and a norm.

    FitNets' hint regressor as CRD's benchmark builds it (Tian et al., ICLR 2020, arXiv:1910.10699). Raises ValueError
    for a tap that is no map and for a student's map that is smaller than the teacher's other than by half.
    """
    student_C, teacher_C = channels(facts.student_shapes, student), channels(facts.teacher_shapes, teacher)
    student_HW, teacher_HW = facts.student_shapes[student][1:], facts.teacher_shapes[teacher][1:]
    convolution = _resizing_convolution(student_C, student_HW, teacher_C, teacher_HW)
    if convolution is None:
        raise ValueError(
            f"no regressor leads from the student's {student!r}, {_size(student_HW)}, to the teacher's {teacher!r}, "
            f"{_size(teacher_HW)}: its map may be larger, or half as large; name another stage"
        )
    return nn.Sequential(convolution, norm(teacher_C))


def _resizing_convolution(
    student_C: int, student_HW: tuple[int, ...], teacher_C: int, teacher_HW: tuple[int, ...]
) -> nn.Module | None:
    """Return the convolution from one map's shape to the other's, None where there is none."""
    if student_HW == tuple(2 * side for side in teacher_HW):
        return nn.Conv2d(student_C, teacher_C, 3, stride=2, padding=1)
    if teacher_HW == tuple(2 * side for side in student_HW):
        return nn.ConvTranspose2d(student_C, teacher_C, 4, stride=2, padding=1)
    height, width = (mine - other for mine, other in zip(student_HW, teacher_HW, strict=True))
    return nn.Conv2d(student_C, teacher_C, (1 + height, 1 + width)) if min(height, width) >= 0 else None


def sum_halving(losses: Sequence[Tensor]) -> Tensor:
    """Return the sum of the levels' losses, the shallowest first: the last counts 1, each before it half the next."""
    return torch.stack([loss / 2**above for above, loss in enumerate(reversed(losses))]).sum()


def _size(shape_HW: tuple[int, ...]) -> str:
    return "×".join(map(str, shape_HW))
