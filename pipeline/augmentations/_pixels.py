"""Augmentations that choose operations on pixels: each image gets its own operation and value, several times in turn.

S is the number of operations that an image gets.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.augmentations._base import Augmentation, AugmentationKind, send
from pipeline.augmentations._operations import CODES, OPERATIONS, Fill, FloatArray, Kernel, operation_table

_PIXELS_AT_ONCE = 2**16
"""Pixels that a kernel gets at once on a CPU, so that what it computes between stays in the processor's cache."""
Level = Annotated[int, Field(ge=0, le=255)]


class PixelAugmentation(Augmentation):
    """An augmentation whose ``draw`` returns [R, S, 2]: the number of an operation (``CODES``) and its value."""

    kind: ClassVar[AugmentationKind] = "pixels"

    def apply(self, images: Tensor, drawn: FloatArray) -> Tensor:
        """Return the images [B, H, W, C], contiguous, after their operations in turn. It overwrites its input."""
        fill = getattr(self.config, "fill", (0, 0, 0))
        for chosen_B2 in drawn.swapaxes(0, 1):
            tables = _tables(chosen_B2, self.size, fill)
            if not tables:
                continue
            # One transfer for all kernels, each of which has its own part of the rows.
            sent = send(np.concatenate(list(tables.values())), images.device)
            for kernel, table in zip(tables, sent.split([len(table) for table in tables.values()]), strict=True):
                for part in table.split(self._rows_at_once(images)):
                    rows_N = part[:, 0].long()
                    _put(images, rows_N, kernel(images.index_select(0, rows_N), part[:, 1:]))
        return images

    def _rows_at_once(self, images: Tensor) -> int:
        """Return the number of images that a kernel gets at once."""
        return len(images) if images.device.type == "cuda" else max(_PIXELS_AT_ONCE // self.size**2, 1)


def _put(images: Tensor, rows_N: Tensor, changed_NHWC: Tensor) -> None:
    """Write images into rows of a batch."""
    # In words of eight bytes if whole ones make an image: a CPU copies word by word.
    word = torch.int64 if images[0].numel() % 8 == 0 else torch.uint8
    words, changed = (x.view(len(x), -1).view(word) for x in (images, changed_NHWC))
    words.index_copy_(0, rows_N, changed)


def _tables(chosen_B2: FloatArray, size: int, fill: Fill) -> dict[Kernel, FloatArray]:
    """Return the kernels that a batch needs, each with the row number and parameters of its images, [N, 1 + P]."""
    codes_B, values_B = chosen_B2.T
    found: dict[Kernel, list[FloatArray]] = {}
    for name, operation in OPERATIONS.items():
        rows_N = np.flatnonzero(codes_B == CODES[name])
        if len(rows_N) and name != "identity":
            table = operation_table(name, values_B[rows_N], size, fill)
            numbered = np.insert(table, 0, rows_N, axis=1)
            found.setdefault(operation.kernel, []).append(numbered)
    return {kernel: np.concatenate(tables) for kernel, tables in found.items()}
