"""Write ADE20K with its 150 classes as shards of images with masks.

    python shards/prepare_ade20k.py SOURCE DESTINATION

SOURCE is ``ADEChallengeData2016``, with ``images/{training,validation}`` and ``annotations/{training,validation}``. In
its masks 0 marks pixels without a class, and 1 is the first class. So 1 is stored as 0, 2 as 1, and so on.
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
from shards.pairs import find_pairs, prepare_masked
from shards.upright import add_upright_options

ADE20K_CLASSES = (
    *("wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass", "cabinet"),
    *("sidewalk", "person", "earth", "door", "table", "mountain", "plant", "curtain", "chair", "car", "water"),
    *("painting", "sofa", "shelf", "house", "sea", "mirror", "rug", "field", "armchair", "seat", "fence"),
    *("desk", "rock", "wardrobe", "lamp", "bathtub", "railing", "cushion", "base", "box", "column", "signboard"),
    *("chest of drawers", "counter", "sand", "sink", "skyscraper", "fireplace", "refrigerator", "grandstand"),
    *("path", "stairs", "runway", "case", "pool table", "pillow", "screen door", "stairway", "river", "bridge"),
    *("bookcase", "blind", "coffee table", "toilet", "flower", "book", "hill", "bench", "countertop", "stove"),
    *("palm", "kitchen island", "computer", "swivel chair", "boat", "bar", "arcade machine", "hovel", "bus"),
    *("towel", "light", "truck", "tower", "chandelier", "awning", "streetlight", "booth", "television receiver"),
    *("airplane", "dirt track", "apparel", "pole", "land", "bannister", "escalator", "ottoman", "bottle"),
    *("buffet", "poster", "stage", "van", "ship", "fountain", "conveyer belt", "canopy", "washer", "plaything"),
    *("swimming pool", "stool", "barrel", "basket", "waterfall", "tent", "bag", "minibike", "cradle", "oven"),
    *("ball", "food", "step", "tank", "trade name", "microwave", "pot", "animal", "bicycle", "lake"),
    *("dishwasher", "screen", "blanket", "sculpture", "hood", "sconce", "vase", "traffic light", "tray"),
    *("ashcan", "fan", "pier", "crt screen", "plate", "monitor", "bulletin board", "shower", "radiator"),
    *("glass", "clock", "flag"),
)
_FOLDERS = {"train": "training", "val": "validation"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    source = options.source
    splits = {
        split: find_pairs(source / "images" / folder, source / "annotations" / folder)
        for split, folder in _FOLDERS.items()
    }
    changed = {0: IGNORED_VALUE} | {label + 1: label for label in range(len(ADE20K_CLASSES))}
    meaning = meaning_of_values(len(ADE20K_CLASSES), changed=changed)
    return prepare_masked("prepare_ade20k", ADE20K_CLASSES, splits, meaning, options)


def _parser() -> ArgumentParser:
    parser = Parser(prog="prepare_ade20k.py", description="Write ADE20K as shards of images with masks.")
    parser.add_argument("source", type=Path, help="the folder ADEChallengeData2016")
    add_upright_options(parser)
    return parser


if __name__ == "__main__":
    run_main(main)
