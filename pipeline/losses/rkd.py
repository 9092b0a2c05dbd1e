"""Relational knowledge distillation, Park et al., CVPR 2019, arXiv:1904.05068, sections 3.2.1 and 3.2.2.

B batch, D E embeddings.
"""

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Taps
from pipeline.losses._functional import distances, l2_normalize, safe_divide
from pipeline.losses._rows import BatchLoss
from pipeline.losses._stages import StageChoice, stage_names, stage_taps


def rkd_loss(student_BD: Tensor, teacher_BE: Tensor, *, distance_weight: float, angle_weight: float) -> Tensor:
    """Return the weighted sum of the distances' and the angles' losses; of one row, which has neither, zero."""
    distance, angle = distance_loss(student_BD, teacher_BE), angle_loss(student_BD, teacher_BE)
    return distance_weight * distance + angle_weight * angle


def distance_loss(student_BD: Tensor, teacher_BE: Tensor) -> Tensor:
    """Return the Huber loss of the relative distances. No gradient reaches the teacher."""
    return F.smooth_l1_loss(relative_distances(student_BD), relative_distances(teacher_BE.detach()))


def angle_loss(student_BD: Tensor, teacher_BE: Tensor) -> Tensor:
    """Return the Huber loss of the angles' cosines. No gradient reaches the teacher.

    It holds B²·D numbers of differences and B³ of cosines for each network, and for the gradient a few times over: once
    is 8 + 1 MB in float32 for 64 rows of 512, and 537 + 67 MB for 256 of 2048. ``stat_scope: ghost:64`` bounds B.
    """
    return F.smooth_l1_loss(angles(student_BD), angles(teacher_BE.detach()))


def relative_distances(x_BD: Tensor) -> Tensor:
    """Return the distances of all pairs of rows over their mean [B, B], that of a row to itself being zero and no pair.

    Where all rows are one point, there are no proportions and all are zero.
    """
    d_BB = distances(x_BD)
    return safe_divide(d_BB, d_BB.sum() / max(len(d_BB) * (len(d_BB) - 1), 1))


def angles(x_BD: Tensor) -> Tensor:
    """Return the cosine of the angle at x_i between x_j and x_k [B, B, B]; zero where two of the points are one."""
    direction_BBD = l2_normalize(x_BD.unsqueeze(0) - x_BD.unsqueeze(1), 2)
    return torch.bmm(direction_BBD, direction_BBD.mT)


class RKD(BatchLoss):
    """Proportions of the distances, and angles, among the rows of the batch."""

    class Config(BatchLoss.Config):
        """``{distance_weight: 25.0, angle_weight: 50.0}``."""

        distance_weight: NonNegativeFloat
        angle_weight: NonNegativeFloat
        stage: StageChoice = "embedding"

        def taps(self) -> Taps:
            """Return the stage."""
            return stage_taps(self.stage)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return ``distance`` and ``angle``."""
        c = self.config
        of_student, of_teacher = stage_names(c.stage)
        both = student.features[of_student].flatten(1), teacher.features[of_teacher].flatten(1)
        return {"distance": c.distance_weight * distance_loss(*both), "angle": c.angle_weight * angle_loss(*both)}
