"""Write ImageNet, or any set of images in its layout, as shards.

    python shards/prepare_imagenet.py SOURCE DESTINATION

SOURCE holds ``train/<wnid>/*.JPEG`` and ``val/<wnid>/*.JPEG``, or the original ``ILSVRC2012_img_train.tar`` and
``ILSVRC2012_img_val.tar`` with the development kit, read where they are, never unpacked; either split may be missing.
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

import numpy as np

from shards.command import Parser, positive, run_command
from shards.ilsvrc import ARCHIVES, Found, find_split
from shards.jpeg import Transform
from shards.plan import Encoded, Item, make_job, permutation
from shards.prepare import add_arguments, prepare


@dataclass(frozen=True)
class ImageFiles:
    """The images of a folder or an archive, and what is to become of them."""

    root: Path
    transform: Transform

    def load(self, split: str, item: Item) -> Encoded:
        """Read an image and transform it; raise Unusable for a file that is none."""
        if item.offset < 0:
            data = (self.root / split / item.path).read_bytes()
        else:
            data = os.pread(_descriptor(self.root / ARCHIVES[split]), item.size, item.offset)
        return self.transform.apply(data)


@lru_cache
def _descriptor(path: Path) -> int:
    return os.open(path, os.O_RDONLY)  # for the life of a worker process


def read_classes(path: Path) -> list[str]:
    """Read a list of wnids, the first word of each line; their order is that of the labels."""
    classes = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(set(classes)) != len(classes) or not classes:
        raise ValueError(
            f"{path} names {'a class twice' if classes else 'no class'}: it needs a wnid on each line, once"
        )
    return classes


def classes_of(files: dict[str, list[Found]]) -> list[str]:
    """Return the classes of all splits in the order of their labels, which is alphabetical."""
    return sorted({file.wnid for each in files.values() for file in each})


def list_items(files: list[Found], classes: Sequence[str]) -> list[Item]:
    """Number the classes of a split's files."""
    labels = {wnid: label for label, wnid in enumerate(classes)}
    for file in files:
        if file.wnid not in labels:
            raise ValueError(
                f"{file.path} is of the class {file.wnid}, which the list of --classes lacks: add it there"
            )
    return [Item(file.path, labels[file.wnid], file.size, file.offset) for file in files]


def choose(items: list[Item], count: int, seed: int, split: str) -> list[Item]:
    """Choose ``count`` images of a split at random, as evenly over the classes as they allow."""
    items = sorted(items)  # the folder's own order differs between file systems
    order = permutation(len(items), seed, f"{split} subset")
    labels = np.array([items[place].label for place in order])
    by_class = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[by_class], labels[by_class])
    turn = np.empty_like(by_class)
    turn[by_class] = np.arange(len(items)) - first  # its place among those of its class
    return [items[place] for place in order[np.argsort(turn, kind="stable")][:count]]


def find_items(options: Namespace) -> tuple[list[str], dict[str, list[Item]]]:
    """Return the classes, and the files of each split with their labels. Raises ValueError or OSError, one line."""
    found = {split: find_split(options.source, split, options.val_labels) for split in ARCHIVES}
    files = {split: list(each) for split, each in found.items() if each is not None}
    if not files:
        names = ["train/<wnid>/*.JPEG", "val/<wnid>/*.JPEG", *ARCHIVES.values()]
        raise FileNotFoundError(f"{options.source} has none of {', '.join(names)}")
    classes = read_classes(options.classes) if options.classes else classes_of(files)
    listings = {split: list_items(each, classes) for split, each in files.items()}
    if options.subset:
        listings = {split: choose(items, options.subset, options.seed, split) for split, items in listings.items()}
    return classes, listings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    classes, listings = find_items(options)
    transform = Transform(options.resize_short, options.max_side, options.quality)
    source = ImageFiles(options.source.resolve(), transform)
    subset = {"images_per_split": options.subset}
    job = make_job("prepare_imagenet", "jpg", classes, listings, source, options, asdict(transform), **subset)
    return prepare(job, options.destination, options)


def _parser() -> ArgumentParser:
    parser = Parser(prog="prepare_imagenet.py", description="Write images in ImageNet's layout as shards.")
    parser.add_argument("source", type=Path, help="folder with train/ and val/, or with the original archives")
    parser.add_argument("destination", type=Path, help="folder of the shards, made if need be")
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="wnids, one a line, in the order of their labels (default: sorted)"
    )
    parser.add_argument(
        "--val-labels",
        type=Path,
        metavar="FILE",
        help="instead of the development kit: 'file wnid' on each line, or the wnid of each validation image in turn",
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
    run_command(main)
