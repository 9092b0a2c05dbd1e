"""Zhong et al., "Random Erasing Data Augmentation", AAAI 2020, as torchvision's ``RandomErasing`` draws its boxes."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from pipeline.augmentations._base import Augmentation, SampleDraws

_ATTEMPTS = 10
Share = Annotated[float, Field(gt=0, le=1)]


class Erasing(Augmentation):
    """Erases a box of an image: its normalised values become 0, which is the mean of the data."""

    kind: ClassVar[Literal["pixels", "floats"]] = "floats"

    class Config(Augmentation.Config):
        """Random erasing: a box of the image becomes the mean of the data."""

        probability: float = Field(ge=0, le=1)
        """Probability that an image has a box erased."""
        scale: tuple[Share, Share] = (0.02, 0.33)
        """Smallest and largest share of the image's area."""
        ratio: tuple[PositiveFloat, PositiveFloat] = (0.3, 3.3)
        """Smallest and largest aspect ratio, height over width."""

        @model_validator(mode="after")
        def _ranges_rise(self) -> Erasing.Config:
            for key, (least, most) in (("scale", self.scale), ("ratio", self.ratio)):
                if least > most:
                    raise ValueError(f"{key} must be [smallest, largest], got {[least, most]}")
            return self

    def draw(self, draws: SampleDraws) -> NDArray[np.float64]:
        """Return the boxes (top, left, height, width) that are erased, [R, 4]; zeros for none."""
        # All attempts are drawn for all images at once, [attempts, R]. The first whose box fits counts.
        for_area, for_ratio, for_top, for_left = np.stack([draws.uniforms(1 + k) for k in range(_ATTEMPTS)], axis=1)
        (least, most), (flattest, tallest) = self.config.scale, np.log(self.config.ratio)
        area = self.size**2 * (least + (most - least) * for_area)
        aspect = np.exp(flattest + (tallest - flattest) * for_ratio)
        height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (height < self.size) & (width < self.size)
        top = np.floor(for_top * (self.size - height + 1))
        left = np.floor(for_left * (self.size - width + 1))
        first = fits.argmax(axis=0), np.arange(fits.shape[1])
        boxes_R4 = np.stack([x[first] for x in (top, left, height, width)], axis=1)
        erased_R = fits.any(axis=0) & (draws.uniforms(0)[0] < self.config.probability)
        return np.where(erased_R[:, None], boxes_R4, 0)

    def apply(self, images: Tensor, drawn: NDArray[np.float64]) -> Tensor:
        """Return the images [B, C, H, W] with their boxes erased. It overwrites its input."""
        for image, (top, left, height, width) in zip(images, drawn.astype(np.int64).tolist(), strict=True):
            if height * width:
                image[:, top : top + height, left : left + width] = 0.0
        return images
