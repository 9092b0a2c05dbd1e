"""SRKD, statistics of the features of networks of super-resolution, Gao et al., ACCV 2018.

No code of the authors was found. The mean square of the differences and the sum over the stages are chosen here.

B batch, C channels, H W space.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._functional import pool_to_smaller, sum_levels
from pipeline.losses._stages import FeatureMapLoss

Statistic = Literal["mean", "mean_square", "max", "min"]


def channel_statistic(map_BCHW: Tensor, statistic: Statistic) -> Tensor:
    """Return a statistic of the channels at every pixel, [B, H, W]."""
    if statistic == "max":
        return map_BCHW.amax(1)
    if statistic == "min":
        return map_BCHW.amin(1)
    return (map_BCHW.square() if statistic == "mean_square" else map_BCHW).mean(1)


class SRKD(FeatureMapLoss):
    """Mean squared difference of a statistic of the channels, summed over the stages.

    Widths may differ. Maps of different height and width are average-pooled to the smaller one.
    """

    reads_labels = False

    class Config(FeatureMapLoss.Config):
        """The config of SRKD, such as ``{statistic: mean}``."""

        statistic: Statistic = "mean"
        """Statistic of the channels: ``mean``, ``mean_square``, ``max`` or ``min``."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``srkd``."""
        pairs = [pool_to_smaller(*pair) for pair in zip(*self.maps(student, teacher), strict=True)]
        errors = []
        for pair in pairs:
            ours, theirs = (channel_statistic(map_BCHW, self.config.statistic) for map_BCHW in pair)
            errors.append(F.mse_loss(ours, theirs.detach()))
        return {"srkd": sum_levels(errors)}
