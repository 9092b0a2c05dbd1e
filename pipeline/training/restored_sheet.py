"""A picture of the middle of some validation images: bicubic interpolation, what networks restore, and the truth."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.bicubic import bicubic_upscaled
from pipeline.data.config import Config
from pipeline.tasks._high import HIGH
from pipeline.tasks._image_quality import to_pixels
from pipeline.training.image_sheet import (
    LONGEST,
    DrawnSheet,
    cells_as_png,
    choose_images,
    gather_smallest,
    keep_smallest,
    network_columns,
)

_ZOOM = 2
"""Pixels of the picture along each side of an image's pixel."""
_SIDE = LONGEST // _ZOOM
"""Pixels of an image along each side of a cell."""
_WHITE = 255


class RestoredSamples:
    """The images of the smallest ids, which are the same on any number of ranks."""

    def __init__(self, config: Config, *, with_teacher: bool) -> None:
        self._scale = config.upscale
        self._networks = network_columns(with_teacher=with_teacher)
        self._columns = ("bicubic", *self._networks, "truth")
        self._rows: Tensor | None = None

    def watch(self, batch: Batch, outputs: dict[str, Outputs]) -> None:
        """Keep those images of a batch that have smaller ids than the ones before."""
        chosen = choose_images(batch, self._rows)
        if self._rows is None:
            self._rows = batch.ids_B.new_empty(0, 1 + len(self._columns) * 3 * _SIDE**2)
        if not len(chosen):  # a rank's share may be padding alone
            return
        restored = [bicubic_upscaled(batch.images_BCHW[chosen].float(), self._scale)]
        restored += [outputs[name].logits[chosen] for name in self._networks]
        images = [*map(to_pixels, restored), batch.targets[HIGH][chosen]]
        cells = [_middle(image_BCHW.long()).flatten(1) for image_BCHW in images]
        self._rows = keep_smallest(torch.cat([self._rows, torch.cat([batch.ids_B[chosen, None], *cells], dim=1)]))

    def draw(self) -> DrawnSheet | None:
        """Return the picture of the images of all ranks, which all call this; None without an image."""
        if self._rows is None:
            return None
        rows = gather_smallest(self._rows)
        cells = rows.view(len(rows), len(self._columns), 3, _SIDE, _SIDE).permute(0, 1, 3, 4, 2).to(torch.uint8)
        zoomed = cells.repeat_interleave(_ZOOM, 2).repeat_interleave(_ZOOM, 3).cpu().numpy()
        return DrawnSheet("images", cells_as_png([list(row) for row in zoomed]), self._columns, ())


def _middle(images_BCHW: Tensor) -> Tensor:
    """Return the middle of images, padded with white where they are smaller than it."""
    height, width = images_BCHW.shape[2:]
    top, left = (max(side - _SIDE, 0) // 2 for side in (height, width))
    middle_BCHW = images_BCHW[:, :, top : top + _SIDE, left : left + _SIDE]
    padding = (0, max(_SIDE - width, 0), 0, max(_SIDE - height, 0))
    return F.pad(middle_BCHW, padding, value=_WHITE)
