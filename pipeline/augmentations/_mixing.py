"""What mixup and CutMix share: an image is mixed with another one of the training split, its partner.

How is a row of six numbers, a function of (seed, id, view) alone. First comes the image's share in the label, then its
weight in the pixels outside a box. The others are the box's top, left, bottom and right; its pixels are the partner's.

Shape suffixes: R rows of a request, B of a batch, P mixed images of these, K classes, C channels, H W space.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augmentations._base import Augmentation, AugmentationKind, send

UNMIXED = (1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
"""The row of an image that is not mixed."""


class MixAugmentation(Augmentation):
    """An augmentation whose ``draw`` returns [R, 6], as above. Rows with a share below 1 are mixed."""

    kind: ClassVar[AugmentationKind] = "mixtures"

    def shares(self, uniforms_4R: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return λ of each image, rounded to float32."""
        # So processors whose logarithms differ in the last bit mix the same.
        return symmetric_beta(uniforms_4R, self.config.alpha).astype(np.float32).astype(np.float64)

    def apply(self, images: Tensor, drawn: NDArray[np.float64]) -> Tensor:
        """Return ``mix_images`` of them."""
        return mix_images(images, drawn)


def symmetric_beta(uniforms_4R: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """Return a number of the distribution Beta(alpha, alpha) for each column of uniform ones, without rejection.

    A number t of Student's distribution with 2·alpha degrees of freedom gives ½ + ½·t/√(2·alpha + t²). Bailey's polar
    method gives t = √(2·alpha·(u^(−1/alpha) − 1))·cos 2πv from two uniform numbers. Sources: Bailey, Mathematics of
    Computation 62, 1994; Devroye, "Random variate generation in one line of code", WSC 1996.
    """
    # 64 bits, because for a small alpha the tails decide.
    u_R = np.minimum(uniforms_4R[0] + np.ldexp(uniforms_4R[1] + 2.0**-33, -32), 1 - 2.0**-53)
    logs_R, cosines_R = np.log(u_R) / alpha, np.cos(2 * np.pi * uniforms_4R[2])
    odds_R = np.exp(logs_R) / -np.expm1(logs_R)  # 1/(u^(−1/alpha) − 1), which does not overflow
    return 0.5 + 0.5 * cosines_R / np.sqrt(cosines_R**2 + odds_R)


def mix_images(images: Tensor, drawn: NDArray[np.float64]) -> Tensor:
    """Return B images of [B + P, C, H, W]: the batch's, mixed with the partners behind them. All are overwritten.

    A pixel becomes w·own + (1 − w)·partner, each product and the sum rounded to float32. w is the row's weight, and 0
    in its box. So a pixel with a weight of 0 or 1 is exactly that of one image.
    """
    own, partners, places_P = images[: len(drawn)], images[len(drawn) :], np.flatnonzero(drawn[:, 0] < 1)
    if not len(places_P):
        return own
    weights_B1HW = _weights(drawn, images.shape[2], images.shape[3], images.device)
    rows_P = send(places_P, images.device)
    # All in place: on a CPU, memory for another image takes longer than the sum.
    own.mul_(weights_B1HW)
    partners.mul_(1 - weights_B1HW.index_select(0, rows_P))
    # Pixel by pixel as in memory, because otherwise torch would copy the images to another memory format and back.
    is_last = images.is_contiguous(memory_format=torch.channels_last)
    to, of = (x.permute(0, 2, 3, 1) if is_last else x for x in (own, partners))
    to.index_add_(0, rows_P, of)
    return own


def _weights(drawn: NDArray[np.float64], height: int, width: int, device: torch.device) -> Tensor:
    """Return the weight of the own image in each pixel, float32 [B, 1, H, W], or [B, 1, 1, 1] without boxes."""
    weight_B11, top, left, bottom, right = send(drawn[:, 1:], device)[:, :, None, None].unbind(1)
    weights_B111 = weight_B11.float().unsqueeze(1)
    if not drawn[:, 2:].any():
        return weights_B111
    y_H1, x_W = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    inside_BHW = (y_H1 >= top) & (y_H1 < bottom) & (x_W >= left) & (x_W < right)
    return torch.where(inside_BHW.unsqueeze(1), 0.0, weights_B111)


def mix_labels(
    labels_B: Tensor, drawn: NDArray[np.float64], partners_P: NDArray[np.int64], classes: int
) -> tuple[Tensor, Tensor]:
    """Return the class of each image's larger share [B], and the shares of all classes, float32 [B, K].

    ``partners_P`` are the labels of the mixed images' partners. Of two equal shares the image's own is the larger.
    """
    places_P = np.flatnonzero(drawn[:, 0] < 1)
    sent = send(np.stack([places_P, partners_P, drawn[places_P, 0]], axis=1), labels_B.device)
    rows_P, others_P, shares_P = sent[:, 0].long(), sent[:, 1].long(), sent[:, 2].float()
    shares_B = torch.ones(len(labels_B), device=labels_B.device).index_copy_(0, rows_P, shares_P)
    others_B = labels_B.index_copy(0, rows_P, others_P)
    soft_BK = torch.zeros(len(labels_B), classes, device=labels_B.device)
    soft_BK.scatter_(1, labels_B[:, None], shares_B[:, None]).scatter_add_(1, others_B[:, None], 1 - shares_B[:, None])
    return torch.where(shares_B < 0.5, others_B, labels_B), soft_BK
