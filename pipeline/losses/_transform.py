"""The base class of losses that transform the logits and pass them to another loss."""

from __future__ import annotations

from torch import Tensor

from pipeline.batch import Batch, Outputs, Progress
from pipeline.losses._base import Facts, Loss, Taps
from pipeline.losses._registry import InnerLoss
from pipeline.precision import autocast


class LogitTransform(Loss):
    """A loss that computes another loss, ``inner``, on transformed logits.

    Its weight and ramp multiply those of the inner loss.
    """

    class Config(Loss.Config):
        """The config of a logit transform, such as ``{inner: {dkd: {…}}}``."""

        inner: InnerLoss
        """Loss that is computed on the transformed logits."""

        def taps(self) -> Taps:
            """Return the inner loss's taps."""
            return self.inner.config.taps()

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        self.inner = config.inner.build(facts)

    def transform(self, student_BK: Tensor, teacher_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of student and teacher that the inner loss gets."""
        raise NotImplementedError

    def parts(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Return the inner loss's parts on the transformed logits × weight × ramp."""
        with autocast(student.logits, None):
            student, teacher = self.select_features(student, teacher)
            student_BK, teacher_BK = self.transform(student.logits_BK, teacher.logits_BK.detach())
            transformed = student.with_logits(student_BK), teacher.with_logits(teacher_BK)
            return self.scaled(self.inner.parts(*transformed, batch, progress), progress)
