"""Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers", ICCV 2019, arXiv:1905.04899."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.augmentations._base import SampleDraws
from pipeline.augmentations._mixing import UNMIXED, MixAugmentation


class CutMix(MixAugmentation):
    """Replaces a box by that of another training image; the labels' shares are those of the pixels."""

    class Config(MixAugmentation.Config):
        """CutMix: a box of another training image in place of the own; labels get the share of their pixels."""

        alpha: float = Field(ge=0.01, le=100)
        """The box has the area 1 − λ of the image before it is cut at the edges; λ is of Beta(alpha, alpha)."""
        probability: float = Field(default=1.0, ge=0, le=1)
        """Probability that an image is mixed."""
        switch: float | None = Field(default=None, ge=0, le=1)
        """Beside ``mixup``, the probability that this one is used for an image in its place; null is one half."""

    def draw(self, draws: SampleDraws) -> NDArray[np.float64]:
        """Return the share of each image's own pixels, the weight 1, and the box, [R, 6].

        The box is that of torchvision and timm: around an even pixel, and cut off at the image's edges.
        """
        uniforms_4R, (for_y_R, for_x_R, _, _) = draws.uniforms(0), draws.uniforms(1)
        half_R = np.floor(0.5 * np.sqrt(1 - self.shares(uniforms_4R)) * self.size)
        centres_R2 = np.floor(np.stack([for_y_R, for_x_R], axis=1) * self.size)
        first_R2 = np.maximum(centres_R2 - half_R[:, None], 0)
        end_R2 = np.minimum(centres_R2 + half_R[:, None], self.size)
        shares_R = 1 - (end_R2 - first_R2).prod(axis=1) / self.size**2
        drawn_R6 = np.concatenate([shares_R[:, None], np.ones((len(shares_R), 1)), first_R2, end_R2], axis=1)
        drawn_R6[uniforms_4R[3] >= self.config.probability] = UNMIXED
        return drawn_R6
