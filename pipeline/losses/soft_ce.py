"""Cross-entropy with the teacher's softened probabilities, Yang et al., CVPR 2019, arXiv:1812.00123.

It is the loss of snapshot distillation, where the teacher alone is softened.   B batch, K classes.
"""

from pydantic import PositiveFloat
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Loss
from pipeline.losses._functional import soft_cross_entropy


def soft_ce_loss(
    student_BK: Tensor, teacher_BK: Tensor, *, teacher_temperature: float, temperature: float = 1.0
) -> Tensor:
    """Return −Σ_k softmax(z_t/T_t)_k · log softmax(z_s/T_s)_k, averaged over the rows. No gradient reaches the teacher.

    No T² multiplies it. It is the KL divergence and the entropy of the teacher's probabilities, which is constant.
    """
    p_BK = (teacher_BK.detach() / teacher_temperature).softmax(1)
    return soft_cross_entropy(p_BK, (student_BK / temperature).log_softmax(1))


class SoftCrossEntropy(Loss):
    """Cross-entropy of the student with the teacher's probabilities, each at a temperature of its own."""

    reads_labels = False
    takes_pixels = True

    class Config(Loss.Config):
        """The config of soft cross-entropy, such as ``{teacher_temperature: 3.0}``."""

        teacher_temperature: PositiveFloat
        """Temperature T_t by which the teacher's logits are divided."""
        temperature: PositiveFloat = 1.0
        """Temperature T_s by which the student's logits are divided."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``soft_ce``."""
        c = self.config
        temperatures = {"teacher_temperature": c.teacher_temperature, "temperature": c.temperature}
        return {"soft_ce": soft_ce_loss(student.logits_BK, teacher.logits_BK, **temperatures)}
