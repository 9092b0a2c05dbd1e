"""Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, arXiv:1710.09412."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.augmentations._base import SampleDraws
from pipeline.augmentations._mixing import UNMIXED, MixAugmentation


class Mixup(MixAugmentation):
    """Adds another training image: λ·image + (1 − λ)·other, for pixels and labels."""

    class Config(MixAugmentation.Config):
        """mixup: λ·image + (1 − λ)·another training image, for pixels and labels."""

        alpha: float = Field(ge=0.01, le=100)
        """λ has the distribution Beta(alpha, alpha)."""
        probability: float = Field(default=1.0, ge=0, le=1)
        """Probability that an image is mixed."""

    def draw(self, draws: SampleDraws) -> NDArray[np.float64]:
        """Return λ, as share and weight of each image, and an empty box, [R, 6]."""
        uniforms_4R = draws.uniforms(0)
        shares_R = self.shares(uniforms_4R)
        drawn_R6 = np.zeros((len(shares_R), len(UNMIXED)))
        drawn_R6[:, :2] = shares_R[:, None]
        drawn_R6[uniforms_4R[3] >= self.config.probability] = UNMIXED
        return drawn_R6
