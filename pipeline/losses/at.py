"""Attention transfer, Zagoruyko and Komodakis, ICLR 2017, arXiv:1612.03928, eq. 2.   B batch, C channels, H W space."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._functional import l2_normalize, pool_to_smaller
from pipeline.losses._stages import FeatureMapLoss


def at_loss(students: Sequence[Tensor], teachers: Sequence[Tensor], *, p: float) -> Tensor:
    """Return the squared distances of the attention maps, averaged over rows and pixels and summed over the levels.

    Maps [B, C, H, W] of different size are average-pooled to the smaller one; numbers of channels may differ. No
    gradient reaches the teacher. Published code takes the mean over pixels, as here; the paper sums.
    """
    levels = [pool_to_smaller(student, teacher.detach()) for student, teacher in zip(students, teachers, strict=True)]
    return torch.stack([F.mse_loss(attention(student, p), attention(teacher, p)) for student, teacher in levels]).sum()


def attention(map_BCHW: Tensor, p: float) -> Tensor:
    """Return the mean of |F|^p over the channels as a vector [B, HW] of length one."""
    return l2_normalize(map_BCHW.abs().pow(p).mean(1).flatten(1), 1)


class AT(FeatureMapLoss):
    """A loss that matches attention maps, which show at which pixels a stage's features are large."""

    reads_labels = False
    takes_pixels = True

    class Config(FeatureMapLoss.Config):
        """The config of AT, such as ``{weight: 1000.0, p: 2.0}``."""

        p: float = Field(ge=1)
        """Exponent of the activations; the larger it is, the more the strongest channels count."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``at``."""
        return {"at": at_loss(*self.maps(student, teacher), p=self.config.p)}
