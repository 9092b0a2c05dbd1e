"""Write the segmentation images of Pascal VOC as shards of images with masks.

    python shards/prepare_voc.py SOURCE DESTINATION [--augmented FOLDER]

SOURCE is ``VOC2012``, or the folder ``VOCdevkit`` with it. The lists ``ImageSets/Segmentation/{train,val}.txt`` name
the images, whose masks are in ``SegmentationClass``. They have palettes, and the indices are the classes: 0 is the
background, and the borders of objects have no class. ``--augmented`` names the masks of the Semantic Boundaries
Dataset, often called ``SegmentationClassAug``: all of them that ``val.txt`` does not name are then training masks.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a script: Python put this folder, not the root, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.classes import read_lines
from shards.command import Parser, run_main
from shards.masks import meaning_of_values
from shards.pairs import MaskedSplit, add_masked_options, find_pairs, prepare_masked

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_LISTS = Path("ImageSets/Segmentation")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    source = _find_source(options.source)
    images, masks = source / "JPEGImages", source / "SegmentationClass"
    names = {split: read_lines(source / _LISTS / f"{split}.txt") for split in ("train", "val")}
    splits = {split: find_pairs(images, masks, names=each) for split, each in names.items()}
    if options.augmented:
        splits["train"] = _augmented(images, options.augmented, set(names["val"]))
    meaning = meaning_of_values(len(VOC_CLASSES))
    return prepare_masked("prepare_voc", VOC_CLASSES, splits, meaning, options)


def _find_source(folder: Path) -> Path:
    for source in (folder, folder / "VOC2012", folder / "VOCdevkit/VOC2012"):
        if (source / _LISTS).is_dir():
            return source
    raise FileNotFoundError(f"{folder} has no {_LISTS}: name the folder VOC2012")


def _augmented(images: Path, masks: Path, val: set[str]) -> MaskedSplit:
    """Return the images with a mask in a folder, without those of validation."""
    names = sorted({path.stem for path in masks.glob("*.png")} - val)
    if not names:
        raise FileNotFoundError(f"--augmented: {masks} has no mask of a training image: name SegmentationClassAug")
    print(f"train: {len(names):,} images with a mask in {masks}")
    return find_pairs(images, masks, names=names)


def _parser() -> ArgumentParser:
    parser = Parser(prog="prepare_voc.py", description="Write Pascal VOC as shards of images with masks.")
    parser.add_argument("source", type=Path, help="the folder VOC2012, or VOCdevkit")
    parser.add_argument(
        "--augmented", type=Path, metavar="FOLDER", help="masks of the Semantic Boundaries Dataset, for training"
    )
    add_masked_options(parser)
    return parser


if __name__ == "__main__":
    run_main(main)
