"""A picture of some validation images, each with its mask and the masks that networks predict.

B batch, H W pixels of a validation image, h w pixels of the picture's cells.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.data.config import Config
from pipeline.tasks._mask_images import palette
from pipeline.tasks._masks import MASK, masks_at, upsampled
from pipeline.training.image_sheet import (
    LONGEST,
    DrawnSheet,
    cells_as_png,
    choose_images,
    gather_smallest,
    in_colour,
    keep_smallest,
    network_columns,
)
from shards.manifest import IGNORED_VALUE


class MaskSamples:
    """The images of the smallest ids, which are the same on any number of ranks, with their masks.

    ``config`` are the settings of the validation images.
    """

    def __init__(self, config: Config, *, with_teacher: bool) -> None:
        self._config = config
        self._networks = network_columns(with_teacher=with_teacher)
        self._shape: tuple[int, int] = (0, 0)
        self._rows: Tensor | None = None

    def watch(self, batch: Batch, outputs: dict[str, Outputs]) -> None:
        """Keep those images of a batch that have smaller ids than the ones before."""
        chosen = choose_images(batch, self._rows)
        mask_BHW, images_BCHW = batch.targets[MASK][chosen], batch.images_BCHW[chosen]
        if self._rows is None:
            self._shape = _cell_shape(*mask_BHW.shape[1:])
            columns = 1 + (4 + len(self._networks)) * math.prod(self._shape)
            self._rows = batch.ids_B.new_empty(0, columns)
        if not len(chosen):  # a rank's share may be padding alone
            return
        maps = {name: upsampled(outputs[name].logits[chosen].float(), mask_BHW).argmax(1) for name in self._networks}
        levels_BChw = F.interpolate(in_colour(images_BCHW, self._config), self._shape, mode="area")
        cells = [*levels_BChw.round().clamp(0, 255).unbind(1), masks_at(mask_BHW, *self._shape)]
        cells += [masks_at(maps[name], *self._shape) for name in self._networks]
        rows = torch.cat([batch.ids_B[chosen, None], *(each.flatten(1).long() for each in cells)], dim=1)
        self._rows = keep_smallest(torch.cat([self._rows, rows]))

    def draw(self) -> DrawnSheet | None:
        """Return the picture of the images of all ranks, which all call this; None without an image."""
        if self._rows is None:
            return None
        rows = gather_smallest(self._rows)
        cells_NChw = rows.view(len(rows), -1, *self._shape).to(torch.uint8).cpu().numpy()
        images_NhwC, masks_NMhw = cells_NChw[:, :3].transpose(0, 2, 3, 1), cells_NChw[:, 3:]
        cells = [[image, *palette()[masks]] for image, masks in zip(images_NhwC, masks_NMhw, strict=True)]
        classes = tuple(int(value) for value in np.unique(masks_NMhw) if value != IGNORED_VALUE)
        return DrawnSheet("masks", cells_as_png(cells), ("image", "truth", *self._networks), classes)


def _cell_shape(height: int, width: int) -> tuple[int, int]:
    factor = min(1.0, LONGEST / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))
