"""Small shards of images with smaller copies: waves of random directions, of several sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

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


def assert_same_but_for_rounding(one: list[dict[str, Any]], many: list[dict[str, Any]]) -> None:
    """Compare the journals of a training by one process and by several.

    Ranks add up a batch in another order, which changes the last bit of a float32 number, 1e-7. Several updates make it
    some 1e-6 of a loss, and ten times as much of a gradient. In float64 each loss is compared to 1e-12 elsewhere.
    """
    assert len(one) == len(many)
    for of_one, of_many in zip(one, many, strict=True):
        if "total" in of_one:
            # The training metric is a mean of the ranks' PSNR, the norm that of sums of many products.
            for key, gap in {"psnr": 0.1, "gradient_norm": 1e-4}.items():
                assert of_many.pop(key) == pytest.approx(of_one.pop(key), rel=gap)
        assert of_many == pytest.approx(of_one, rel=1e-5)
