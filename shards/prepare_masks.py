"""Write images and masks of your own as shards.

    python shards/prepare_masks.py IMAGES MASKS DESTINATION --classes classes.txt

A mask is a PNG of one byte for each pixel, the class: grey, or with a palette, whose indices count. Pixels of value 255
have no class. ``--classes`` names the classes from 0 on, one on each line.

An image and its mask have the same path in IMAGES and in MASKS. Only the extensions differ, and endings of the names,
which ``--image-suffix`` and ``--mask-suffix`` give.

The splits are the folders ``train`` and ``val`` in both, where there are some. They may also lie above the two folders:
``'data/{split}/images'`` is then IMAGES, and ``'data/{split}/masks'`` is MASKS. Otherwise lists name the images of each
split, a path without extension on each line, or ``--val-share`` sets some aside.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a script: Python put this folder, not the root, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.choice import set_aside
from shards.classes import read_classes, read_lines
from shards.command import Parser, run_main, share
from shards.layouts import SUFFIXES, VALIDATION
from shards.manifest import IGNORED_VALUE
from shards.masks import Meaning, meaning_of_values
from shards.pairs import Endings, MaskedSplit, find_pairs, prepare_masked
from shards.upright import add_upright_options

_SPLIT_OPTIONS = ("train", "val", "val_share")
_SPLIT = "{split}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    classes = read_classes(options.classes, set())
    splits = _find_splits(options)
    if options.val_share:
        splits |= _with_share(splits["train"], options)
    for split, each in splits.items():
        print(f"{split}: {len(each.items):,} images with masks in {each.images} and {each.masks}")
    return prepare_masked("prepare_masks", classes, splits, _meaning(len(classes), options), options)


def _find_splits(options: Namespace) -> dict[str, MaskedSplit]:
    """Return the splits by folders or lists; all images are for training where there are neither."""
    images, masks = options.images, options.masks
    endings = Endings(*map(_without_extension, (options.image_suffix, options.mask_suffix)))
    if _SPLIT in str(images) or (images / "train").is_dir():
        if given := [name for name in _SPLIT_OPTIONS if getattr(options, name)]:
            raise ValueError(f"--{given[0].replace('_', '-')}: {images} has a folder train/ already: remove the option")
        val = next((name for name in (*VALIDATION, "test") if _of_split(images, name).is_dir()), None)
        folders = {"train": "train"} | ({"val": val} if val else {})
        return {
            split: find_pairs(_of_split(images, name), _of_split(masks, name), endings)
            for split, name in folders.items()
        }
    if options.val and not options.train:
        raise ValueError("--val: give --train, too, the list of the training images")
    if not options.train:
        return {"train": find_pairs(images, masks, endings)}
    lists = {"train": options.train} | ({"val": options.val} if options.val else {})
    names = {split: [_without_extension(line) for line in read_lines(path)] for split, path in lists.items()}
    _check_names(names, lists)
    return {split: find_pairs(images, masks, endings, each) for split, each in names.items()}


def _of_split(folder: Path, name: str) -> Path:
    """Return the folder of a split: inside of ``folder``, or in the place that its path leaves for the name."""
    return Path(str(folder).replace(_SPLIT, name)) if _SPLIT in str(folder) else folder / name


def _check_names(names: dict[str, list[str]], lists: dict[str, Path]) -> None:
    for split, each in names.items():
        if len(set(each)) < len(each):
            twice = next(name for name in each if each.count(name) > 1)
            raise ValueError(f"{lists[split]}: {twice} is in the list twice: remove one of the lines")
    if both := sorted(set(names["train"]) & set(names.get("val", []))):
        raise ValueError(f"{lists['val']}: {both[0]} is a training image, too; validate on other images")


def _without_extension(name: str) -> str:
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in SUFFIXES else name


def _with_share(train: MaskedSplit, options: Namespace) -> dict[str, MaskedSplit]:
    """Return the training images without a share, and that share as the validation split."""
    if options.val:
        raise ValueError("--val-share: --val lists the validation images already: remove one of the options")
    kept, val = set_aside(train.items, options.val_share, options.seed)
    return {"train": train._replace(items=kept), "val": train._replace(items=val)}


def _meaning(num_classes: int, options: Namespace) -> Meaning:
    changed = {value: value for value in range(num_classes)}
    if options.reduce_zero_label:
        changed = {0: IGNORED_VALUE} | {value + 1: value for value in range(num_classes)}
    for value, label in options.map:
        if label >= num_classes:
            raise ValueError(f"--map {value}={label}: {options.classes} has {num_classes} classes, from 0 on")
        changed[value] = label
    return meaning_of_values(num_classes, options.ignore, changed)


def _byte(text: str) -> int:
    if not text.isdecimal() or int(text) > IGNORED_VALUE:
        raise ArgumentTypeError(f"expected a value from 0 to 255, got {text!r}")
    return int(text)


def _mapping(text: str) -> tuple[int, int]:
    value, equals, label = text.partition("=")
    if not equals:
        raise ArgumentTypeError(f"expected VALUE=CLASS, such as 255=1, got {text!r}")
    return _byte(value), _byte(label)


def _parser() -> ArgumentParser:
    parser = Parser(prog="prepare_masks.py", description="Write images and masks of your own as shards.")
    parser.add_argument("images", type=Path, help="folder of the images")
    parser.add_argument("masks", type=Path, help="folder of the masks")
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", required=True, help="names of the classes from 0 on, one on each line"
    )
    parser.add_argument("--image-suffix", default="", metavar="TEXT", help="end of the images' names, such as _rgb")
    parser.add_argument("--mask-suffix", default="", metavar="TEXT", help="end of the masks' names, such as _label")
    _add_split_options(parser)
    parser.add_argument(
        "--ignore", type=_byte, nargs="+", default=[], metavar="V", help="more values of pixels without a class"
    )
    parser.add_argument(
        "--reduce-zero-label", action="store_true", help="the value 0 is no class, and 1 is the first class"
    )
    parser.add_argument(
        "--map", type=_mapping, nargs="+", default=[], metavar="V=K", help="values of other classes, such as 255=1"
    )
    add_upright_options(parser)
    return parser


def _add_split_options(parser: ArgumentParser) -> None:
    parser.add_argument("--train", type=Path, metavar="FILE", help="list of the training images")
    parser.add_argument("--val", type=Path, metavar="FILE", help="list of the validation images")
    parser.add_argument(
        "--val-share", type=share, metavar="S", help="use this share, such as 0.1, for validation, chosen at random"
    )


if __name__ == "__main__":
    run_main(main)
