"""Draw a small, learnable data set of images with masks or boxes, and write it as shards.

    python shards/prepare_scenes.py DESTINATION [--boxes]

A scene has one to four figures on a background (``shards/scenes.py``). The six classes are the background and five
shapes. With ``--boxes`` the same images have boxes instead of masks, of the five shapes. The images are JPEGs of
96 × 96 pixels. There are 1,600 for training and 400 for validation, which depend on ``--seed`` alone. This takes about
ten seconds. If the folder is complete, nothing is done.
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
from shards.jpeg import encode_jpeg
from shards.masks import encode_mask
from shards.plan import EncodedImage, ImageItem, make_job
from shards.prepare import add_arguments, prepare
from shards.scenes import SCENE_CLASSES, boxes_of, draw_scene

_QUALITY = 92
_MOST_SCENES = 10**6
"""Limit of scenes per split, because all are listed in memory before the first is drawn."""


@dataclass(frozen=True)
class DrawnScenes:
    """A source of scenes that are drawn on demand."""

    side: int
    seed: int
    has_boxes: bool

    def load(self, split: str, item: ImageItem) -> EncodedImage:
        """Return a drawn scene. Its random numbers depend on the seed, the split and the scene's number alone."""
        key = np.array([self.seed, 2 * int(item.path) + (split == "val")], np.uint64)
        scene = draw_scene(self.side, np.random.Generator(np.random.Philox(key=key)))
        image = encode_jpeg(Image.fromarray(scene.image), _QUALITY)
        if self.has_boxes:
            return EncodedImage(image, self.side, self.side, boxes=boxes_of(scene))
        return EncodedImage(image, self.side, self.side, encode_mask(scene.mask))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    counts = {"train": options.train, "val": options.val}
    listings = {split: [ImageItem(f"{number:06d}", 0, 0) for number in range(count)] for split, count in counts.items()}
    source = DrawnScenes(options.size, options.seed, options.boxes)
    classes, task = (SCENE_CLASSES[1:], "detection") if options.boxes else (SCENE_CLASSES, "segmentation")
    transform = {"size": options.size, "quality": _QUALITY}
    job = make_job("prepare_scenes", "jpg", classes, listings, source, options, transform, task=task)
    return prepare(job, options.destination, options)


def _parser() -> ArgumentParser:
    parser = Parser(
        prog="prepare_scenes.py", description="Draw a small, learnable data set of images with masks or boxes."
    )
    parser.add_argument("destination", type=Path)
    parser.add_argument(
        "--train", type=up_to(_MOST_SCENES), default=1600, help="training images (default: %(default)s)"
    )
    parser.add_argument("--val", type=up_to(_MOST_SCENES), default=400, help="validation images (default: %(default)s)")
    parser.add_argument(
        "--size", type=up_to(2**13), default=96, help="side of the images in pixels (default: %(default)s)"
    )
    parser.add_argument("--boxes", action="store_true", help="write the figures' boxes instead of masks")
    add_arguments(parser)
    return parser


if __name__ == "__main__":
    run_main(main)
