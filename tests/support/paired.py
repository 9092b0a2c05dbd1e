"""Small shards of images with smaller copies: waves of random directions, of several sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shards.copies import PAIRED_CLASSES, encode_pair
from shards.manifest import Manifest, Split, write_manifest
from shards.write import ShardWriter, write_samples


def draw_waves(number: int, width: int, height: int) -> np.ndarray:
    """Return an image, uint8 [H, W, 3], of waves with hard and soft edges."""
    random = np.random.default_rng(number)
    y, x = np.mgrid[:height, :width]
    image = np.zeros((height, width, 3))
    for channel in range(3):
        a, b, c = random.uniform(0.1, 0.9, 3)
        wave = np.sin(a * x + b * y + 9 * c)
        image[..., channel] = 128 + 90 * np.where(wave > 0.3, 1, wave)
    return image.round().clip(0, 255).astype(np.uint8)


def size_of(number: int) -> tuple[int, int]:
    """Return the width and height of an image: three sizes in turn."""
    return ((36, 32), (40, 48), (48, 36))[number % 3]


def write_paired(folder: Path, train: int = 8, val: int = 5, *, scale: int = 2) -> Path:
    """Write shards of drawn images with copies, and return the folder.

    A sample's id is its number: ``draw_waves(id)`` of ``train``, and ``draw_waves(1000 + id)`` of ``val``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"train": _write_split(folder, "train", range(train), scale)}
    if val:
        splits["val"] = _write_split(folder, "val", range(1000, 1000 + val), scale)
    transform = {"scale": scale}
    write_manifest(folder, Manifest("test", "png", PAIRED_CLASSES, transform, splits=splits, task="super_resolution"))
    return folder


def _write_split(folder: Path, name: str, numbers: range, scale: int) -> Split:
    shards, tables, per_shard = [], [], 5
    for start in range(0, len(numbers), per_shard):
        with ShardWriter(folder / f"{name}-{start // per_shard:06d}.tar", "png") as writer:
            for position in range(start, min(start + per_shard, len(numbers))):
                pair = encode_pair(draw_waves(numbers[position], *size_of(position)), scale)
                writer.add(position, 0, pair.data, pair.width, pair.height, low=pair.low)
            shard, table = writer.close()
        shards.append(shard)
        tables.append(table)
    samples, sha256 = write_samples(folder, name, tables)
    sides = int(samples["width"].max()), int(samples["height"].max())
    return Split(name, len(samples), len(samples), tuple(shards), sha256, *sides)
