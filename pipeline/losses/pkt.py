"""Probabilistic knowledge transfer, Passalis and Tefas, ECCV 2018, arXiv:1803.10837.   B batch, D E embeddings."""

import torch
from pydantic import PositiveFloat
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._functional import safe_divide
from pipeline.losses._rows import BatchLoss
from pipeline.losses._stages import StageChoice, StageConfig, stage_pair


def pkt_loss(student_BD: Tensor, teacher_BE: Tensor, *, eps: float) -> Tensor:
    """Return the mean over all pairs of p·log((p + ε)/(q + ε)), with p of the teacher and q of the student.

    p and q are ``neighbourhoods``. Their rows sum to one and the mean divides by B², as in published code, so the value
    falls as 1/B. No gradient reaches the teacher.
    """
    q_BB, p_BB = neighbourhoods(student_BD, eps), neighbourhoods(teacher_BE.detach(), eps)
    return (p_BB * ((p_BB + eps) / (q_BB + eps)).log()).mean()


def neighbourhoods(x_BD: Tensor, eps: float) -> Tensor:
    """Return (1 + cos)/2 for all pairs of rows [B, B], each row divided by its sum. A row is also paired with itself.

    A zero row has a cosine of 0 with every other row, and no gradient.
    """
    # Dividing a zero row by ε instead would multiply its gradient by ten million.
    direction_BD = safe_divide(x_BD, torch.linalg.vector_norm(x_BD, dim=1, keepdim=True), eps)
    # Rounding can make the cosine of opposite rows less than −1, and the logarithm is not defined for negatives.
    kernel_BB = ((1 + direction_BD @ direction_BD.mT) / 2).clamp(min=0)
    return kernel_BB / kernel_BB.sum(1, keepdim=True)


class PKT(BatchLoss):
    """A loss that matches the probabilities of rows of the batch to be neighbours.

    Its value depends on the number of rows that are compared.
    """

    reads_labels = False

    class Config(StageConfig, BatchLoss.Config):
        """The config of PKT, such as ``{weight: 30000.0, eps: 1.0e-7}``."""

        eps: PositiveFloat
        """Term added to lengths and to probabilities."""
        stage: StageChoice = "embedding"
        """Stage of both networks whose features are compared."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``pkt``."""
        of_student, of_teacher = stage_pair(self.config.stage, self.facts)
        student_BD, teacher_BE = student.features[of_student].flatten(1), teacher.features[of_teacher].flatten(1)
        return {"pkt": pkt_loss(student_BD, teacher_BE, eps=self.config.eps)}
