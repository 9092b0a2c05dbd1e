"""Cross-entropy with the labels, the loss of the task itself.   B batch, K classes."""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Loss


class CrossEntropy(Loss):
    """Cross-entropy of the student's logits, averaged over the rows."""

    needs_teacher = False

    class Config(Loss.Config):
        """The config of cross-entropy, such as ``{}`` or ``{label_smoothing: 0.1}``."""

        label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
        """Share of the target that is spread evenly over the classes."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``ce``."""
        smoothing = self.config.label_smoothing
        return {"ce": F.cross_entropy(student.logits_BK, batch.labels_B, label_smoothing=smoothing)}
