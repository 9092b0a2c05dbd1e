"""Which image goes into which shard: everything that is decided before the first image is read.

The sorted files of a split get ids; a seeded permutation deals the ids to shards of equal size. A file that turns out
to be no usable image keeps its id and its place: when, and by which process, it is found out changes nothing.
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
from shards.manifest import Manifest


class ImageItem(NamedTuple):
    """A file of the source: its name in the split, its label and size in bytes, and where it starts in an archive."""

    path: str
    label: int
    size: int
    offset: int = -1


class EncodedImage(NamedTuple):
    """An image as it goes into a shard, its sides in pixels as stored."""

    data: bytes
    width: int
    height: int


class Unusable(Exception):
    """A file that is no image we can use; the text says why, in words that are the same on every run."""


class ImageSource(Protocol):
    """Where images come from. It travels to the worker processes."""

    def load(self, split: str, item: ImageItem) -> EncodedImage:
        """Return an image, or raise Unusable."""
        ...


@dataclass(frozen=True)
class PreparationJob:
    """What to prepare: the manifest without its splits, the files of each split in the order of their ids, a source."""

    header: Manifest
    listings: dict[str, list[ImageItem]]
    source: ImageSource


class ShardTask(NamedTuple):
    """One shard to make, with all that a worker needs."""

    path: Path
    image: str
    split: str
    ids: list[int]
    items: list[ImageItem]
    source: ImageSource
    strict: bool
    record: ShardRecord | None
    """The shard as it was finished before, if it was."""


def make_job(
    tool: str,
    image: str,
    classes: Sequence[str],
    listings: dict[str, list[ImageItem]],
    source: ImageSource,
    options: argparse.Namespace,
    transform: dict[str, Any],
    **plan: Any,
) -> PreparationJob:
    """Sort the listings, so that a place in them is an id, and describe all that the bytes will depend on.

    Raises ValueError for a split without files.
    """
    for split, items in listings.items():
        if not items:
            raise ValueError(f"the source has no files for the split '{split}': add them, or remove its folder")
    listings = {split: sorted(items) for split, items in listings.items()}
    plan |= {
        "seed": options.seed,
        "samples_per_shard": options.samples_per_shard,
        "listing": {split: _listing_sha256(items) for split, items in listings.items()},
    }
    return PreparationJob(Manifest(tool, image, tuple(classes), transform, plan), listings, source)


def permutation(count: int, seed: int, purpose: str) -> np.ndarray:
    """Return a random order of ``count`` things, int64, the same with every version of NumPy."""
    # Of NumPy's generators only the raw bit streams are promised to stay.
    generator = np.random.Philox(key=np.array([seed, zlib.crc32(purpose.encode())], np.uint64))
    return np.argsort(generator.random_raw(count), kind="stable")


def _listing_sha256(items: list[ImageItem]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.path}\0{item.label}\0{item.size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def plan_shards(
    job: PreparationJob, folder: Path, records: Mapping[str, ShardRecord] = {}, *, strict: bool = False
) -> Iterator[ShardTask]:
    """Yield the shards to make, each with its record if it has one."""
    plan = job.header.plan
    for split, items in job.listings.items():
        count = -(-len(items) // plan["samples_per_shard"])
        order = permutation(len(items), plan["seed"], f"{split} shards")
        for number, ids in enumerate(np.array_split(order, count)):
            path = folder / f"{split}-{number:06d}.tar"
            share = [items[place] for place in ids]
            yield ShardTask(
                path, job.header.image, split, ids.tolist(), share, job.source, strict, records.get(path.name)
            )
