"""Buckets: the fixed sizes of batches whose images are of unequal sizes, and how many batches an epoch has.

A size that depended on the other images of a batch would make the pixels of one depend on the number of ranks. The
bucket of an image is a function of its size. Shape suffix: N rows of a sample table.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data import augment
from pipeline.data.config import BUCKET_MULTIPLE, Config
from pipeline.data.holdout import training_images, used_rows
from pipeline.image_size import size_text
from shards.manifest import Manifest
from shards.read import SplitReader


def bucket_numbers(config: Config, samples_N: NDArray) -> NDArray[np.int64]:
    """Return the first bucket that holds each image at its largest, counted from 0, int64 [N]; −1 if none does."""
    sides = augment.keep_ratio(
        samples_N["width"], samples_N["height"], short=max(config.short_sides), long=config.long_side
    )
    holds = (sides[:, None] <= np.asarray(config.bucket_sizes)).all(axis=2)
    return np.where(holds.any(axis=-1), holds.argmax(axis=-1), -1)


def count_batches(buckets_N: NDArray[np.int64], batch: int) -> int:
    """Return the number of complete global batches of ``batch`` images, each of one bucket."""
    return int((np.bincount(buckets_N[buckets_N >= 0]) // batch).sum())


def epoch_batches(config: Config, manifest: Manifest, batch: int) -> int:
    """Return the number of complete global batches in an epoch of the training images of those shards."""
    if config.crop != "keep_ratio":
        return training_images(config.path, manifest, config.holdout) * config.rows_per_image // batch
    reader = SplitReader(Path(config.path), "train", manifest)
    samples = reader.samples[used_rows(reader, config.holdout, "train")]
    return count_batches(bucket_numbers(config, samples), batch)


def canvas(config: Config, samples_N: NDArray) -> tuple[int, int] | None:
    """Return the (height, width) of a batch of those images; None for crops that make images of ``data.size``.

    Raises ValueError if the images are of several buckets.
    """
    if config.crop != "keep_ratio":
        return None
    numbers = np.unique(bucket_numbers(config, samples_N))
    if len(numbers) > 1:
        raise ValueError("data.buckets: images of several buckets cannot be in one batch; give one bucket")
    return config.bucket_sizes[int(numbers[0])]


def check_buckets(config: Config, samples: dict[str, NDArray], batch: int) -> str | None:
    """Return a note if some training images come in no epoch; ``samples`` are those of each split that is read.

    Raises ValueError if an image is larger than every bucket, or if no bucket has a global batch of ``batch`` images.
    """
    buckets = config.bucket_sizes
    for split, rows in samples.items():
        if (outside := bucket_numbers(config, rows) < 0).any():
            raise ValueError(_too_large(config, split, rows[outside]))
    if "train" not in samples:
        return None
    counts = np.bincount(bucket_numbers(config, samples["train"]), minlength=len(buckets))
    if counts.max() < batch:
        raise ValueError(
            f"data.buckets: no bucket has the images of one global batch: {batch}; the fullest, "
            f"{size_text(buckets[counts.argmax()])}, has {counts.max()}; lower batch, or give fewer buckets"
        )
    if never := int(counts[counts < batch].sum()):
        return (
            f"note: data.buckets: {never:,} of {counts.sum():,} training images are in no batch, because their bucket "
            f"has fewer images than a global batch: {batch}"
        )
    return None


def _too_large(config: Config, split: str, samples_N: NDArray) -> str:
    """Return the message about images of a split that are in no bucket."""
    short, long = max(config.short_sides), config.long_side
    sides = augment.keep_ratio(samples_N["width"], samples_N["height"], short=short, long=long)
    number, height, width = (int(samples_N[0][column]) for column in ("id", "height", "width"))
    fit = [-(-side // BUCKET_MULTIPLE) * BUCKET_MULTIPLE for side in sides.max(axis=0).tolist()]
    return (
        f"data.buckets: none holds {len(samples_N):,} images of {split}, such as id {number} of {height} × {width}, "
        f"resized to {size_text(tuple(sides[0].tolist()))}; add {fit}, or lower short or long"
    )
