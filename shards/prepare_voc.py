"""Write Pascal VOC, or images in its layout, as shards of images with masks or boxes.

    python shards/prepare_voc.py SOURCE DESTINATION [--augmented FOLDER]
    python shards/prepare_voc.py SOURCE DESTINATION --boxes [--train LIST…] [--val LIST…]

SOURCE is ``VOC2012``, or the folder ``VOCdevkit`` with it. The lists ``ImageSets/Segmentation/{train,val}.txt`` name
the images, whose masks are in ``SegmentationClass``. They have palettes, and the indices are the classes: 0 is the
background, and the borders of objects have no class. ``--augmented`` names the masks of the Semantic Boundaries
Dataset, often called ``SegmentationClassAug``: all of them that ``val.txt`` does not name are then training masks.

With ``--boxes`` the images of ``ImageSets/Main`` have the boxes in ``Annotations`` (``shards/voc_boxes.py``), VOC's or
your own. ``--train`` and ``--val`` name its lists. ``VOC2007/trainval VOC2012/trainval`` are those of two folders in
SOURCE.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a script: Python put this folder, not the root, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.annotations import prepare_boxed
from shards.classes import read_lines
from shards.command import Parser, run_main
from shards.masks import meaning_of_values
from shards.pairs import MaskedSplit, find_pairs, prepare_masked
from shards.upright import add_upright_options
from shards.voc_boxes import find_boxed_splits

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_LISTS, _BOX_LISTS = Path("ImageSets/Segmentation"), Path("ImageSets/Main")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    _check_options(options)
    if options.boxes:
        return _prepare_boxes(options)
    source = _find_source(options.source, _LISTS)
    images, masks = source / "JPEGImages", source / "SegmentationClass"
    names = {split: read_lines(source / _LISTS / f"{split}.txt") for split in ("train", "val")}
    splits = {split: find_pairs(images, masks, names=each) for split, each in names.items()}
    if options.augmented:
        splits["train"] = _augmented(images, options.augmented, set(names["val"]))
    meaning = meaning_of_values(len(VOC_CLASSES))
    return prepare_masked("prepare_voc", VOC_CLASSES, splits, meaning, options)


def _check_options(options: Namespace) -> None:
    unused = ["augmented"] if options.boxes else ["train", "val", "classes"]
    if given := [name for name in unused if getattr(options, name)]:
        advice = "remove --boxes" if options.boxes else "give --boxes, too"
        raise ValueError(f"--{given[0]} is for images with {'masks' if options.boxes else 'boxes'}: {advice}")


def _prepare_boxes(options: Namespace) -> int:
    named = any("/" in name for name in [*(options.train or []), *(options.val or [])])
    source = options.source if named else _find_source(options.source, _BOX_LISTS)
    lists = {"train": options.train or ["train"], "val": options.val or ["val"]}
    if not options.val and not (source / _BOX_LISTS / "val.txt").is_file():
        del lists["val"]
    classes, splits = find_boxed_splits(source, lists, options.classes)
    return prepare_boxed("prepare_voc", classes, splits, options)


def _find_source(folder: Path, lists: Path) -> Path:
    for source in (folder, folder / "VOC2012", folder / "VOCdevkit/VOC2012"):
        if (source / lists).is_dir():
            return source
    raise FileNotFoundError(f"{folder} has no {lists}: name the folder VOC2012")


def _augmented(images: Path, masks: Path, val: set[str]) -> MaskedSplit:
    """Return the images with a mask in a folder, without those of validation."""
    names = sorted({path.stem for path in masks.glob("*.png")} - val)
    if not names:
        raise FileNotFoundError(f"--augmented: {masks} has no mask of a training image: name SegmentationClassAug")
    print(f"train: {len(names):,} images with a mask in {masks}")
    return find_pairs(images, masks, names=names)


def _parser() -> ArgumentParser:
    parser = Parser(prog="prepare_voc.py", description="Write Pascal VOC as shards of images with masks or boxes.")
    parser.add_argument("source", type=Path, help="the folder VOC2012, or VOCdevkit")
    parser.add_argument(
        "--augmented", type=Path, metavar="FOLDER", help="masks of the Semantic Boundaries Dataset, for training"
    )
    parser.add_argument("--boxes", action="store_true", help="write the boxes of ImageSets/Main instead of masks")
    for split, what in {"train": "training", "val": "validation"}.items():
        text = f"lists of the {what} images with boxes, such as VOC2007/trainval (default: {split})"
        parser.add_argument(f"--{split}", nargs="+", metavar="LIST", help=text)
    parser.add_argument("--classes", type=Path, metavar="FILE", help="classes of boxes, one per line (default: sorted)")
    add_upright_options(parser)
    return parser


if __name__ == "__main__":
    run_main(main)
