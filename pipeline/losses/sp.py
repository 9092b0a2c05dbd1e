"""Similarity-preserving distillation, Tung and Mori, ICCV 2019, arXiv:1907.09682.   B batch, D embedding."""

import torch.nn.functional as F
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._functional import l2_normalize
from pipeline.losses._rows import BatchLoss
from pipeline.losses._stages import StageChoice, StageConfig, stage_pair


def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ‖G_teacher − G_student‖²_F / B² of features [B, …]. The networks' features may differ in size.

    No gradient reaches the teacher.
    """
    return F.mse_loss(similarities(student.flatten(1)), similarities(teacher.detach().flatten(1)))


def similarities(x_BD: Tensor) -> Tensor:
    """Return G [B, B]: row i holds the inner products of sample i with all samples, scaled to length one."""
    return l2_normalize(x_BD @ x_BD.mT, 1)


class SP(BatchLoss):
    """A loss that matches which images of the batch the networks find similar.

    Its value depends on the number of rows that are compared.
    """

    reads_labels = False

    class Config(StageConfig, BatchLoss.Config):
        """The config of SP, such as ``{weight: 3000.0}``."""

        stage: StageChoice = "last"
        """Stage of both networks whose features are compared."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``sp``."""
        of_student, of_teacher = stage_pair(self.config.stage, self.facts)
        return {"sp": sp_loss(student.features[of_student], teacher.features[of_teacher])}
