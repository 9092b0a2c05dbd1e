"""Binary cross-entropy with the labels, the loss of multi-label classification itself.   B batch, K classes."""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Loss
from pipeline.tasks.multilabel import LABELS


class BinaryCrossEntropy(Loss):
    """Binary cross-entropy of every class of the student, averaged over rows and classes, or summed over classes."""

    needs_teacher = False
    reads_labels = False
    targets = frozenset({LABELS})

    class Config(Loss.Config):
        """The config of binary cross-entropy, such as ``{}`` or ``{sum_classes: true}``."""

        sum_classes: bool = False
        """Whether the classes are summed. A mean has a gradient that is smaller by the number of classes."""
        label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
        """Share s of the targets that is moved towards one half: 1 becomes 1 − s/2, and 0 becomes s/2."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``bce``."""
        smoothing = self.config.label_smoothing
        targets_BK = batch.targets[LABELS].to(student.logits_BK.dtype) * (1 - smoothing) + smoothing / 2
        losses_BK = F.binary_cross_entropy_with_logits(student.logits_BK, targets_BK, reduction="none")
        return {"bce": losses_BK.sum(1).mean() if self.config.sum_classes else losses_BK.mean()}
