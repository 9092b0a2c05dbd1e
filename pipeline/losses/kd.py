"""Knowledge distillation, Hinton et al., 2015, arXiv:1503.02531, section 2.   B batch, K classes.

A detector's maps of class logits have no softmax: there the divergence is that of every channel's sigmoid.
"""

from pydantic import PositiveFloat
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._class_maps import ClassMapLoss
from pipeline.losses._functional import kl_divergence, sum_levels
from pipeline.losses.sigmoid_kd import sigmoid_kd_loss


def kd_loss(student_BK: Tensor, teacher_BK: Tensor, *, temperature: float) -> Tensor:
    """Return T²·KL(p_teacher ‖ p_student) of the logits divided by T, averaged over the rows.

    The factor T² keeps the size of the gradient as T grows. No gradient reaches the teacher.
    """
    log_student_BK = (student_BK / temperature).log_softmax(1)
    log_teacher_BK = (teacher_BK.detach() / temperature).log_softmax(1)
    return temperature**2 * kl_divergence(log_teacher_BK, log_student_BK)


class KD(ClassMapLoss):
    """KL divergence from the teacher's softened class probabilities; that of several maps is summed."""

    reads_labels = False
    takes_pixels = True

    class Config(ClassMapLoss.Config):
        """The config of KD, such as ``{temperature: 4.0}``."""

        temperature: PositiveFloat
        """Temperature T by which both networks' logits are divided."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``kd``."""
        temperature = self.config.temperature
        if not self.levels:
            return {"kd": kd_loss(student.logits_BK, teacher.logits_BK, temperature=temperature)}
        rows = self.map_logits(student, teacher)
        return {"kd": sum_levels([sigmoid_kd_loss(*both, temperature=temperature) for both in rows])}
