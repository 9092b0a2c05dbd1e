"""KD of independent classes: Hinton et al., 2015, arXiv:1503.02531, section 2, with a sigmoid for the softmax.

Each class is a distribution of its own over yes and no, as are the labels of a multi-label task. It is the logits' part
of Yang et al., "Multi-label knowledge distillation", ICCV 2023, arXiv:2308.06453.   B batch, K classes.
"""

import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Loss


def sigmoid_kd_loss(student_BK: Tensor, teacher_BK: Tensor, *, temperature: float) -> Tensor:
    """Return T²·Σₖ KL(σ(tₖ/T) ‖ σ(sₖ/T)) of yes and no, averaged over the rows. No gradient reaches the teacher."""
    student_BK, teacher_BK = student_BK / temperature, teacher_BK.detach() / temperature
    # log σ(−x) is the logarithm of the probability of no, without the loss of digits of log(1 − σ(x)).
    yes_BK = teacher_BK.sigmoid() * (F.logsigmoid(teacher_BK) - F.logsigmoid(student_BK))
    no_BK = (-teacher_BK).sigmoid() * (F.logsigmoid(-teacher_BK) - F.logsigmoid(-student_BK))
    return temperature**2 * (yes_BK + no_BK).sum(1).mean()


class SigmoidKD(Loss):
    """KL divergence from the teacher's softened probability of each class."""

    reads_labels = False

    class Config(Loss.Config):
        """The config of sigmoid KD, such as ``{temperature: 1.0}``."""

        temperature: PositiveFloat
        """Temperature T by which both networks' logits are divided."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``sigmoid_kd``."""
        return {
            "sigmoid_kd": sigmoid_kd_loss(student.logits_BK, teacher.logits_BK, temperature=self.config.temperature)
        }
