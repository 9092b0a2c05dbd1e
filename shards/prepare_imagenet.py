"""Write ImageNet, or another data set in one of the common layouts, as shards.

    python shards/prepare_imagenet.py SOURCE DESTINATION

SOURCE contains one of these layouts; either split may be missing:

- ``train/<wnid>/*.JPEG`` and ``val/<wnid>/*.JPEG``,
- the original ``ILSVRC2012_img_train.tar`` and ``ILSVRC2012_img_val.tar`` with the development kit, which are read
  without unpacking,
- one of the other layouts in ``shards/layouts.py``.

DESTINATION gets tars of about 1,250 images, each with DALI's index, a sample table for each split, and
``manifest.json``. The bytes are the same for any ``--jobs``. After an interruption at any moment the same command
continues.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

if not __package__:  # started as a script: Python put this folder, not the root, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.choice import choose, set_aside
from shards.classes import WNID, number_classes
from shards.command import Parser, positive, run_main, share
from shards.ilsvrc import ILSVRC_CLASSES, IMAGENET_COUNTS
from shards.jpeg import Transform
from shards.layouts import ARCHIVE, ImageLocation, Listing, find_splits
from shards.plan import EncodedImage, ImageItem, make_job
from shards.prepare import add_arguments, prepare


@dataclass(frozen=True)
class ImageFiles:
    """A source of images: each split's folder or archive, and the conversion of its images."""

    locations: dict[str, ImageLocation]
    transform: Transform

    def load(self, split: str, item: ImageItem) -> EncodedImage:
        """Return an image, converted. Raises Unusable if the file is not one, ValueError if its size has changed."""
        location = self.locations[split]
        if location.pattern == ARCHIVE:
            path = location.root
            data = os.pread(_descriptor(path, path.stat().st_ino), item.size, item.offset)
        else:
            path = location.path(item.path)
            data = path.read_bytes()
        if len(data) != item.size:
            raise ValueError(f"{path} has changed since it was listed: start again when nothing writes to it")
        return self.transform.apply(data)


@lru_cache
def _descriptor(path: Path, inode: int) -> int:
    # The inode tells two files of the same path apart: a path in /proc names another file once it is used again.
    return os.open(path, os.O_RDONLY)  # stays open until the worker process ends


def prepare_images(
    tool: str,
    classes: Sequence[str],
    items: dict[str, list[ImageItem]],
    locations: dict[str, ImageLocation],
    options: Namespace,
) -> int:
    """Choose and convert images as the options of ``add_image_options`` say, write the shards, return the exit code.

    ``tool`` is the name of the command, for the manifest. Raises like ``prepare``.
    """
    if options.val_share:
        _set_aside(items, locations, options)
    elif "val" not in items:
        print("there is no validation split: training will not validate; give --val-share S to take images from train")
    if options.subset:
        items = {split: choose(each, options.subset, options.seed, split) for split, each in items.items()}
    transform = Transform(options.resize_short, options.max_side, options.quality)
    # Options that are not set must not change the manifest of earlier preparations.
    chosen = {"images_per_split": options.subset} | ({"val_share": options.val_share} if options.val_share else {})
    source = ImageFiles(locations, transform)
    job = make_job(tool, "jpg", classes, items, source, options, asdict(transform), **chosen)
    return prepare(job, options.destination, options)


def find_items(options: Namespace) -> tuple[list[str], dict[str, list[ImageItem]], dict[str, ImageLocation]]:
    """Return the classes, the labelled files of each split, and their locations; print how they were found.

    ``options`` are ``source``, ``val_labels``, ``split`` and ``classes``. Raises ValueError or OSError if the data set
    is damaged or ambiguous.
    """
    found = find_splits(options.source, options.val_labels, options.split)
    used = {split: {file.wnid for file in listing.files} for split, listing in found.items()}
    empty = {split: set(listing.empty) for split, listing in found.items()}
    classes = number_classes(used, empty, options.classes)
    labels = {wnid: label for label, wnid in enumerate(classes)}
    items, locations = {}, {split: listing.location for split, listing in found.items()}
    for split, listing in found.items():
        print(f"{split}: {len(listing.files):,} images of {len(used[split]):,} classes in {listing.description}")
        _compare_with_imagenet(split, listing, len(used[split]))
        items[split] = [ImageItem(file.path, labels[file.wnid], file.size, file.offset) for file in listing.files]
    return classes, items, locations


def _compare_with_imagenet(split: str, listing: Listing, classes: int) -> None:
    """Print a note if a data set looks like ImageNet but is incomplete."""
    is_imagenet = listing.location.pattern == ARCHIVE or classes == ILSVRC_CLASSES
    is_imagenet = is_imagenet and all(WNID.fullmatch(file.wnid) for file in listing.files)
    if is_imagenet and (len(listing.files), classes) != (IMAGENET_COUNTS[split], ILSVRC_CLASSES):
        print(
            f"{split}: this is not the complete ImageNet, "
            f"which has {IMAGENET_COUNTS[split]:,} images of {ILSVRC_CLASSES:,} classes"
        )


def _set_aside(items: dict[str, list[ImageItem]], locations: dict[str, ImageLocation], options: Namespace) -> None:
    """Move a share of the training images to a validation split."""
    if "val" in items:
        raise ValueError(f"--val-share: {options.source} has a validation split already: remove the option")
    items["train"], items["val"] = set_aside(items["train"], options.val_share, options.seed)
    locations["val"] = locations["train"]
    print(f"val: {len(items['val']):,} images of these, {options.val_share:g} of every class (seed {options.seed})")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    return prepare_images("prepare_imagenet", *find_items(options), options)


def _parser() -> ArgumentParser:
    parser = Parser(prog="prepare_imagenet.py", description="Write images in ImageNet's layout as shards.")
    parser.add_argument("source", type=Path, help="folder with train/ and val/, or with the original archives")
    parser.add_argument(
        "--val-labels",
        type=Path,
        metavar="FILE",
        help="classes of validation images without class folders: lines of 'file class', the list of Kaggle or "
        "Tiny-ImageNet, or one wnid per image in order. Default: the list next to the images, or the development kit",
    )
    add_image_options(parser)
    return parser


def add_image_options(parser: ArgumentParser) -> None:
    """Add the destination, and the options of every preparation of image files with classes."""
    parser.add_argument("destination", type=Path, help="folder of the shards, created if missing")
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="classes, one per line, in the order of labels (default: sorted)"
    )
    parser.add_argument(
        "--split",
        choices=("train", "val"),
        help="split of class folders that are in neither train/ nor val/ (default: train)",
    )
    parser.add_argument(
        "--val-share",
        type=share,
        metavar="S",
        help="use this share of every class, such as 0.1, for validation, chosen at random; for a data set without val",
    )
    add_conversion_options(parser, "shrunk images, PNG and CMYK")
    add_arguments(parser)


def add_conversion_options(parser: ArgumentParser, encoded_again: str) -> None:
    """Add the options of size and quality, and of a subset; ``encoded_again`` names the images that become JPEGs."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--resize-short", type=positive, metavar="N", help="shrink the shorter side to N pixels")
    size.add_argument("--max-side", type=positive, metavar="N", help="shrink the longer side to N pixels")
    parser.add_argument(
        "--quality",
        type=int,
        choices=range(1, 101),
        metavar="Q",
        default=95,
        help=f"quality of JPEGs that are encoded again: {encoded_again} (default: %(default)s)",
    )
    parser.add_argument(
        "--subset",
        type=positive,
        metavar="N",
        help="only N images per split, evenly over its classes, with new ids",
    )


if __name__ == "__main__":
    run_main(main)
