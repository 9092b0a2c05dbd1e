"""Spherical knowledge distillation, Guo et al., 2020, arXiv:2010.07485.

A row of logits has a direction and a size. The student's logits are brought to a given size. Both the labels and the
teacher teach the result, so that no gradient changes the size.

B batch, K classes.
"""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from pipeline.batch import Batch, Outputs, Progress
from pipeline.losses._base import Loss
from pipeline.losses._functional import safe_divide
from pipeline.losses.ce import label_cross_entropy
from pipeline.losses.kd import kd_loss
from pipeline.optim.schedule import Ramp, ramp_factor
from pipeline.precision import autocast

_SMALLEST = 1e-6
"""Deviation of a row of student's logits below which it counts as without direction."""


def rescale(student_BK: Tensor, teacher_BK: Tensor) -> Tensor:
    """Return z_s·σ(z_t)/σ(z_s) of every row, with the unbiased σ, and zero for a row of equal logits.

    The gradient passes through σ(z_s). The mean of a row is not taken away, as in the authors' script.
    """
    size_B1 = teacher_BK.detach().std(1, keepdim=True)
    return safe_divide(student_BK, student_BK.std(1, keepdim=True), tiny=_SMALLEST) * size_B1


def normalize(logits_BK: Tensor, *, scale: float, eps: float) -> Tensor:
    """Return scale·(z − mean)/√(var + eps) of every row, with the biased variance, as the authors' text has it."""
    return scale * F.layer_norm(logits_BK, logits_BK.shape[1:], eps=eps)


class SphericalKD(Loss):
    """Cross-entropy with the labels and KD, (1 − α)·CE + α·T²·KL, both of the student's logits at a given size.

    The plain logits have the same order, so the exported student decides as the one that was trained. Its probabilities
    are others: those of the plain logits.
    """

    mixed_labels = "soft"

    class Config(Loss.Config):
        """The config of spherical KD, such as ``{temperature: 4.0, alpha: 0.9, scale: teacher}``."""

        temperature: PositiveFloat
        """Temperature T by which the logits of both networks are divided for KD."""
        alpha: float | Ramp = Field(union_mode="left_to_right")
        """Share α of KD, the rest being the labels': a number, or by epoch: ``{steps: [[0, 0.9], [60, 0.5]]}``."""
        scale: Literal["teacher"] | PositiveFloat
        """Size of the logits: the deviation of the teacher's row, or a number to which both networks are normalised."""
        eps: PositiveFloat = 1e-7
        """Term added to the variance if ``scale`` is a number."""

        @model_validator(mode="after")
        def _alpha_is_a_share(self) -> "SphericalKD.Config":
            shares = [share for _, share in self.alpha.steps] if isinstance(self.alpha, Ramp) else [self.alpha]
            if not all(0 <= share <= 1 for share in shares):
                raise ValueError(f"alpha must be from 0 to 1, got {', '.join(map(str, shares))}")
            return self

        def has_label_loss(self) -> bool:
            """Return True: the labels' part is of the logits at their given size."""
            return True

        def alpha_at(self, progress: Progress) -> float:
            """Return α in the step that begins at ``progress``."""
            return ramp_factor(self.alpha, progress) if isinstance(self.alpha, Ramp) else self.alpha

    def parts(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Return the parts of ``forward`` × their shares × weight × ramp."""
        with autocast(student.logits, None):
            parts = self(*self.select_features(student, teacher), batch)
            alpha = self.config.alpha_at(progress)
            return self.scaled({"ce": (1 - alpha) * parts["ce"], "kd": alpha * parts["kd"]}, progress)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss parts ``ce`` and ``kd``, without their shares."""
        c, student_BK, teacher_BK = self.config, student.logits_BK, teacher.logits_BK
        if c.scale == "teacher":
            student_BK = rescale(student_BK, teacher_BK)
        else:
            student_BK, teacher_BK = (normalize(x, scale=c.scale, eps=c.eps) for x in (student_BK, teacher_BK))
        return {
            "ce": label_cross_entropy(student_BK, batch, 0.0),
            "kd": kd_loss(student_BK, teacher_BK, temperature=c.temperature),
        }
