"""Zhong et al., "Random Erasing Data Augmentation", AAAI 2020, as torchvision's ``RandomErasing`` draws its boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from pipeline.augmentations._base import Augmentation, AugmentationKind, SampleDraws
from pipeline.augmentations._noise import normal_noise

_ATTEMPTS = 10
Share = Annotated[float, Field(gt=0, le=1)]


class Erasing(Augmentation):
    """Erases a box of an image: its normalised values become 0, which is the mean of the data, or normal noise."""

    kind: ClassVar[AugmentationKind] = "floats"

    class Config(Augmentation.Config):
        """Random erasing: a box of the image becomes the mean of the data, or noise."""

        probability: float = Field(ge=0, le=1)
        """Probability that an image has a box erased."""
        scale: tuple[Share, Share] = (0.02, 0.33)
        """Smallest and largest share of the image's area."""
        ratio: tuple[PositiveFloat, PositiveFloat] = (0.3, 3.3)
        """Smallest and largest aspect ratio, height over width."""

        value: Literal["mean", "noise"] = "mean"
        """What a box becomes: the mean of the data, or normal noise at every pixel and channel, as timm's ``pixel``."""

        @model_validator(mode="after")
        def _ranges_rise(self) -> Erasing.Config:
            for key, (least, most) in (("scale", self.scale), ("ratio", self.ratio)):
                if least > most:
                    raise ValueError(f"{key} must be [smallest, largest], got {[least, most]}")
            if self.scale[0] == 1:
                raise ValueError("scale must begin below 1: a box of the whole image is never erased")
            return self

    def draw(self, draws: SampleDraws) -> NDArray[np.float64]:
        """Return the boxes (top, left, height, width) to erase, or zeros, and the keys of their noise, [R, 6]."""
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
        keys_R2 = np.ldexp(draws.uniforms(1 + _ATTEMPTS)[:2], 32).T
        return np.concatenate([np.where(erased_R[:, None], boxes_R4, 0), keys_R2], axis=1)

    def apply(self, images: Tensor, drawn: NDArray[np.float64]) -> Tensor:
        """Return the images [B, C, H, W] with their boxes erased. It overwrites its input."""
        rows = np.flatnonzero(drawn[:, 2] * drawn[:, 3])
        erased = drawn[rows]
        values: Sequence[Tensor | float] = [0.0] * len(erased)
        if self.config.value == "noise" and len(erased):
            counts = (images.shape[1] * erased[:, 2] * erased[:, 3]).astype(np.int64).tolist()
            values = normal_noise(erased[:, 4:], counts, images.device)
        for row, value, (top, left, height, width) in zip(
            rows.tolist(), values, erased[:, :4].astype(int).tolist(), strict=True
        ):
            box = images[row, :, top : top + height, left : left + width]
            box[:] = value.view_as(box) if isinstance(value, Tensor) else value
        return images
