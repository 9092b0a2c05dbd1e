"""Write CamVid as shards of images with masks.

    python shards/prepare_camvid.py SOURCE DESTINATION [--val test]

SOURCE has the layout of the SegNet tutorial: folders ``train``, ``val`` and ``test`` of frames, and ``trainannot``,
``valannot`` and ``testannot`` of masks. There are 11 classes, and the value 11 marks pixels without a class. Published
tables are often of the test frames: ``--val test`` makes them the validation split. With ``--with-val`` the frames of
``val`` are training images, too.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a script: Python put this folder, not the root, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.command import Parser, run_main
from shards.masks import meaning_of_values
from shards.pairs import MaskedSplit, find_pairs, prepare_masked
from shards.upright import add_upright_options

CAMVID_CLASSES = (
    *("sky", "building", "pole", "road", "pavement", "tree", "sign symbol", "fence", "car", "pedestrian", "bicyclist"),
)
_VOID = 11


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    if options.with_val and options.val == "val":
        raise ValueError("--with-val: the frames of val are validation images: give --val test, too")
    splits = {"train": _split(options.source, "train"), "val": _split(options.source, options.val)}
    if options.with_val:
        splits["train"] = _joined(options.source, splits["train"], _split(options.source, "val"))
    meaning = meaning_of_values(len(CAMVID_CLASSES), (_VOID,))
    return prepare_masked("prepare_camvid", CAMVID_CLASSES, splits, meaning, options)


def _split(source: Path, name: str) -> MaskedSplit:
    return find_pairs(source / name, source / f"{name}annot")


def _joined(source: Path, *splits: MaskedSplit) -> MaskedSplit:
    """Return several splits as one, whose paths begin with their folders."""
    items = [
        item._replace(path=f"{each.images.name}/{item.path}", mask=f"{each.masks.name}/{item.mask}")
        for each in splits
        for item in each.items
    ]
    return MaskedSplit(source, source, items)


def _parser() -> ArgumentParser:
    parser = Parser(prog="prepare_camvid.py", description="Write CamVid as shards of images with masks.")
    parser.add_argument("source", type=Path, help="folder with train/, trainannot/, val/, valannot/, …")
    parser.add_argument(
        "--val", choices=("val", "test"), default="val", help="frames for validation (default: %(default)s)"
    )
    parser.add_argument("--with-val", action="store_true", help="train on the frames of val, too; with --val test")
    add_upright_options(parser)
    return parser


if __name__ == "__main__":
    run_main(main)
