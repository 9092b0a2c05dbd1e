"""The validation images with which an exported file is checked.   B batch, C channels, H W space."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.data.loader import Loader

LARGEST_PART = 64
"""Largest side, in pixels, of the parts of images that are enlarged."""


def first_images(loader: Loader, count: int) -> Tensor:
    """Return the first validation images [B, C, H, W], ``count`` of them or all if there are fewer."""
    return torch.cat([*_batches(loader, count)])[:count]


def first_parts(loader: Loader, count: int) -> Tensor:
    """Return the upper left parts of the first validation images, as large as the smallest of them allows."""
    images = [image_CHW for batch_BCHW in _batches(loader, count) for image_CHW in batch_BCHW][:count]
    height, width = (min(LARGEST_PART, *(image.shape[side] for image in images)) for side in (1, 2))
    return torch.stack([image_CHW[:, :height, :width] for image_CHW in images])


def smaller_parts(images_BCHW: Tensor) -> Tensor:
    """Return parts of the images in another height and width, and in other proportions."""
    height, width = images_BCHW.shape[2:]
    return images_BCHW[:, :, : height - height // 3, : width - width // 2].contiguous()


def _batches(loader: Loader, count: int) -> Iterator[Tensor]:
    """Yield the images of validation batches, without padded rows, until there are ``count``."""
    rows = 0
    for batch in loader.validation():
        images_BCHW = batch.images_BCHW[batch.labels_B >= 0].float().contiguous()
        yield images_BCHW
        rows += len(images_BCHW)
        if rows >= count:
            break
