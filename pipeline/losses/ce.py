"""Cross-entropy with the labels, the loss of the task itself.   B batch, K classes."""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Loss


def label_cross_entropy(logits_BK: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """Return −(1/B)·Σ_i Σ_k y_ik log softmax(z_i)_k.

    y_i is the label's one-hot vector, or for mixed images the shares of both classes. Each one-hot vector is smoothed
    before it is mixed, as timm does; y is linear in both, so this equals smoothing the mixture.
    """
    soft_BK = batch.targets.get("soft_BK")
    target = batch.labels_B if soft_BK is None else soft_BK.to(logits_BK.dtype)
    return F.cross_entropy(logits_BK, target, label_smoothing=smoothing)


class CrossEntropy(Loss):
    """Cross-entropy of the student's logits, averaged over the rows."""

    needs_teacher = False
    mixed_labels = "soft"

    class Config(Loss.Config):
        """The config of cross-entropy, such as ``{}`` or ``{label_smoothing: 0.1}``."""

        label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
        """Share of the target that is spread evenly over the classes."""

        def has_label_loss(self) -> bool:
            """Return True: it is that loss."""
            return True

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``ce``."""
        return {"ce": label_cross_entropy(student.logits_BK, batch, self.config.label_smoothing)}
