"""The plan of a preparation: which image goes into which shard, decided before the first image is read.

The sorted files of a split get ids, and a seeded permutation distributes the ids over shards of equal size. A file that
is not a usable image keeps its id and its shard. So the output does not depend on when, or by which process, it is
found.
"""

from __future__ import annotations

import argparse
import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from shards.journal import ShardRecord
from shards.manifest import MOST_MASK_CLASSES, Manifest, ShardTaskName
from shards.write import MAX_LABEL


class ListedBoxes(NamedTuple):
    """The boxes of a source file, and the width and height of the image that they are of, in pixels."""

    width: int
    height: int
    rows: bytes
    """The rows of ``shards/boxes.py``, float32 [n, 7]."""


class ImageItem(NamedTuple):
    """A source file: its path in the split, label, size in bytes, and offset in an archive or −1."""

    path: str
    label: int
    size: int
    offset: int = -1
    targets: bytes | None = None
    """A byte for each class, 1 if the image has it, where it has any number of them; ``label`` is then 0."""
    mask: str = ""
    """Path of the image's mask, where it has one; ``label`` is then 0."""
    mask_size: int = 0
    """Size of the mask's file in bytes."""
    boxes: ListedBoxes | None = None
    """The image's boxes, where it has some and they are known before it is read; ``label`` is then 0."""
    crop: tuple[int, int, int, int] | None = None
    """Left, top, width and height of the part of the image that is stored; None is all of it."""


class EncodedImage(NamedTuple):
    """An image as it is stored in a shard, with its stored width and height in pixels."""

    data: bytes
    width: int
    height: int
    mask: bytes | None = None
    """The encoded mask of the same size, where it has one."""
    boxes: np.ndarray | None = None
    """Its boxes in pixels of the stored image, float32 [n, 7], where it has boxes."""
    low: bytes | None = None
    """The encoded smaller copy, where it has one."""


class Unusable(Exception):
    """A file that is not a usable image; the message gives the reason.

    The manifest records the message, so it must be the same on every run.
    """


class ImageSource(Protocol):
    """A source of images. It is pickled for the worker processes."""

    def load(self, split: str, item: ImageItem) -> EncodedImage:
        """Return an image. Raises Unusable if the file is not one."""
        ...


@dataclass(frozen=True)
class PreparationJob:
    """A preparation: the manifest without its splits, each split's files in the order of their ids, and the source."""

    header: Manifest
    listings: dict[str, list[ImageItem]]
    source: ImageSource


class ShardTask(NamedTuple):
    """A shard to write, with everything that a worker process needs."""

    path: Path
    image: str
    task: ShardTaskName
    split: str
    ids: list[int]
    items: list[ImageItem]
    source: ImageSource
    strict: bool
    record: ShardRecord | None
    """The record of an earlier run that finished this shard, if there is one."""


def make_job(
    tool: str,
    image: str,
    classes: Sequence[str],
    listings: dict[str, list[ImageItem]],
    source: ImageSource,
    options: argparse.Namespace,
    transform: dict[str, Any],
    *,
    task: ShardTaskName = "classification",
    **plan: Any,
) -> PreparationJob:
    """Return the preparation, with sorted listings, so that an index in a listing is an id.

    Its header contains everything that the output's bytes depend on. Raises ValueError for a split without files, for
    too many classes, and for a class whose name no text file can contain.
    """
    check_classes(classes, has_masks=task == "segmentation")
    for split, items in listings.items():
        if not items:
            raise ValueError(f"the source has no files for the split '{split}': add them, or remove its folder")
    listings = {split: sorted(items) for split, items in listings.items()}
    plan |= {
        "seed": options.seed,
        "samples_per_shard": options.samples_per_shard,
        "listing": {split: _listing_sha256(items) for split, items in listings.items()},
    }
    if any(item.targets is not None for items in listings.values() for item in items):
        task = "multilabel"
    return PreparationJob(Manifest(tool, image, tuple(classes), transform, plan, task=task), listings, source)


def check_classes(classes: Sequence[str], *, has_masks: bool) -> None:
    """Raise ValueError for too many classes, and for a name that no text file can contain."""
    if has_masks and len(classes) > MOST_MASK_CLASSES:
        reason = "a mask has one byte for each pixel"
        raise ValueError(f"there are {len(classes):,} classes, but {MOST_MASK_CLASSES} are the most: {reason}")
    if len(classes) > MAX_LABEL + 1:
        advice = "leave some out, or write tars with webdataset and list them with shards/index.py"
        raise ValueError(f"there are {len(classes):,} classes, but {MAX_LABEL + 1:,} are the most: {advice}")
    for name in classes:
        if printable(name) != name:
            raise ValueError(f"the class {printable(name)} has a name that is not UTF-8 text: rename its folder")


def printable(name: str) -> str:
    """Return a file name as text that can be written: Python reads bytes that are not UTF-8 as lone surrogates."""
    return name.encode("utf-8", "backslashreplace").decode()


def permutation(count: int, seed: int, purpose: str) -> np.ndarray:
    """Return a random permutation of ``count`` indices, int64 [count], the same with every version of NumPy."""
    # NumPy only guarantees that the raw bits of its generators stay the same, not its permutations.
    generator = np.random.Philox(key=np.array([seed, zlib.crc32(purpose.encode())], np.uint64))
    return np.argsort(generator.random_raw(count), kind="stable")


def _listing_sha256(items: list[ImageItem]) -> str:
    # Sizes stand for contents here, because reading every file first would take too long.
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.path}\0{item.label}\0{item.size}\n".encode(errors="surrogateescape"))
        digest.update(item.targets or b"")
        if item.mask:
            digest.update(f"{item.mask}\0{item.mask_size}\n".encode(errors="surrogateescape"))
        if item.crop:
            digest.update(f"{item.crop}\n".encode())
        if item.boxes:
            digest.update(f"{item.boxes.width}\0{item.boxes.height}\0{len(item.boxes.rows)}\n".encode())
            digest.update(item.boxes.rows)
    return digest.hexdigest()


def plan_shards(
    job: PreparationJob, folder: Path, records: Mapping[str, ShardRecord] = {}, *, strict: bool = False
) -> Iterator[ShardTask]:
    """Yield the shards to write, each with its record of an earlier run if there is one."""
    plan = job.header.plan
    for split, items in job.listings.items():
        count = -(-len(items) // plan["samples_per_shard"])
        order = permutation(len(items), plan["seed"], f"{split} shards")
        for number, ids in enumerate(np.array_split(order, count)):
            path = folder / f"{split}-{number:06d}.tar"
            shard_items = [items[index] for index in ids]
            yield ShardTask(
                path,
                job.header.image,
                job.header.task,
                split,
                ids.tolist(),
                shard_items,
                job.source,
                strict,
                records.get(path.name),
            )
