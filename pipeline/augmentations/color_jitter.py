"""Random brightness, contrast, saturation and hue, in random order: torchvision's ``ColorJitter``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pipeline.augmentations._base import SampleDraws
from pipeline.augmentations._operations import CODES
from pipeline.augmentations._pixels import PixelAugmentation


class ColorJitter(PixelAugmentation):
    """Changes brightness, contrast, saturation and hue, in an order that is drawn anew for each image."""

    class Config(PixelAugmentation.Config):
        """Colour jitter: random brightness, contrast, saturation and hue, in random order."""

        brightness: float = Field(default=0.0, ge=0, le=100)
        """Largest change b of the brightness: its factor is drawn from max(0, 1 − b) … 1 + b."""
        contrast: float = Field(default=0.0, ge=0, le=100)
        """Largest change of the contrast, likewise."""
        saturation: float = Field(default=0.0, ge=0, le=100)
        """Largest change of the saturation, likewise."""
        hue: float = Field(default=0.0, ge=0, le=0.5)
        """Largest turn of the hue, as a share of the circle."""

        @model_validator(mode="after")
        def _something_changes(self) -> ColorJitter.Config:
            if not any(value for _, value in self):
                raise ValueError("nothing changes; set brightness, contrast, saturation or hue above 0")
            return self

    def draw(self, draws: SampleDraws) -> NDArray[np.float64]:
        """Return the operations and values of each image, [R, 4, 2]."""
        config = self.config
        most = np.array([config.brightness, config.contrast, config.saturation, config.hue])
        names = ("brightness", "contrast", "color", "hue")
        codes_4 = np.array([CODES[name if value else "identity"] for name, value in zip(names, most, strict=True)])
        # A factor is at least 0, so its change at least −1.
        least = -np.minimum(most, 1)
        values_R4 = (least[:, None] + (most - least)[:, None] * draws.uniforms(0)).T
        order_R4 = draws.uniforms(1).argsort(axis=0).T
        return np.stack([codes_4[order_R4].astype(np.float64), np.take_along_axis(values_R4, order_R4, 1)], axis=2)
