"""Small shards of images with boxes: plain rectangles whose colour is their class, on a dark ground."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pictures import encode

from shards.boxes import no_boxes
from shards.manifest import Manifest, Split, write_manifest
from shards.write import ShardWriter, write_boxes, write_samples

BOX_CLASSES = ("red", "green", "blue")
COLOURS_K3 = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220]], np.uint8)
"""The colour of each class."""
GROUND = 20
"""The colour of all other pixels, in all channels."""
_SIZES = ((64, 48), (48, 64), (60, 44))
"""Width and height of images, in turn."""


def draw_boxed(number: int, size: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return an image, uint8 [H, W, 3], and its boxes, float32 [n, 7]: up to three rectangles side by side.

    Their edges are whole numbers. Every fourth image has no box, and every fifth one ends with a box of a crowd.
    """
    width, height = size or _SIZES[number % len(_SIZES)]
    random = np.random.default_rng(number)
    image, rows = np.full((height, width, 3), GROUND, np.uint8), []
    count = 0 if number % 4 == 3 else int(random.integers(1, 4))
    for column in range(count):
        left, right = width * column // 3 + random.integers(1, 4), width * (column + 1) // 3 - random.integers(1, 4)
        top, bottom = random.integers(1, height // 3), random.integers(height // 2, height)
        label = random.integers(len(BOX_CLASSES))
        image[top:bottom, left:right] = COLOURS_K3[label]
        crowd = number % 5 == 4 and column == count - 1
        rows.append((left, top, right, bottom, label, crowd, (right - left) * (bottom - top)))
    return image, np.array(rows, np.float32) if rows else no_boxes()


def write_boxed(
    folder: Path, train: int = 8, val: int = 4, *, size: tuple[int, int] | None = None, kind: str = "png"
) -> Path:
    """Write shards of drawn images with boxes, and return the folder.

    A sample's id is its number: ``draw_boxed(id)`` of ``train``, and ``draw_boxed(1000 + id)`` of ``val``. Without a
    ``size``, width and height, images are of three.
    """
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"train": _write_split(folder, "train", range(train), size, kind)}
    if val:
        splits["val"] = _write_split(folder, "val", range(1000, 1000 + val), size, kind)
    write_manifest(folder, Manifest("test", kind, BOX_CLASSES, splits=splits, task="detection"))
    return folder


def _write_split(folder: Path, name: str, numbers: range, size: tuple[int, int] | None, kind: str) -> Split:
    shards, tables, boxes, per_shard = [], [], [], 5
    for start in range(0, len(numbers), per_shard):
        with ShardWriter(folder / f"{name}-{start // per_shard:06d}.tar", kind) as writer:
            for position in range(start, min(start + per_shard, len(numbers))):
                image, rows = draw_boxed(numbers[position], size)
                data = encode(image, "PNG" if kind == "png" else "JPEG")
                writer.add(position, 0, data, image.shape[1], image.shape[0], boxes=rows)
            boxes += writer.boxes
            shard, table = writer.close()
        shards.append(shard)
        tables.append(table)
    samples, sha256 = write_samples(folder, name, tables)
    sides = (int(samples[side].max()) for side in ("width", "height"))
    digests = dict(zip(("boxes_sha256", "box_offsets_sha256"), write_boxes(folder, name, boxes), strict=True))
    return Split(name, len(samples), len(samples), tuple(shards), sha256, *sides, **digests)
