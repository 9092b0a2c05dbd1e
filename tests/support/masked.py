"""Small shards of images with masks: plain figures whose colour is their class, and a rim that is ignored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pictures import encode

from shards.manifest import IGNORED_VALUE, Manifest, Split, write_manifest
from shards.masks import encode_mask
from shards.write import ShardWriter, write_samples

PIXEL_CLASSES = ("ground", "box", "disc")
COLOURS_K3 = np.array([[60, 90, 60], [220, 60, 50], [60, 90, 230], [250, 250, 250]], np.uint8)
"""The colour of each class, and the last one of pixels without a class."""


def draw_masked(number: int, width: int = 24, height: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Return an image, uint8 [H, W, 3], and its mask, uint8 [H, W]: a box and a disc somewhere, the disc with a rim."""
    random = np.random.default_rng(number)
    y, x = np.mgrid[:height, :width]
    mask = np.zeros((height, width), np.uint8)
    left, top = random.integers(0, width // 2), random.integers(0, height // 2)
    mask[top : top + height // 3, left : left + width // 3] = 1
    distance = np.hypot(x - random.integers(4, width - 4), y - random.integers(4, height - 4))
    mask[distance < 5] = IGNORED_VALUE
    mask[distance < 4] = 2
    return COLOURS_K3[np.minimum(mask, len(PIXEL_CLASSES))], mask


def write_masked(
    folder: Path, train: int = 8, val: int = 4, *, size: tuple[int, int] = (24, 20), kind: str = "png"
) -> Path:
    """Write shards of drawn images with masks, all of one width and height, and return the folder.

    A sample's id is its number: ``draw_masked(id)`` of ``train``, and ``draw_masked(1000 + id)`` of ``val``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"train": _write_split(folder, "train", range(train), size, kind)}
    if val:
        splits["val"] = _write_split(folder, "val", range(1000, 1000 + val), size, kind)
    write_manifest(folder, Manifest("test", kind, PIXEL_CLASSES, splits=splits, task="segmentation"))
    return folder


def _write_split(folder: Path, name: str, numbers: range, size: tuple[int, int], kind: str) -> Split:
    shards, tables, per_shard = [], [], 5
    for start in range(0, len(numbers), per_shard):
        with ShardWriter(folder / f"{name}-{start // per_shard:06d}.tar", kind) as writer:
            for position in range(start, min(start + per_shard, len(numbers))):
                image, mask = draw_masked(numbers[position], *size)
                data = encode(image, "PNG" if kind == "png" else "JPEG")
                writer.add(position, 0, data, *size, mask=encode_mask(mask))
            shard, table = writer.close()
        shards.append(shard)
        tables.append(table)
    samples, sha256 = write_samples(folder, name, tables)
    return Split(name, len(samples), len(samples), tuple(shards), sha256, *size)
