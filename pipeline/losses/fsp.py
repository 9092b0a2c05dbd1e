"""Flow of solution procedure, Yim et al., CVPR 2017, pages 7130–7138, eq. 1 and 2.

The flow between two maps of a network is the matrix of inner products of their channels. The student learns the
teacher's flow from every map to the next.

B batch, C D channels, H W space, N pixels.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Facts, Taps
from pipeline.losses._functional import pool_to_smaller
from pipeline.losses._stages import FeatureMapLoss, check_equal_widths, stage_taps


def fsp_loss(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """Return the mean squared errors of the flows between neighbouring maps [B, C, H, W], summed over the pairs.

    No gradient reaches the teacher. Both networks' maps have equal numbers of channels, but may differ in size.
    """
    pairs = zip(pairwise(students), pairwise(teachers), strict=True)
    return torch.stack([F.mse_loss(flow(*student), flow(*teacher).detach()) for student, teacher in pairs]).sum()


def flow(shallow_BCHW: Tensor, deep_BDHW: Tensor) -> Tensor:
    """Return F·Gᵀ / N [B, C, D] of two maps of a network; the larger one is average-pooled to the smaller."""
    shallow_BCHW, deep_BDHW = pool_to_smaller(shallow_BCHW, deep_BDHW)
    shallow_BCN, deep_BDN = shallow_BCHW.flatten(2), deep_BDHW.flatten(2)
    return torch.bmm(shallow_BCN, deep_BDN.mT) / shallow_BCN.shape[2]


class FSP(FeatureMapLoss):
    """A loss that matches how features change from map to map. The networks' maps must have equal widths."""

    reads_labels = False

    class Config(FeatureMapLoss.Config):
        """The config of FSP. With ``stages: all``, the maps are the stem's and every stage's."""

        def taps(self) -> Taps:
            """Return the taps of the stages and, for all of them, of the stem."""
            return stage_taps(self.stages).union(stage_taps("stem") if self.stages == "all" else Taps())

    def __init__(self, config: Config, facts: Facts) -> None:
        super().__init__(config, facts)
        if config.stages == "all":
            self.levels = [("stem", "stem"), *self.levels]
        if len(self.levels) < 2:
            raise ValueError("fsp: a flow leads from one map to the next, and there is only one; name two stages")
        check_equal_widths("fsp", self.levels, facts)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``fsp``."""
        return {"fsp": fsp_loss(*self.maps(student, teacher))}
