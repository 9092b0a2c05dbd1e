"""FAKD, feature affinities of networks of super-resolution, He et al., ICIP 2020.

It compares which pixels of a map have similar features.   B batch, C channels, H W space, N pixels of a map.
"""

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.batch import Batch, Outputs
from pipeline.losses._functional import pool_to_smaller, safe_divide, sum_levels
from pipeline.losses._stages import FeatureMapLoss

_EPS = 1e-8
"""What the published code adds to the length of a pixel's features."""


def affinity(map_CHW: Tensor) -> Tensor:
    """Return the inner products of the features of all pairs of pixels, scaled to length one, [N, N]."""
    features_CN = map_CHW.flatten(1)
    # Outside of the root, as published. A pixel without any feature gets no gradient, which is NaN there.
    unit_CN = safe_divide(features_CN, features_CN.norm(dim=0, keepdim=True), _EPS)
    return unit_CN.mT @ unit_CN


def affinity_distance(student_CHW: Tensor, teacher_CHW: Tensor) -> Tensor:
    """Return the mean absolute difference of the affinities of both networks in one image."""
    return (affinity(student_CHW) - affinity(teacher_CHW)).abs().mean()


def fakd_loss(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """Return the mean of ``affinity_distance`` over the images of a map. No gradient reaches the teacher."""
    # An affinity has N² numbers, so those of one image are in memory at a time, and the backward computes them again.
    distances = [
        # It draws nothing, so there is no random state to keep.
        checkpoint(affinity_distance, ours, theirs, use_reentrant=False, preserve_rng_state=False)
        for ours, theirs in zip(student_BCHW, teacher_BCHW.detach(), strict=True)
    ]
    return sum_levels(distances) / len(distances)


class FAKD(FeatureMapLoss):
    """Mean absolute difference of the affinities, summed over the stages.

    Widths may differ. Maps of different height and width are average-pooled to the smaller one.
    """

    reads_labels = False

    class Config(FeatureMapLoss.Config):
        """The config of FAKD, such as ``{stages: [stage1, stage2, stage3]}``."""

        pool: PositiveInt = 1
        """Side of the squares of a map of which the largest feature is taken first; 1 takes the map as it is."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``fakd``."""
        pairs = [pool_to_smaller(*pair) for pair in zip(*self.maps(student, teacher), strict=True)]
        if (side := self.config.pool) > 1:
            pairs = [(F.max_pool2d(ours, side), F.max_pool2d(theirs, side)) for ours, theirs in pairs]
        return {"fakd": sum_levels([fakd_loss(*pair) for pair in pairs])}
