"""A picture of some validation images, with their boxes and those that networks find.

B batch, H W pixels of a validation image, h w pixels of the picture's cells, K classes.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.data.config import Config
from pipeline.tasks._boxes import BOXES, CLASSES, CROWD, DETECTIONS, LIKELY, SIZES
from pipeline.tasks._mask_images import palette
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

_LINE = 2
"""Pixels of a box's line."""
_CROWD = -1
"""Stands for a class where the box is of a crowd, and is drawn in grey."""


class BoxSamples:
    """The images of the smallest ids, which are the same on any number of ranks, with boxes in the classes' colours.

    ``config`` are the settings of the validation images. A cell holds images of all buckets. Of what a network finds
    only the likely boxes are drawn, the best on top.
    """

    def __init__(self, config: Config, *, with_teacher: bool) -> None:
        self._config = config
        self._networks = network_columns(with_teacher=with_teacher)
        sides = [max(each) for each in zip(*config.bucket_sizes, strict=True)]
        factor = min(1.0, LONGEST / max(sides))
        self._height, self._width = (round(side * factor) for side in sides)
        self._rows: Tensor | None = None
        """An image's id, the pixels of its cells, and for each class whether it is drawn."""

    def watch(self, batch: Batch, outputs: dict[str, Outputs]) -> None:
        """Keep those images of a batch that have smaller ids than the ones before."""
        classes, rows = outputs["student"].logits.shape[-1], []
        for number in choose_images(batch, self._rows).tolist():
            found = [outputs[name].features[DETECTIONS][number] for name in self._networks]
            boxes = [_objects(batch, number), *map(_likely, found)]
            image_hwC, factor = self._reduced(batch, number)
            cells = [_with_boxes(image_hwC, boxes_N5, factor) for boxes_N5 in boxes]
            drawn_K = np.isin(np.arange(classes), np.concatenate(boxes)[:, 4])
            pixels = [self._centred(cell).ravel() for cell in cells]
            rows.append(np.concatenate([[int(batch.ids_B[number])], *pixels, drawn_K]).astype(np.int64))
        columns = 1 + 3 * (1 + len(self._networks)) * self._height * self._width + classes
        new = torch.from_numpy(np.array(rows, np.int64).reshape(-1, columns)).to(batch.ids_B.device)
        self._rows = keep_smallest(new if self._rows is None else torch.cat([self._rows, new]))

    def draw(self) -> DrawnSheet | None:
        """Return the picture of the images of all ranks, which all call this; None without an image."""
        if self._rows is None:
            return None
        rows = gather_smallest(self._rows).cpu().numpy()
        pixels = (1 + len(self._networks)) * self._height * self._width * 3
        cells = rows[:, :pixels].reshape(len(rows), -1, self._height, self._width, 3).astype(np.uint8)
        classes = tuple(np.flatnonzero(rows[:, pixels:].any(0)).tolist())
        return DrawnSheet("boxes", cells_as_png([*map(list, cells)]), ("truth", *self._networks), classes)

    def _reduced(self, batch: Batch, number: int) -> tuple[NDArray[np.uint8], float]:
        """Return an image without its padding as it fits into a cell, and the factor of its size."""
        height, width = batch.targets[SIZES][number].tolist()
        factor = min(1.0, self._height / height, self._width / width)
        size = [max(1, round(side * factor)) for side in (height, width)]
        levels_1CHW = in_colour(batch.images_BCHW[number, None, :, :height, :width], self._config)
        levels_Chw = F.interpolate(levels_1CHW, size, mode="area")[0].round().clamp(0, 255)
        return levels_Chw.permute(1, 2, 0).to(torch.uint8).cpu().numpy(), factor

    def _centred(self, image_hwC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the image in the middle of a white cell."""
        cell = np.full((self._height, self._width, 3), 255, np.uint8)
        height, width = image_hwC.shape[:2]
        top, left = (self._height - height) // 2, (self._width - width) // 2
        cell[top : top + height, left : left + width] = image_hwC
        return cell


def _objects(batch: Batch, number: int) -> NDArray[np.float64]:
    """Return an image's boxes with their classes, float64 [N, 5]; the class of a crowd is ``_CROWD``."""
    boxes_N4, classes_N, crowd_N = (batch.targets[name][number] for name in (BOXES, CLASSES, CROWD))
    shown_N = torch.where(crowd_N, _CROWD, classes_N)
    boxes_N5 = torch.cat([boxes_N4.double(), shown_N[:, None].double()], dim=1)
    return boxes_N5[classes_N >= 0].cpu().numpy()


def _likely(found_N6: Tensor) -> NDArray[np.float64]:
    """Return likely boxes with their classes, float64 [N, 5], the best last."""
    likely_N6 = found_N6[found_N6[:, 4] >= LIKELY].double().cpu().numpy()
    return likely_N6[np.argsort(likely_N6[:, 4], kind="stable")][:, [0, 1, 2, 3, 5]]


def _with_boxes(image_hwC: NDArray[np.uint8], boxes_N5: NDArray[np.float64], factor: float) -> NDArray[np.uint8]:
    """Return an image with boxes, given in pixels of the image before it was reduced."""
    image = Image.fromarray(image_hwC)
    canvas, colours = ImageDraw.Draw(image), palette().tolist()
    for *edges, label in boxes_N5.tolist():
        left, top, right, bottom = (round(edge * factor) for edge in edges)
        color = tuple(colours[IGNORED_VALUE if label == _CROWD else int(label) % IGNORED_VALUE])
        canvas.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=color, width=_LINE)
    return np.asarray(image)
