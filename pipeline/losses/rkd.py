"""Relational knowledge distillation, Park et al., CVPR 2019, arXiv:1904.05068, sections 3.2.1 and 3.2.2.

B batch, D E embeddings.
"""

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._functional import distances, l2_normalize, safe_divide
from pipeline.losses._rows import BatchLoss
from pipeline.losses._stages import StageChoice, StageConfig, stage_pair


def rkd_loss(student_BD: Tensor, teacher_BE: Tensor, *, distance_weight: float, angle_weight: float) -> Tensor:
    """Return the weighted sum of the distance loss and the angle loss; zero for a single row, which has neither."""
    distance, angle = distance_loss(student_BD, teacher_BE), angle_loss(student_BD, teacher_BE)
    return distance_weight * distance + angle_weight * angle


def distance_loss(student_BD: Tensor, teacher_BE: Tensor) -> Tensor:
    """Return the Huber loss between both networks' relative distances. No gradient reaches the teacher."""
    return F.smooth_l1_loss(relative_distances(student_BD), relative_distances(teacher_BE.detach()))


def angle_loss(student_BD: Tensor, teacher_BE: Tensor) -> Tensor:
    """Return the Huber loss between the cosines of both networks' angles. No gradient reaches the teacher.

    Memory: B²·D numbers for the differences and B³ for the cosines, for each network. In float32 that is 8 + 1 MB for
    64 rows of 512, and 537 + 67 MB for 256 rows of 2048. The gradient needs it a few times over.
    ``stat_scope: ghost:64`` bounds B.
    """
    return F.smooth_l1_loss(angles(student_BD), angles(teacher_BE.detach()))


def relative_distances(x_BD: Tensor) -> Tensor:
    """Return the distances of all pairs of rows, divided by their mean [B, B]; all zero if all rows are equal.

    The distance of a row to itself is zero and does not count as a pair in the mean.
    """
    d_BB = distances(x_BD)
    return safe_divide(d_BB, d_BB.sum() / max(len(d_BB) * (len(d_BB) - 1), 1))


def angles(x_BD: Tensor) -> Tensor:
    """Return the cosine of the angle at x_i between x_j and x_k [B, B, B]; zero if x_i equals x_j or x_k."""
    direction_BBD = l2_normalize(x_BD.unsqueeze(0) - x_BD.unsqueeze(1), 2)
    return torch.bmm(direction_BBD, direction_BBD.mT)


class RKD(BatchLoss):
    """A loss that matches the relative distances and the angles among the rows of the batch."""

    reads_labels = False

    class Config(StageConfig, BatchLoss.Config):
        """The config of RKD, such as ``{distance_weight: 25.0, angle_weight: 50.0}``."""

        distance_weight: NonNegativeFloat
        """Weight of the distances between two rows."""
        angle_weight: NonNegativeFloat
        """Weight of the angles among three rows."""
        stage: StageChoice = "embedding"
        """Stage of both networks whose features are compared."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss parts ``distance`` and ``angle``."""
        c = self.config
        of_student, of_teacher = stage_pair(c.stage, self.facts)
        both = student.features[of_student].flatten(1), teacher.features[of_teacher].flatten(1)
        return {"distance": c.distance_weight * distance_loss(*both), "angle": c.angle_weight * angle_loss(*both)}
