"""Logit standardization, Sun et al., CVPR 2024, arXiv:2403.01427, algorithm 1.

Each row of the logits is standardised over the classes, separately for student and teacher. Another loss of logits is
then computed on the result. The student learns the order and the proportions of the teacher's logits, not their size.

B batch, K classes.
"""

from torch import Tensor

from pipeline.losses._functional import safe_divide
from pipeline.losses._transform import LogitTransform


def standardize(logits_BK: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Return (z − mean)/(std + eps) of every row, with the unbiased std. The gradient passes through both statistics.

    A row of equal logits becomes zero and gets no gradient.
    """
    # Dividing a row of equal logits by eps would multiply its gradient by ten million.
    return safe_divide(logits_BK - logits_BK.mean(1, keepdim=True), logits_BK.std(1, keepdim=True), eps)


class LogitStandardization(LogitTransform):
    """A loss that computes its inner loss on standardised logits; the inner temperature is the paper's base one."""

    reads_labels = False
    takes_pixels = True

    def transform(self, student_BK: Tensor, teacher_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the standardised logits of student and teacher."""
        return standardize(student_BK), standardize(teacher_BK)
