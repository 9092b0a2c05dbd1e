"""Distillation of activation boundaries, Heo et al., AAAI 2019, arXiv:1811.03233: the first of its two stages.

The student learns only the sign of the teacher's pre-activations, with a margin. The second stage continues from that
student with the labels alone.

B batch, C channels, H W space.
"""

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.losses._connectors import PreactLoss, regressor, sum_halving


def ab_loss(student_BCHW: Tensor, teacher_BCHW: Tensor, *, margin: float) -> Tensor:
    """Return max(margin − s', 0)², with s' = s if the teacher's pre-activation is positive and s' = −s otherwise.

    It is summed over a row's elements and averaged over the rows. No gradient reaches the teacher.
    """
    signed_BCHW = torch.where(teacher_BCHW.detach() > 0, student_BCHW, -student_BCHW)
    return (margin - signed_BCHW).clamp(min=0).square().flatten(1).sum(1).mean()


class AB(PreactLoss):
    """Activation boundaries of every stage. The deepest has weight 1, each other one half of the next deeper one.

    Connectors are FitNets' regressors without the ReLU, as in CRD's benchmark (Tian et al., ICLR 2020,
    arXiv:1910.10699). If both shapes are equal there is no connector, as in the authors' code.
    """

    reads_labels = False

    class Config(PreactLoss.Config):
        """The config of AB, such as ``{stages: all, margin: 1.0}``."""

        margin: PositiveFloat
        """Margin by which a pre-activation must be on the side of the teacher's sign."""

    def connector(self, student: str, teacher: str) -> nn.Module:
        """Return the network that brings the student's tap to the teacher's shape."""
        if self.facts.student_shapes[student] == self.facts.teacher_shapes[teacher]:
            return nn.Identity()
        return regressor(self.facts, student, teacher, self.norm)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``ab``."""
        losses = []
        for (of_student, of_teacher), connector in zip(self.pairs, self.connectors, strict=True):
            connected_BCHW = self.autocast_call(connector, student.features[of_student])
            losses.append(ab_loss(connected_BCHW, teacher.features[of_teacher], margin=self.config.margin))
        return {"ab": sum_halving(losses)}
