"""Masks: the class of every pixel of an image, as segmentation's target.   B batch, H W pixels, K classes.

A value below K is a class. ``IGNORED_VALUE`` of ``shards.manifest`` marks pixels of no class, which no loss and no
metric counts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MASK = "mask_BHW"
"""Name of the targets: uint8 [B, H, W], the class of each pixel of the image."""


def masks_at(mask_BHW: Tensor, height: int, width: int) -> Tensor:
    """Return the masks at another size, each pixel from the nearest one by its centre, as PIL's ``NEAREST`` does."""
    along = [
        ((torch.arange(new, device=mask_BHW.device) + 0.5) * (old / new)).long().clamp(max=old - 1)
        for new, old in zip((height, width), mask_BHW.shape[1:], strict=True)
    ]
    return mask_BHW[:, along[0][:, None], along[1]]


def upsampled(logits_BKHW: Tensor, mask_BHW: Tensor) -> Tensor:
    """Return a map of logits at the height and width of the masks, by bilinear interpolation between the corners.

    ``align_corners`` is True, as in the code that the published tables of Cityscapes come from.
    """
    if logits_BKHW.shape[2:] == mask_BHW.shape[1:]:
        return logits_BKHW
    return F.interpolate(logits_BKHW, mask_BHW.shape[1:], mode="bilinear", align_corners=True)
