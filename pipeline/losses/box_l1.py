"""Regression of the teacher's boxes: the L1 or Smooth L1 distance of what both heads compute for every anchor.

Smooth L1 is that of Fast R-CNN (Girshick, ICCV 2015, arXiv:1504.08083, eq. 3).   B batch, C channels, H W space.
"""

import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts
from pipeline.losses._class_maps import check_equal_maps
from pipeline.losses._functional import sum_levels
from pipeline.losses._stages import FeatureMapLoss, StageChoices


class BoxL1(FeatureMapLoss):
    """Distance of the maps of box offsets, averaged over a map's elements and summed over the levels.

    Raises ValueError if the maps of the two networks differ in shape.
    """

    reads_labels = False

    class Config(FeatureMapLoss.Config):
        """The config of the distance of boxes, such as ``{beta: 0.0}``."""

        stages: StageChoices = ("head.box",)
        """Stages of both networks whose maps are compared."""
        beta: NonNegativeFloat
        """Difference below which Smooth L1 is a square; 0 is L1."""

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        for pair in self.levels:
            check_equal_maps(facts, *pair)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``box_l1``."""
        pairs = zip(*self.maps(student, teacher), strict=True)
        beta = self.config.beta
        return {"box_l1": sum_levels([F.smooth_l1_loss(ours, theirs.detach(), beta=beta) for ours, theirs in pairs])}
