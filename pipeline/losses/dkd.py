"""Decoupled knowledge distillation, Zhao et al., CVPR 2022, arXiv:2203.08679, eq. 7.   B batch, K classes."""

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts, Loss
from pipeline.losses._functional import kl_divergence


def dkd_loss(
    student_BK: Tensor, teacher_BK: Tensor, labels_B: Tensor, *, alpha: float, beta: float, temperature: float
) -> Tensor:
    """Return α·TCKD + β·NCKD, each with T² and averaged over the rows, for K ≥ 3 classes.

    TCKD is the KL divergence of "the label or not", NCKD that of the other classes among themselves; KD is their sum
    with α = 1 and β = 1 − p_teacher(label), a row's own. No gradient reaches the teacher.
    """
    binary_student_B2, others_student_BK = split_at_label(student_BK / temperature, labels_B)
    binary_teacher_B2, others_teacher_BK = split_at_label(teacher_BK.detach() / temperature, labels_B)
    target = kl_divergence(binary_teacher_B2, binary_student_B2)
    non_target = kl_divergence(others_teacher_BK, others_student_BK)
    return temperature**2 * (alpha * target + beta * non_target)


def split_at_label(logits_BK: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return log (p, 1 − p) of the label [B, 2] and the log-probabilities of the other classes among themselves [B, K].

    All in log space, where log(1 − p) of a confident network is a large negative number and not −inf. The label's own
    column of the second is 0, for student and teacher alike, so that it adds nothing to their divergence.
    """
    label_B1 = labels_B.unsqueeze(1)
    is_label_BK = torch.zeros_like(logits_BK, dtype=torch.bool).scatter(1, label_B1, True)
    others_B1 = logits_BK.masked_fill(is_label_BK, float("-inf")).logsumexp(1, keepdim=True)
    binary_B2 = torch.cat([logits_BK.gather(1, label_B1), others_B1], 1) - logits_BK.logsumexp(1, keepdim=True)
    return binary_B2, (logits_BK - others_B1).masked_fill(is_label_BK, 0.0)


class DKD(Loss):
    """KD with the label's class and the other classes weighted apart. It needs hard labels."""

    class Config(Loss.Config):
        """``{alpha: 1.0, beta: 8.0, temperature: 4.0, ramp: {linear_epochs: 20}}``."""

        alpha: NonNegativeFloat
        """Weight of TCKD."""
        beta: NonNegativeFloat
        """Weight of NCKD."""
        temperature: PositiveFloat

    def __init__(self, config: Config, facts: Facts) -> None:
        if facts.num_classes < 3:
            raise ValueError(f"dkd: needs at least 3 classes and the data has {facts.num_classes}; use kd")
        super().__init__(config, facts)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return ``dkd``."""
        c = self.config
        return {
            "dkd": dkd_loss(
                student.logits_BK,
                teacher.logits_BK,
                batch.labels_B,
                alpha=c.alpha,
                beta=c.beta,
                temperature=c.temperature,
            )
        }
