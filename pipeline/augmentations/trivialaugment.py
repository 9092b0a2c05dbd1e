"""Müller and Hutter, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation", ICCV 2021.

Operations and strengths are those of the paper's wide space, as torchvision's ``TrivialAugmentWide`` has them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.augmentations._base import SampleDraws
from pipeline.augmentations._pixels import Level, PixelAugmentation
from pipeline.augmentations._strengths import Limits, binned_table, choose_operations

_BINS = 31


class TrivialAugment(PixelAugmentation):
    """Applies one operation at a random magnitude, both drawn evenly."""

    class Config(PixelAugmentation.Config):
        """TrivialAugment (wide): one operation at a random magnitude, both drawn evenly."""

        fill: tuple[Level, Level, Level] = (0, 0, 0)
        """Red, green and blue, of 0 … 255, of pixels from outside the image."""

    def __init__(self, config: Config, size: int) -> None:
        super().__init__(config, size)
        limits = Limits(shear=0.99, translate=32.0, rotate=135.0, enhance=0.99, bits=6)
        self._table = binned_table(limits, _BINS)

    def draw(self, draws: SampleDraws) -> NDArray[np.float64]:
        """Return the operation and value of each image, [R, 1, 2]."""
        choices_R, signs_R, magnitudes_R, _ = draws.uniforms(0)
        return choose_operations(self._table, choices_R, np.floor(_BINS * magnitudes_R), signs_R)[:, None]
