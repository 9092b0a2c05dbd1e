"""Cross-entropy with the teacher's softened probabilities, Yang et al., CVPR 2019, arXiv:1812.00123.

It is the loss of snapshot distillation, where the teacher alone is softened. With the teacher's earlier answers to
images without labels it is that of noisy student, Xie et al., CVPR 2020, arXiv:1911.04252.   B batch, K classes.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from pipeline.batch import PSEUDO, Batch, Outputs, labelled_rows
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
        source: Literal["teacher", "batch"] = Field(default="teacher", alias="from")  # ``from`` is a keyword of Python
        """``batch``: the logits of ``data.unlabelled.pseudo``; the teacher does not run. ``teacher``: its answers."""
        rows: Literal["all", "unlabelled"] = "all"
        """``unlabelled``: the mean is over the images without labels alone."""

        def reads_pseudo_labels(self) -> bool:
            """Return whether the logits are those in the batch."""
            return self.source == "batch"

        def reads_unlabelled_only(self) -> bool:
            """Return whether the mean is over the images without labels."""
            return self.rows == "unlabelled"

        @model_validator(mode="after")
        def _labelled_rows_have_no_pseudo_labels(self) -> SoftCrossEntropy.Config:
            if self.source == "batch" and self.rows == "all":
                raise ValueError("from: batch has logits for images without labels alone; set rows: unlabelled")
            return self

    def select_rows(
        self, student: Outputs, teacher: Outputs | None, batch: Batch
    ) -> tuple[Outputs, Outputs | None, Batch]:
        """Return the rows of ``rows``, with the logits of ``from`` as the teacher's."""
        if self.config.rows == "all":
            return student, teacher, batch
        ratio = self.facts.unlabelled_ratio
        rows = slice(labelled_rows(len(batch.labels_B), ratio).stop, None)
        student, teacher, batch = student.at(rows), teacher and teacher.at(rows), batch.at(rows)
        if self.config.source == "batch":
            teacher = Outputs(batch.extra[PSEUDO] if ratio else student.logits, {})
        return student, teacher, batch

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``soft_ce``."""
        if not len(student.logits):  # without images there is no mean, and the sum is zero
            return {"soft_ce": student.logits.sum()}
        c = self.config
        temperatures = {"teacher_temperature": c.teacher_temperature, "temperature": c.temperature}
        return {"soft_ce": soft_ce_loss(student.logits_BK, teacher.logits_BK, **temperatures)}
