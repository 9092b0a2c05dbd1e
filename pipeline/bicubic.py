"""Bicubic interpolation as MATLAB's ``imresize``, the baseline of super-resolution.   B batch, C channels, H W pixels.

Its cubic has a = −0.5, and the border of an image is continued by its mirror image. ``shards/imresize.py`` has the
source, and reduces images by the same definition.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BORDER = 4
"""Pixels of the mirror image on each side; the cubic reaches two."""


def bicubic_upscaled(images_BCHW: Tensor, scale: int) -> Tensor:
    """Return the images ``scale`` times as high and wide, [B, C, scale·H, scale·W], in their own dtype."""
    rows, columns = (_mirrored(side, images_BCHW.device) for side in images_BCHW.shape[2:])
    padded_BCHW = images_BCHW[:, :, rows[:, None], columns]
    # Without ``antialias`` torch takes a = −0.75.
    size = [scale * side for side in padded_BCHW.shape[2:]]
    large_BCHW = F.interpolate(padded_BCHW, size, mode="bicubic", antialias=True)
    cut = slice(scale * _BORDER, -scale * _BORDER)
    return large_BCHW[:, :, cut, cut]


def _mirrored(side: int, device: torch.device) -> Tensor:
    """Return the indices of a side with a border of mirrored ones before and behind it: 1, 0, 0, 1, 2."""
    at = torch.arange(-_BORDER, side + _BORDER, device=device) % (2 * side)
    return torch.minimum(at, 2 * side - 1 - at)
