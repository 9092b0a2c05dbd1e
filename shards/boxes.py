"""Boxes: the objects of an image, as rows of float32.

A row has the left, top, right and bottom edge in pixels of the stored image, the class, crowd, and the object's area.
Classes count from 0. ``crowd`` is 1 for a box around many objects, or around a difficult one. It is no target, and a
detection inside of it is no error. The area is that of the object, which may be smaller than the box.

N is the number of boxes of an image, or of a split.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shards.manifest import MANIFEST_ADVICE

BOX_COLUMNS = ("left", "top", "right", "bottom", "class", "crowd", "area")
"""Columns of a table of boxes."""
BOX_DTYPE = np.dtype("<f4")
_OFFSET_DTYPE = np.dtype("<i8")
_AREA = len(BOX_COLUMNS) - 1
"""The last column, which has a member of its own in a tar."""


def boxes_path(folder: Path, split: str) -> Path:
    """Return the path of a split's table of boxes, which shards for detection have."""
    return Path(folder) / f"{split}.boxes.npy"


def box_offsets_path(folder: Path, split: str) -> Path:
    """Return the path of the table that says which boxes an image has: a row's are between its value and the next."""
    return Path(folder) / f"{split}.boxes.offsets.npy"


def no_boxes() -> np.ndarray:
    """Return the boxes of an image without any, float32 [0, 7]."""
    return np.empty((0, len(BOX_COLUMNS)), BOX_DTYPE)


def encode_boxes(rows_N7: np.ndarray) -> tuple[bytes, bytes]:
    """Return boxes, float32 [N, 7], as a sample's two members: the areas are the second one."""
    if rows_N7.dtype != BOX_DTYPE or rows_N7.ndim != 2 or rows_N7.shape[1] != len(BOX_COLUMNS):
        raise ValueError(f"expected boxes of float32 [N, 7], got {rows_N7.dtype} {list(rows_N7.shape)}")
    return rows_N7[:, :_AREA].tobytes(), rows_N7[:, _AREA].tobytes()


def decode_boxes(boxes: bytes, areas: bytes) -> np.ndarray:
    """Return the boxes in a sample's two members, float32 [N, 7]. Raises ValueError if their sizes do not agree."""
    count, rest = divmod(len(areas), BOX_DTYPE.itemsize)
    if rest or len(boxes) != _AREA * len(areas):
        raise ValueError(f"{len(boxes):,} bytes of boxes and {len(areas):,} bytes of areas are not of the same boxes")
    edges_N6 = np.frombuffer(boxes, BOX_DTYPE).reshape(count, _AREA)
    return np.concatenate([edges_N6, np.frombuffer(areas, BOX_DTYPE)[:, None]], axis=1)


def find_wrong_box(
    rows_N7: np.ndarray, widths_N: np.ndarray | int, heights_N: np.ndarray | int, num_classes: int
) -> tuple[int, str] | None:
    """Return the number of the first invalid box and the reason, None if all are valid.

    ``widths_N`` and ``heights_N`` are the sizes of the boxes' images, or those of their only image.
    """
    left, top, right, bottom, classes, crowd, areas = rows_N7.T
    inside = (left >= 0) & (left < right) & (right <= widths_N) & (top >= 0) & (top < bottom) & (bottom <= heights_N)
    for right_ones, reason in (
        (np.isfinite(rows_N7).all(axis=1), "is not of finite numbers"),
        (inside, "is empty, or not inside of its image"),
        ((classes >= 0) & (classes < num_classes) & (classes % 1 == 0), f"has no class from 0 to {num_classes - 1:,}"),
        ((crowd == 0) | (crowd == 1), "has a crowd that is neither 0 nor 1"),
        (areas >= 0, "has a negative area"),
    ):
        if not right_ones.all():
            return int(right_ones.argmin()), reason
    return None


def load_boxes(path: Path) -> np.ndarray:
    """Return a table of boxes, memory-mapped; its values are not checked. Raises ValueError for any other file."""
    boxes = _load(path, "table of boxes")
    if boxes.dtype != BOX_DTYPE or boxes.ndim != 2 or boxes.shape[1] != len(BOX_COLUMNS):
        raise ValueError(f"{path} is not a table of boxes: {MANIFEST_ADVICE}")
    return boxes


def load_box_offsets(path: Path) -> np.ndarray:
    """Return the table of the boxes' offsets, int64 [N + 1], memory-mapped. Raises ValueError for any other file."""
    offsets = _load(path, "table of offsets")
    if offsets.dtype != _OFFSET_DTYPE or offsets.ndim != 1 or offsets[:1].any() or (np.diff(offsets) < 0).any():
        raise ValueError(f"{path} is not a table of offsets, which begin at 0 and rise: {MANIFEST_ADVICE}")
    return offsets


def box_offsets(boxes: list[np.ndarray]) -> np.ndarray:
    """Return the offsets of the boxes of some images in their table, int64 [images + 1]."""
    return np.cumsum([0, *map(len, boxes)], dtype=_OFFSET_DTYPE)


def _load(path: Path, kind: str) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(path, mode="r")  # reads .npy files only, and refuses pickled objects
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a {kind} ({error}): {MANIFEST_ADVICE}") from None
