"""The mean absolute error of an enlarged image, the loss of super-resolution itself.

Lim et al., "Enhanced deep residual networks for single image super-resolution", CVPRW 2017, arXiv:1707.02921, section
4.3.
"""

from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Loss
from pipeline.tasks._high import HIGH, as_levels


class L1(Loss):
    """Mean absolute difference of the student's image and the true one, whose values are in 0 … 1.

    Published code often has values in 0 … 255, and its loss is then 255 times as large.
    """

    needs_teacher = False
    reads_labels = False
    targets = frozenset({HIGH})

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``l1``."""
        return {"l1": (student.logits - as_levels(batch.targets[HIGH], student.logits.dtype)).abs().mean()}
