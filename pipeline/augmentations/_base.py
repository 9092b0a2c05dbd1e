"""The base class of augmentations, and the random numbers that they draw.

Each file of this folder without an underscore holds one ``Augmentation``. The file's name is its name in a recipe.
An augmentation draws on the host, for many images at once; it changes images on their device. Both are pure functions.

Shape suffixes: R rows of a request, B of a batch, N some rows of a batch, P parameters, C channels, H W space.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.frozen_model import FrozenModel
from pipeline.philox import Purpose, uniforms


@dataclass(frozen=True)
class SampleDraws:
    """The random numbers of one augmentation for some images, as a function of (seed, id, view, position)."""

    ids_R: NDArray[np.int64]
    view: int | NDArray[np.int64]
    """View of all images, or of each."""
    seed: int
    position: int
    """Position of the augmentation in ``data.augment``."""

    def uniforms(self, number: int) -> NDArray[np.float64]:
        """Return four uniform numbers in [0, 1) of each image, [4, R]. Each ``number`` below 2**24 has its own."""
        draw = (1 + self.position) * Purpose.AUGMENTATION + number
        return uniforms(self.ids_R, self.view, draw, seed=self.seed)


AugmentationKind = Literal["pixels", "floats", "mixtures"]
"""The kinds of augmentations, in the order in which they are applied."""


class Augmentation(ABC):
    """The base class of an augmentation, for square images of side ``size``."""

    class Config(FrozenModel):
        """The keys of the augmentation in a recipe."""

    kind: ClassVar[AugmentationKind]
    """What the augmentation changes. ``pixels``: uint8 images [B, H, W, C]. ``floats``: normalised float32 images
    [B, C, H, W], later. ``mixtures``: the same, with the partners of mixed images behind them, at last."""

    def __init__(self, config: Any, size: int) -> None:
        self.config = config
        self.size = size

    @abstractmethod
    def draw(self, draws: SampleDraws) -> NDArray[np.float64]:
        """Return what happens to each image, [R, …], on the host."""

    @abstractmethod
    def apply(self, images: Tensor, drawn: NDArray[np.float64]) -> Tensor:
        """Return the images after what ``drawn`` [B, …] says of each. It may overwrite the images that it gets."""


def send(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor on ``device``; the host does not wait for the copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":  # a copy from unpinned memory would wait for all queued work of the GPU
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
