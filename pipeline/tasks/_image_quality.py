"""PSNR and SSIM of restored images as the tables of super-resolution measure them.   C colours, H W pixels.

Restored images are rounded to 8 bits. Both measures are of the luma Y of ITU-R BT.601, as MATLAB's ``rgb2ycbcr`` has
it but not rounded. Pixels near the edges are left out. Source: the published code of EDSR (Lim et al., CVPRW 2017) and
BasicSR.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MOST_PSNR = 100.0
"""PSNR of equal images, in dB; the definition's is infinite, which no file and no mean can hold."""
WINDOW = 11
"""Side of SSIM's Gaussian window in pixels; its standard deviation is 1.5."""
_LUMA = (65.738 / 256, 129.057 / 256, 25.064 / 256)
_BLACK = 16.0
"""Luma of a black pixel."""
_WHITE = 255.0


class Quality(NamedTuple):
    """What a restored image is worth; each is a scalar in float64."""

    psnr: Tensor
    """In dB."""
    ssim: Tensor
    """Between −1 and 1."""


def to_pixels(images: Tensor) -> Tensor:
    """Return images of values in 0 … 1 as float64 whole numbers from 0 to 255."""
    return (images.double() * _WHITE).round().clamp(0, _WHITE)


def luma(image_CHW: Tensor) -> Tensor:
    """Return the luma of an image of red, green and blue in 0 … 255, float64 [H, W], from 16 to 235."""
    factors_C = torch.tensor(_LUMA, dtype=torch.float64, device=image_CHW.device)
    return torch.einsum("c,chw->hw", factors_C, image_CHW.double()) + _BLACK


def psnr(restored: Tensor, truth: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of values in 0 … 255, over all of them, in dB and at most 100."""
    error = (restored.double() - truth.double()).div(_WHITE).square().mean()
    return (-10 * error.clamp(min=torch.finfo(torch.float64).tiny).log10()).clamp(max=MOST_PSNR)


def quality(restored_CHW: Tensor, truth_CHW: Tensor, border: int) -> Quality:
    """Return PSNR and SSIM of an image's luma, without ``border`` pixels at each edge.

    Both images have values in 0 … 255. Wang et al., "Image quality assessment: from error visibility to structural
    similarity", 2004, for SSIM, whose windows lie inside the image.
    """
    # Imported on first use: it takes seconds to load, and other tasks do not need it.
    from torchmetrics.functional.image import structural_similarity_index_measure

    cut = slice(border, -border or None)
    ours_HW, theirs_HW = (luma(image_CHW)[cut, cut] for image_CHW in (restored_CHW, truth_CHW))
    _, map_11HW = structural_similarity_index_measure(
        ours_HW[None, None], theirs_HW[None, None], data_range=_WHITE, return_full_image=True
    )
    inside = slice(WINDOW // 2, -(WINDOW // 2))  # torchmetrics mirrors the image at its edges
    return Quality(psnr(ours_HW, theirs_HW), map_11HW[..., inside, inside].mean())
