"""The boxes of a batch's images as targets, after what happens to the images: resized, mirrored, clipped.

Shape suffixes: B images, T boxes of all of them, N boxes of an image at most.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.tasks._boxes import AREAS, BOXES, CLASSES, CROWD, SCALES, SIZES


def box_targets(
    boxes: list[NDArray[np.float32]],
    stored_B2: NDArray[np.int64],
    resized_B2: NDArray[np.int64],
    flips_B: NDArray[np.bool_],
    smallest: float,
) -> dict[str, NDArray[Any]]:
    """Return the targets of images by their name in ``tasks/_boxes.py``.

    ``boxes`` are those of each image: rows of left, top, right, bottom, class, crowd and area, in pixels of the stored
    image. ``stored_B2`` and ``resized_B2`` are (height, width) before and after resizing. Boxes with a side below
    ``smallest`` pixels after it are left out. A batch without any box has N = 1.
    """
    scales_B2 = resized_B2 / stored_B2
    rows_T = np.repeat(np.arange(len(boxes)), [len(each) for each in boxes])
    table_T7 = np.concatenate([np.zeros((0, 7), np.float32), *boxes])
    corners_T4 = moved(table_T7[:, :4], scales_B2[rows_T], resized_B2[rows_T], flips_B[rows_T])
    # Not ``>=``, which would leave out a box that is not a number: it makes the loss not finite, which is told.
    kept_T = ~((corners_T4[:, 2:] - corners_T4[:, :2]) < smallest).any(axis=1)
    rows_T, table_T7, corners_T4 = rows_T[kept_T], table_T7[kept_T], corners_T4[kept_T]
    places_T = np.arange(len(rows_T)) - np.searchsorted(rows_T, rows_T)

    def padded(values_T: NDArray[Any], fill: float, dtype: type) -> NDArray[Any]:
        shape = (len(boxes), int(places_T.max(initial=0)) + 1, *values_T.shape[1:])
        column = np.full(shape, fill, dtype)
        column[rows_T, places_T] = values_T
        return column

    return {
        BOXES: padded(corners_T4, 0, np.float32),
        CLASSES: padded(table_T7[:, 4], -1, np.int64),
        CROWD: padded(table_T7[:, 5] > 0, 0, np.bool_),
        AREAS: padded(table_T7[:, 6], 0, np.float32),
        SIZES: resized_B2,
        SCALES: scales_B2.astype(np.float32),
    }


def moved(
    corners_T4: NDArray[np.float32],
    scales_T2: NDArray[np.float64],
    sides_T2: NDArray[np.int64],
    flips_T: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Return boxes on their resized images: scaled, mirrored where ``flips_T``, and clipped to the image.

    ``scales_T2`` and ``sides_T2`` are along height and width, and corners are left, top, right, bottom.
    """
    left, top, right, bottom = (corners_T4 * scales_T2[:, [1, 0, 1, 0]]).T
    height, width = sides_T2.T
    left, right = np.where(flips_T, width - right, left), np.where(flips_T, width - left, right)
    found = [np.clip(x, 0, side) for x, side in ((left, width), (top, height), (right, width), (bottom, height))]
    return np.stack(found, axis=1)
