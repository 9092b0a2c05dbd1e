"""Draw a small, learnable classification task and write it as shards.

    python shards/prepare_demo.py DESTINATION

The 20 classes are five shapes in four textures (``shards/drawing.py``). The images are JPEGs of 64 × 64 pixels, 5,000
for training and 1,000 for validation, and depend on ``--seed`` alone. This takes about ten seconds. If the folder is
complete, nothing is done.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # started as a script: Python put this folder, not the root, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from PIL import Image

from shards.command import Parser, run_main, up_to
from shards.drawing import DRAWN_CLASSES, draw_image
from shards.jpeg import encode_jpeg
from shards.plan import EncodedImage, ImageItem, make_job
from shards.prepare import add_arguments, prepare

QUALITY = 92
_MAX_SAMPLES = 10**6
"""Limit of images per split, because all are listed in memory before the first is drawn."""


@dataclass(frozen=True)
class Drawings:
    """A source of images that are drawn on demand."""

    side: int
    seed: int

    def load(self, split: str, item: ImageItem) -> EncodedImage:
        """Return a drawn image. Its random numbers depend on the seed, the split and the image's number alone."""
        number = int(item.path.rpartition("/")[2])
        key = np.array([self.seed, 2 * number + (split == "val")], np.uint64)
        drawing = draw_image(DRAWN_CLASSES[item.label], self.side, np.random.Generator(np.random.Philox(key=key)))
        return EncodedImage(encode_jpeg(Image.fromarray(drawing), QUALITY), self.side, self.side)


def _listing(count: int) -> list[ImageItem]:
    # Labels in a cycle, so that all classes have the same number of images, or one more.
    labels = [number % len(DRAWN_CLASSES) for number in range(count)]
    return [ImageItem(f"{DRAWN_CLASSES[label]}/{number:06d}", label, 0) for number, label in enumerate(labels)]


def _parser() -> ArgumentParser:
    parser = Parser(prog="prepare_demo.py", description="Draw a small, learnable classification task as shards.")
    parser.add_argument("destination", type=Path)
    parser.add_argument(
        "--train", type=up_to(_MAX_SAMPLES), default=5000, help="training images (default: %(default)s)"
    )
    parser.add_argument(
        "--val", type=up_to(_MAX_SAMPLES), default=1000, help="validation images (default: %(default)s)"
    )
    parser.add_argument(
        "--size", type=up_to(2**13), default=64, help="side of the images in pixels (default: %(default)s)"
    )
    add_arguments(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    listings = {"train": _listing(options.train), "val": _listing(options.val)}
    transform = {"size": options.size, "quality": QUALITY}
    job = make_job(
        "prepare_demo", "jpg", DRAWN_CLASSES, listings, Drawings(options.size, options.seed), options, transform
    )
    return prepare(job, options.destination, options)


if __name__ == "__main__":
    run_main(main)
