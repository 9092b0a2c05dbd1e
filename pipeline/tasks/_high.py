"""Images of high resolution, as the targets of super-resolution.   B batch, H W pixels."""

from __future__ import annotations

import torch
from torch import Tensor

HIGH = "high_BCHW"
"""Name of the targets: uint8 [B, 3, H, W], the image that a network is to restore, ``data.upscale`` times as large."""


def as_levels(high_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the targets in 0 … 1, the range of a network's images."""
    return high_BCHW.to(dtype) / 255
