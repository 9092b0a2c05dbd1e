"""Cubuk et al., "RandAugment: Practical Automated Data Augmentation With a Reduced Search Space", NeurIPS 2020.

Operations and strengths are those of torchvision's ``RandAugment``, or of timm's ``rand-m9-mstd0.5-inc1``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pipeline.augmentations._base import SampleDraws
from pipeline.augmentations._operations import CODES
from pipeline.augmentations._pixels import Level, PixelAugmentation
from pipeline.augmentations._strengths import Limits, binned_table, choose_operations, increasing_table

_BINS = 31


class RandAugment(PixelAugmentation):
    """Applies several operations, each drawn from the same list, at one magnitude."""

    class Config(PixelAugmentation.Config):
        """RandAugment: several operations drawn from one list, at one magnitude."""

        ops: int = Field(gt=0, le=16)
        """Operations that each image gets, one after another."""
        magnitude: float = Field(ge=0, le=_BINS - 1)
        """Strength of the operations: 0 … 30, or 0 … 10 with ``increasing``."""
        magnitude_std: float = Field(default=0.0, ge=0, le=100)
        """Standard deviation of the magnitude, which each operation then draws anew; cut to its range."""
        increasing: bool = False
        """True for timm's list of operations, each stronger at a higher magnitude (``inc1``)."""
        probability: float = Field(default=1.0, ge=0, le=1)
        """Probability that an operation is applied; timm's is 0.5."""
        fill: tuple[Level, Level, Level] = (0, 0, 0)
        """Red, green and blue, of 0 … 255, of pixels from outside the image."""

        @model_validator(mode="after")
        def _magnitude_in_range(self) -> RandAugment.Config:
            if self.increasing and self.magnitude > 10:
                raise ValueError(f"magnitude must be at most 10 with increasing: true, got {self.magnitude:g}")
            return self

    def __init__(self, config: Config, size: int) -> None:
        super().__init__(config, size)
        limits = Limits(shear=0.3, translate=150 / 331 * size, rotate=30.0, enhance=0.9, bits=4)
        self._table = increasing_table(size) if config.increasing else binned_table(limits, _BINS)
        self._largest = 10 if config.increasing else _BINS - 1

    def draw(self, draws: SampleDraws) -> NDArray[np.float64]:
        """Return the operations and values of each image, [R, ops, 2]."""
        return np.stack([self._slot(draws, slot) for slot in range(self.config.ops)], axis=1)

    def _slot(self, draws: SampleDraws, slot: int) -> NDArray[np.float64]:
        choices_R, signs_R, applied_R, _ = draws.uniforms(2 * slot)
        magnitudes_R = np.full(len(choices_R), float(self.config.magnitude))
        if self.config.magnitude_std:
            magnitudes_R += self.config.magnitude_std * _normal(draws.uniforms(2 * slot + 1))
        chosen_R2 = choose_operations(self._table, choices_R, magnitudes_R.clip(0, self._largest), signs_R)
        chosen_R2[applied_R >= self.config.probability] = CODES["identity"], 0
        return chosen_R2


def _normal(uniforms_4R: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a normal number for each column of uniform ones, by Box and Muller."""
    return np.sqrt(-2 * np.log1p(-uniforms_4R[0])) * np.cos(2 * np.pi * uniforms_4R[1])
