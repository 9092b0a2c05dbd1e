"""The augmentations of ``data.augment``: their draws on the host, and their work on a batch on its device.

Shape suffixes: R rows of a request, B of a batch, C channels, H W space.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augmentations._base import SampleDraws
from pipeline.augmentations._registry import build_augmentations
from pipeline.data.config import Config

Drawn = tuple[NDArray[np.float64], ...]
"""What each augmentation does to each image, [R, …], in the order of the recipe; empty without augmentation."""


class Augmenter:
    """The augmentations of a recipe. They follow crop and flip: first those of pixels, then those of floats.

    What mixes images is the ``Mixer``'s.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self._config = config
        self._device = device
        augmentations = build_augmentations(config.augment, config.side)
        self._augmentations = [each for each in augmentations if each.kind != "mixtures"]  # those come last

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [C] of pixels in 0 … 255."""
        mean_C, std_C = (255 * torch.tensor(x, device=self._device) for x in (self._config.mean, self._config.std))
        return mean_C, std_C

    def draw(self, ids_R: NDArray[np.int64], view: int | NDArray[np.int64]) -> Drawn:
        """Return what happens to the images with those ids in a view, or in one of each.

        It is a function of seed, id and view alone.
        """
        return tuple(
            each.draw(SampleDraws(ids_R, view, self._config.seed, position))
            for position, each in enumerate(self._augmentations)
        )

    def __call__(self, pixels_BHWC: Tensor, drawn: Drawn) -> Tensor:
        """Return the augmented, normalised images [B, C, H, W] in float32. It may overwrite the pixels."""
        if not drawn:
            return self.normalized(pixels_BHWC)
        steps = list(zip(self._augmentations, drawn, strict=True))
        with _one_thread(self._device):
            for augmentation, each in steps:
                if augmentation.kind == "pixels":
                    pixels_BHWC = augmentation.apply(pixels_BHWC, each)
            images_BCHW = self.normalized(pixels_BHWC)
            for augmentation, each in steps:
                if augmentation.kind == "floats":
                    images_BCHW = augmentation.apply(images_BCHW, each)
        return images_BCHW

    def normalized(self, pixels_BHWC: Tensor) -> Tensor:
        """Return the normalised images [B, C, H, W] in float32, in the recipe's memory format."""
        mean_C, std_C = self._statistics
        # The difference is computed in float32, like that of pixels that were converted before.
        images_BCHW = pixels_BHWC.sub(mean_C).div_(std_C).permute(0, 3, 1, 2)
        return images_BCHW if self._config.channels_last else images_BCHW.contiguous()


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Compute on one thread if ``device`` is the CPU: threads that decode would keep those of short kernels waiting."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
