"""The mean absolute difference of the student's image and the teacher's, for super-resolution.

He et al., "FAKD: feature-affinity based knowledge distillation for efficient image super-resolution", ICIP 2020. The
total there has it with a weight of one half, and ``l1`` with the same.
"""

from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Loss


class ImageL1(Loss):
    """Mean absolute difference of the images of both networks, whose values are in 0 … 1."""

    reads_labels = False
    takes_images = True

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``image_l1``."""
        return {"image_l1": (student.logits - teacher.logits.detach()).abs().mean()}
