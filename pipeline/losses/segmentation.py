"""Cross-entropy of every pixel, the loss of segmentation itself.   B batch, K classes, H W pixels of the mask."""

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.losses._base import Loss, Taps
from pipeline.losses._pixels import mean_count
from pipeline.tasks._masks import MASK, upsampled
from shards.manifest import IGNORED_VALUE

AUX_TAP = "aux"
"""Tap of the auxiliary head's logits."""


class SegmentationLoss(Loss):
    """Cross-entropy of the pixels' classes, averaged over the pixels of all ranks that have one.

    The logits are interpolated to the size of the mask first. With ``aux_weight`` the network's auxiliary head learns,
    too, as Zhao et al. introduced it (PSPNet, CVPR 2017, arXiv:1612.01105, section 3.3).
    """

    scope = "statistics"
    needs_teacher = False
    reads_labels = False
    takes_pixels = True
    targets = frozenset({MASK})

    class Config(Loss.Config):
        """The config of the loss, such as ``{}`` or ``{aux_weight: 0.4}``."""

        aux_weight: NonNegativeFloat = 0.0
        """Weight of the same loss of the auxiliary head; 0 for a network without one."""

        def taps(self) -> Taps:
            """Return the auxiliary head of the student, if it learns."""
            return Taps(frozenset({AUX_TAP} if self.aux_weight else ()))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the loss part ``segmentation``, and ``aux`` of the auxiliary head."""
        mask_BHW = batch.targets[MASK]
        pixels = mean_count(mask_BHW != IGNORED_VALUE).to(student.logits.dtype)
        parts = {"segmentation": pixel_cross_entropy(student.logits, mask_BHW) / pixels}
        if self.config.aux_weight:
            of_head = pixel_cross_entropy(student.features[AUX_TAP], mask_BHW)
            parts["aux"] = self.config.aux_weight * of_head / pixels
        return parts


def pixel_cross_entropy(logits_BKHW: Tensor, mask_BHW: Tensor) -> Tensor:
    """Return the cross-entropy of the pixels with a class, summed."""
    logits_BKHW = upsampled(logits_BKHW, mask_BHW)
    # F.cross_entropy of a map adds in no fixed order on a GPU.
    log_p_BHW = logits_BKHW.log_softmax(1).gather(1, _as_index(mask_BHW))[:, 0]
    return -log_p_BHW.masked_fill(mask_BHW == IGNORED_VALUE, 0.0).sum()


def _as_index(mask_BHW: Tensor) -> Tensor:
    return mask_BHW.masked_fill(mask_BHW == IGNORED_VALUE, 0)[:, None].to(torch.int64)
