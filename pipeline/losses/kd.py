"""Knowledge distillation, Hinton et al., 2015, arXiv:1503.02531, section 2.   B batch, K classes."""

from pydantic import PositiveFloat
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Loss
from pipeline.losses._functional import kl_divergence


def kd_loss(student_BK: Tensor, teacher_BK: Tensor, *, temperature: float) -> Tensor:
    """Return T²·KL(p_teacher ‖ p_student) of the logits divided by T, averaged over the rows.

    The factor T² keeps the size of the gradient as T grows. No gradient reaches the teacher.
    """
    log_student_BK = (student_BK / temperature).log_softmax(1)
    log_teacher_BK = (teacher_BK.detach() / temperature).log_softmax(1)
    return temperature**2 * kl_divergence(log_teacher_BK, log_student_BK)


class KD(Loss):
    """KL divergence from the teacher's softened class probabilities."""

    reads_labels = False
    takes_pixels = True

    class Config(Loss.Config):
        """The config of KD, such as ``{temperature: 4.0}``."""

        temperature: PositiveFloat
        """Temperature T by which both networks' logits are divided."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``kd``."""
        return {"kd": kd_loss(student.logits_BK, teacher.logits_BK, temperature=self.config.temperature)}
