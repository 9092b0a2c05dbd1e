"""Decoupled knowledge distillation, Zhao et al., CVPR 2022, arXiv:2203.08679, eq. 7.   B batch, K classes."""

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts, Loss
from pipeline.losses._functional import kl_divergence
from pipeline.losses._pixels import label_pixels


def dkd_loss(
    student_BK: Tensor, teacher_BK: Tensor, labels_B: Tensor, *, alpha: float, beta: float, temperature: float
) -> Tensor:
    """Return α·TCKD + β·NCKD, each multiplied by T² and averaged over the rows, for K ≥ 3 classes.

    TCKD is the KL divergence of the two probabilities "label" and "not the label". NCKD is that of the distribution
    among the other classes. KD is the sum with α = 1 and, row by row, β = 1 − p_teacher(label). No gradient reaches the
    teacher.
    """
    binary_student_B2, others_student_BK = split_at_label(student_BK / temperature, labels_B)
    binary_teacher_B2, others_teacher_BK = split_at_label(teacher_BK.detach() / temperature, labels_B)
    target = kl_divergence(binary_teacher_B2, binary_student_B2)
    non_target = kl_divergence(others_teacher_BK, others_student_BK)
    return temperature**2 * (alpha * target + beta * non_target)


def split_at_label(logits_BK: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return log (p, 1 − p) of the label [B, 2] and the log-probabilities among the other classes [B, K].

    In the second result the label's column is 0 for student and teacher, so it adds nothing to their divergence.
    """
    # All in log space: for a confident network 1 − p rounds to zero, and its logarithm would be −inf.
    label_B1 = labels_B.unsqueeze(1)
    is_label_BK = torch.zeros_like(logits_BK, dtype=torch.bool).scatter(1, label_B1, True)
    others_B1 = logits_BK.masked_fill(is_label_BK, float("-inf")).logsumexp(1, keepdim=True)
    binary_B2 = torch.cat([logits_BK.gather(1, label_B1), others_B1], 1) - logits_BK.logsumexp(1, keepdim=True)
    return binary_B2, (logits_BK - others_B1).masked_fill(is_label_BK, 0.0)


class DKD(Loss):
    """KD with separate weights for the label's class and the other classes.

    It needs hard labels: of a mixed image it takes the class of the larger share. Of a map of logits it takes those of
    the mask, at the map's size.
    """

    mixed_labels = "dominant"
    takes_pixels = True

    class Config(Loss.Config):
        """The config of DKD, such as ``{alpha: 1.0, beta: 8.0, temperature: 4.0, ramp: {linear_epochs: 20}}``."""

        alpha: NonNegativeFloat
        """Weight of TCKD."""
        beta: NonNegativeFloat
        """Weight of NCKD."""
        temperature: PositiveFloat
        """Temperature T by which both networks' logits are divided."""

    def __init__(self, config: Config, facts: Facts) -> None:
        if facts.num_classes < 3:
            raise ValueError(f"dkd: needs at least 3 classes, but the data has {facts.num_classes}; use kd")
        super().__init__(config, facts)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``dkd``; of maps it is the mean over the pixels that have a class."""
        if student.logits.ndim < 4:
            return {"dkd": self._of_rows(student.logits_BK, teacher.logits_BK, batch.labels_B)}
        rows = label_pixels(batch, student.logits, teacher.logits)
        return {"dkd": rows.factor * self._of_rows(rows.student_RK, rows.teacher_RK, rows.labels_R)}

    def _of_rows(self, student_BK: Tensor, teacher_BK: Tensor, labels_B: Tensor) -> Tensor:
        c = self.config
        return dkd_loss(student_BK, teacher_BK, labels_B, alpha=c.alpha, beta=c.beta, temperature=c.temperature)
