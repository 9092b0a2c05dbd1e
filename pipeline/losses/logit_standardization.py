"""Logit standardization, Sun et al., CVPR 2024, arXiv:2403.01427, algorithm 1.

Every row of the logits is standardised over the classes, for student and teacher apart, and another loss of logits is
taken of what comes out: the student then learns the order and the proportions of the teacher's logits, not their size.
B batch, K classes.
"""

from torch import Tensor

from pipeline.losses._functional import safe_divide
from pipeline.losses._transform import LogitTransform


def standardize(logits_BK: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Return (z − mean)/(std + eps) of every row; std is the unbiased one, and both are differentiated through.

    A row of equal logits is zero and sends no gradient: a division by eps would send it ten million times its own.
    """
    return safe_divide(logits_BK - logits_BK.mean(1, keepdim=True), logits_BK.std(1, keepdim=True), eps)


class LogitStandardization(LogitTransform):
    """Another loss of the logits, taken of both networks' standardised ones; its temperature is the base one."""

    def transform(self, student_BK: Tensor, teacher_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Return both networks' logits, standardised."""
        return standardize(student_BK), standardize(teacher_BK)
