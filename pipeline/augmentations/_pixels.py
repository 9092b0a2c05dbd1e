"""Augmentations that choose operations on pixels: each image gets its own operation and value, several times in turn.

S is the number of operations that an image gets.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor

from pipeline.augmentations._base import Augmentation, AugmentationKind, send
from pipeline.augmentations._operations import CODES, OPERATIONS, Fill, FloatArray, Kernel, operation_table

Level = Annotated[int, Field(ge=0, le=255)]


class PixelAugmentation(Augmentation):
    """An augmentation whose ``draw`` returns [R, S, 2]: the number of an operation (``CODES``) and its value."""

    kind: ClassVar[AugmentationKind] = "pixels"

    def apply(self, images: Tensor, drawn: FloatArray) -> Tensor:
        """Return the images [B, H, W, C] after their operations, one after another. It overwrites its input."""
        fill = getattr(self.config, "fill", (0, 0, 0))
        for chosen_B2 in drawn.swapaxes(0, 1):
            tables = _tables(chosen_B2, self.size, fill)
            if not tables:
                continue
            # One transfer for all kernels, each of which has its own part of the rows.
            sent = send(np.concatenate(list(tables.values())), images.device)
            for kernel, table in zip(tables, sent.split([len(table) for table in tables.values()]), strict=True):
                rows_N = table[:, 0].long()
                images.index_copy_(0, rows_N, kernel(images.index_select(0, rows_N), table[:, 1:]))
        return images


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
