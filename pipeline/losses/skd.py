"""Structured knowledge distillation, Liu et al., CVPR 2019, arXiv:1903.04197: its pair-wise part.

The paper adds KD of every pixel, which is a loss of its own, and a discriminator, which is not built here.

B batch, C D channels, H W space, N regions.
"""

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._functional import l2_normalize, pool_to_smaller
from pipeline.losses._stages import FeatureMapLoss


def skd_loss(student_BCHW: Tensor, teacher_BDHW: Tensor, *, pool: int) -> Tensor:
    """Return the squared differences of the regions' similarities, averaged over rows and pairs of regions.

    Maps of different size are average-pooled to the smaller one; numbers of channels may differ. No gradient reaches
    the teacher.
    """
    student_BCHW, teacher_BDHW = pool_to_smaller(student_BCHW, teacher_BDHW.detach())
    return F.mse_loss(region_similarities(student_BCHW, pool), region_similarities(teacher_BDHW, pool))


def region_similarities(map_BCHW: Tensor, pool: int) -> Tensor:
    """Return the cosines between all regions of an image, [B, N, N].

    A region is a window of ``pool`` × ``pool`` pixels; its vector is each channel's maximum. Windows at the right and
    the lower edge may be smaller.
    """
    regions_BCN = l2_normalize(F.max_pool2d(map_BCHW, pool, ceil_mode=True).flatten(2), 1)
    return regions_BCN.mT @ regions_BCN


class SKD(FeatureMapLoss):
    """A loss that matches which regions of an image the networks find similar."""

    reads_labels = False
    takes_pixels = True

    class Config(FeatureMapLoss.Config):
        """The config of SKD, such as ``{weight: 10.0, stages: [stage4], pool: 2}``."""

        pool: PositiveInt
        """Height and width of a region in pixels of the map; 1 compares all pixels."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``skd``."""
        pairs = zip(*self.maps(student, teacher), strict=True)
        return {"skd": torch.stack([skd_loss(*pair, pool=self.config.pool) for pair in pairs]).sum()}
