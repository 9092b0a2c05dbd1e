"""Write Cityscapes as shards of images with masks.

    python shards/prepare_cityscapes.py SOURCE DESTINATION

SOURCE contains ``leftImg8bit/{train,val}/<city>/*_leftImg8bit.png`` and
``gtFine/{train,val}/<city>/*_gtFine_labelIds.png``, as the two archives are unpacked. Of the 34 ids in the masks, 19
are classes of the benchmark, and pixels of the others have no class. The images stay PNG, with every pixel.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a script: Python put this folder, not the root, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.command import Parser, run_main
from shards.manifest import IGNORED_VALUE
from shards.masks import meaning_of_values
from shards.pairs import Endings, find_pairs, prepare_masked
from shards.upright import add_upright_options

CITYSCAPES_CLASSES = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
"""Classes of the benchmark, in the order of their train ids, by the id in a mask."""
_IDS = 34
_ENDINGS = Endings("_leftImg8bit", "_gtFine_labelIds")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    source = options.source
    splits = {
        split: find_pairs(source / "leftImg8bit" / split, source / "gtFine" / split, _ENDINGS)
        for split in ("train", "val")
    }
    changed = dict.fromkeys(range(_IDS), IGNORED_VALUE)
    changed |= {number: label for label, number in enumerate(CITYSCAPES_CLASSES)}
    classes = tuple(CITYSCAPES_CLASSES.values())
    return prepare_masked("prepare_cityscapes", classes, splits, meaning_of_values(len(classes), (), changed), options)


def _parser() -> ArgumentParser:
    parser = Parser(prog="prepare_cityscapes.py", description="Write Cityscapes as shards of images with masks.")
    parser.add_argument("source", type=Path, help="folder with leftImg8bit/ and gtFine/")
    add_upright_options(parser)
    return parser


if __name__ == "__main__":
    run_main(main)
