"""Write ImageNet, or any set of images in its layout, as shards.

    python shards/prepare_imagenet.py SOURCE DESTINATION

SOURCE holds ``train/<wnid>/*.JPEG`` and ``val/<wnid>/*.JPEG``, or the original ``ILSVRC2012_img_train.tar`` and
``ILSVRC2012_img_val.tar`` with the development kit, read where they are, never unpacked, or one of the other layouts in
``shards/layouts.py``; either split may be missing.
DESTINATION gets about 1,250 images to a tar, DALI's index beside each, a sample table for each split and
``manifest.json``, the same bytes for any ``--jobs``. Stopped at any moment, the same command goes on where it was.
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
    """The images of each split's folder or archive, and what is to become of them."""

    places: dict[str, ImageLocation]
    transform: Transform

    def load(self, split: str, item: ImageItem) -> EncodedImage:
        """Read an image and transform it; raise Unusable for a file that is none, ValueError for one that changed."""
        place = self.places[split]
        if place.pattern == ARCHIVE:
            path, data = place.root, os.pread(_descriptor(place.root), item.size, item.offset)
        else:
            path = place.path(item.path)
            data = path.read_bytes()
        if len(data) != item.size:
            raise ValueError(f"{path} has changed while it was read: start again when nothing writes to it")
        return self.transform.apply(data)


@lru_cache
def _descriptor(path: Path) -> int:
    return os.open(path, os.O_RDONLY)  # for the life of a worker process


def find_items(options: Namespace) -> tuple[list[str], dict[str, list[ImageItem]], dict[str, ImageLocation]]:
    """Return the classes, the files of each split with their labels, and where they lie; print how they were found.

    Raises ValueError or OSError, one line.
    """
    found = find_splits(options.source, options.val_labels)
    used = {split: {file.wnid for file in each.files} for split, each in found.items()}
    classes = number_classes(used, {split: set(each.empty) for split, each in found.items()}, options.classes)
    labels = {wnid: label for label, wnid in enumerate(classes)}
    listings, places = {}, {split: each.place for split, each in found.items()}
    for split, each in found.items():
        print(f"{split}: {len(each.files):,} images of {len(used[split]):,} classes in {each.description}")
        _compare_with_imagenet(split, each, len(used[split]))
        listings[split] = [ImageItem(file.path, labels[file.wnid], file.size, file.offset) for file in each.files]
    if options.val_share:
        _set_aside(listings, places, options)
    elif "val" not in listings:
        print("there is no validation split: training will not validate, unless --val-share sets some images aside")
    if options.subset:
        listings = {split: choose(items, options.subset, options.seed, split) for split, items in listings.items()}
    return classes, listings, places


def _compare_with_imagenet(split: str, listing: Listing, classes: int) -> None:
    """Print a line where what seems to be ImageNet is not all of it."""
    of_imagenet = listing.place.pattern == ARCHIVE or classes == ILSVRC_CLASSES
    of_imagenet = of_imagenet and all(WNID.fullmatch(file.wnid) for file in listing.files)
    if of_imagenet and (len(listing.files), classes) != (IMAGENET_COUNTS[split], ILSVRC_CLASSES):
        print(
            f"{split}: this is not all of ImageNet, "
            f"which has {IMAGENET_COUNTS[split]:,} images of {ILSVRC_CLASSES:,} classes"
        )


def _set_aside(listings: dict[str, list[ImageItem]], places: dict[str, ImageLocation], options: Namespace) -> None:
    if "val" in listings:
        raise ValueError(f"--val-share: {options.source} has a validation split already: leave it out")
    listings["train"], listings["val"] = set_aside(listings["train"], options.val_share, options.seed)
    places["val"] = places["train"]
    print(f"val: {len(listings['val']):,} images of these, {options.val_share:g} of every class (seed {options.seed})")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    classes, listings, places = find_items(options)
    transform = Transform(options.resize_short, options.max_side, options.quality)
    chosen = {"images_per_split": options.subset} | ({"val_share": options.val_share} if options.val_share else {})
    source = ImageFiles(places, transform)
    job = make_job("prepare_imagenet", "jpg", classes, listings, source, options, asdict(transform), **chosen)
    return prepare(job, options.destination, options)


def _parser() -> ArgumentParser:
    parser = Parser(prog="prepare_imagenet.py", description="Write images in ImageNet's layout as shards.")
    parser.add_argument("source", type=Path, help="folder with train/ and val/, or with the original archives")
    parser.add_argument("destination", type=Path, help="folder of the shards, made if need be")
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="classes, one a line, in the order of labels (default: sorted)"
    )
    parser.add_argument(
        "--val-labels",
        type=Path,
        metavar="FILE",
        help="of validation images without class folders: 'file class' on each line, Kaggle's or Tiny-ImageNet's list, "
        "or the wnid of each image in turn (default: the list that came with them, or the development kit)",
    )
    parser.add_argument(
        "--val-share",
        type=share,
        metavar="S",
        help="set aside this share of every class for validation, as 0.1, at random; for a set without a split",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--resize-short", type=positive, metavar="N", help="shrink the shorter side to N pixels")
    size.add_argument("--max-side", type=positive, metavar="N", help="shrink the longer side to N pixels")
    parser.add_argument(
        "--quality",
        type=int,
        choices=range(1, 101),
        metavar="Q",
        default=95,
        help="of the JPEGs written anew: those shrunk, and what was a PNG or in CMYK (default: %(default)s)",
    )
    parser.add_argument(
        "--subset",
        type=positive,
        metavar="N",
        help="only N images of a split, evenly over its classes, with new ids",
    )
    add_arguments(parser)
    return parser


if __name__ == "__main__":
    run_main(main)
