"""A picture of some validation images, each with its mask and the masks that networks predict.

B batch, H W pixels of a validation image, h w pixels of the picture's cells.
"""

from __future__ import annotations

import io
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.data.config import Config
from pipeline.distributed import collectives
from pipeline.tasks._mask_images import palette
from pipeline.tasks._masks import MASK, masks_at, upsampled
from shards.manifest import IGNORED_VALUE

_IMAGES = 4
_LONGEST = 240
"""Longest side of a cell in pixels."""
_GAP = 4
"""White pixels between cells."""


class DrawnSheet(NamedTuple):
    """The picture, and what is on it."""

    png: bytes
    columns: tuple[str, ...]
    classes: tuple[int, ...]
    """The classes of its masks."""


class MaskSamples:
    """The images of the smallest ids, which are the same on any number of ranks, with their masks.

    ``config`` are the settings of the validation images.
    """

    def __init__(self, config: Config, *, with_teacher: bool) -> None:
        self._config = config
        self._networks = ("teacher", "student") if with_teacher else ("student",)
        self._shape: tuple[int, int] = (0, 0)
        self._rows: Tensor | None = None

    def watch(self, batch: Batch, outputs: dict[str, Outputs]) -> None:
        """Keep those images of a batch that have smaller ids than the ones before."""
        chosen = (batch.labels_B >= 0).nonzero().flatten()
        chosen = chosen[batch.ids_B[chosen].argsort()][:_IMAGES]
        mask_BHW, images_BCHW = batch.targets[MASK][chosen], batch.images_BCHW[chosen]
        if self._rows is None:
            self._shape = _cell_shape(*mask_BHW.shape[1:])
            columns = 1 + (4 + len(self._networks)) * math.prod(self._shape)
            self._rows = batch.ids_B.new_empty(0, columns)
        if not len(chosen):  # a rank's share may be padding alone
            return
        maps = {name: upsampled(outputs[name].logits[chosen].float(), mask_BHW).argmax(1) for name in self._networks}
        cells = [*self._coloured(images_BCHW).unbind(1), masks_at(mask_BHW, *self._shape)]
        cells += [masks_at(maps[name], *self._shape) for name in self._networks]
        rows = torch.cat([batch.ids_B[chosen, None], *(each.flatten(1).long() for each in cells)], dim=1)
        self._rows = _smallest(torch.cat([self._rows, rows]))

    def draw(self) -> DrawnSheet | None:
        """Return the picture of the images of all ranks, which all call this; None without an image."""
        if self._rows is None:
            return None
        rows = _smallest(collectives.gather_rows(self._rows))
        cells_NChw = rows[:, 1:].view(len(rows), -1, *self._shape).to(torch.uint8).cpu().numpy()
        images_NhwC, masks_NMhw = cells_NChw[:, :3].transpose(0, 2, 3, 1), cells_NChw[:, 3:]
        cells = [[image, *palette()[masks]] for image, masks in zip(images_NhwC, masks_NMhw, strict=True)]
        classes = tuple(int(value) for value in np.unique(masks_NMhw) if value != IGNORED_VALUE)
        return DrawnSheet(_as_png(cells), ("image", "truth", *self._networks), classes)

    def _coloured(self, images_BCHW: Tensor) -> Tensor:
        """Return normalised images as values of 0 … 255, at the size of a cell."""
        mean_C11, std_C11 = (
            torch.tensor(values, device=images_BCHW.device)[:, None, None]
            for values in (self._config.mean, self._config.std)
        )
        levels_BCHW = 255 * (images_BCHW.float() * std_C11 + mean_C11)
        return F.interpolate(levels_BCHW, self._shape, mode="area").round().clamp(0, 255)


def _smallest(rows: Tensor) -> Tensor:
    return rows[rows[:, 0].argsort()][:_IMAGES]


def _cell_shape(height: int, width: int) -> tuple[int, int]:
    factor = min(1.0, _LONGEST / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def _as_png(cells: list[list[NDArray[np.uint8]]]) -> bytes:
    """Return the cells, uint8 [h, w, 3] each, in rows and columns."""
    # A column is as wide as any other, with half of the gap on either side of its cells.
    padding = ((_GAP // 2, _GAP // 2), (_GAP // 2, _GAP // 2), (0, 0))
    padded = [[np.pad(cell, padding, constant_values=255) for cell in row] for row in cells]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in padded])).save(buffer, "PNG")
    return buffer.getvalue()
