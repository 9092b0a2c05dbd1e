"""Write images that have any number of classes each as shards.

    python shards/prepare_multilabel.py IMAGES DESTINATION --labels train.csv --val-labels val.csv

IMAGES is a folder of images, with or without folders inside. A list of labels is a CSV file with a header, in one of
two forms. Its first column is the image's path in IMAGES:

    file,labels                      file,cat,dog,traffic light
    a/1.jpg,cat;dog                  a/1.jpg,1,1,0
    a/2.jpg,                         a/2.jpg,0,0,0

On the left, the second column contains the names of the image's classes with ``;`` between them (``--separator``
changes it). On the right, there is a column of zeros and ones for each class. Images that no list names are not used.

The images are JPEG or PNG, as their contents say. A JPEG keeps its bytes, and a PNG becomes a JPEG. DESTINATION gets
what ``shards/prepare_imagenet.py`` writes, by the same code, and a table of targets for each split. After an
interruption the same command continues.
"""

from __future__ import annotations

import csv
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if not __package__:  # started as a script: Python put this folder, not the root, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.classes import read_classes
from shards.command import Parser, run_main
from shards.layouts import AS_LISTED, ImageLocation
from shards.plan import ImageItem
from shards.prepare_imagenet import add_image_options, prepare_images


class LabelList(NamedTuple):
    """The classes of each image of a split, by the image's path."""

    path: Path
    classes: dict[str, set[str]]
    columns: tuple[str, ...]
    """Names of the columns of zeros and ones; none in a list of names."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    lists = {"train": read_label_list(options.labels, options.separator)}
    if options.val_labels:
        lists["val"] = read_label_list(options.val_labels, options.separator)
        _check_no_image_twice(lists)
    classes = _find_classes(lists, options.classes)
    items = {split: _items(found, classes, options) for split, found in lists.items()}
    for split, found in items.items():
        count = sum(sum(item.targets or b"") for item in found)
        print(f"{split}: {len(found):,} images, {count / len(found):.2f} of {len(classes):,} classes in an image")
    locations = {split: ImageLocation(options.source, AS_LISTED) for split in lists}
    return prepare_images("prepare_multilabel", classes, items, locations, options)


def read_label_list(path: Path, separator: str) -> LabelList:
    """Return the classes of each image in a CSV file. Raises ValueError, one line, for a line that cannot be read."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), 1) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file of UTF-8 text ({error})") from None
    if len(rows) < 2 or len(rows[0][1]) < 2:
        raise ValueError(f"{path}: expected a header, such as 'file,labels', and a line for each image")
    (_, header), *rows = rows
    columns = tuple(name.strip() for name in header[1:]) if len(header) > 2 else ()
    if len(set(columns)) != len(columns):
        raise ValueError(f"{path}: line 1: two columns have the same name")
    found: dict[str, set[str]] = {}
    for number, (name, *cells) in rows:
        if len(cells) != len(header) - 1:
            expected = f"expected {len(header)} cells as in the header"
            raise ValueError(f"{path}: line {number}: {expected}, got {len(cells) + 1}")
        if name in found:
            raise ValueError(f"{path}: line {number}: {name} is in the list twice")
        found[name] = _of_columns(path, number, columns, cells) if columns else _of_names(cells[0], separator)
    return LabelList(path, found, columns)


def _of_columns(path: Path, number: int, columns: Sequence[str], cells: list[str]) -> set[str]:
    for name, cell in zip(columns, cells, strict=True):
        if cell.strip() not in ("0", "1"):
            raise ValueError(f"{path}: line {number}: {name}: expected 0 or 1, got {cell!r}")
    return {name for name, cell in zip(columns, cells, strict=True) if cell.strip() == "1"}


def _of_names(cell: str, separator: str) -> set[str]:
    return {name.strip() for name in cell.split(separator) if name.strip()}


def _find_classes(lists: dict[str, LabelList], listed: Path | None) -> list[str]:
    """Return the classes in the order of their numbers: of ``listed``, or of the columns, or sorted."""
    used = {name for found in lists.values() for names in found.classes.values() for name in names}
    columns = {name: None for found in lists.values() for name in found.columns}  # keeps their order
    if not any(lists["train"].classes.values()):
        raise ValueError(f"{lists['train'].path}: no image has a class; --separator is the text between two names")
    return read_classes(listed, used) if listed else list(columns) or sorted(used)


def _check_no_image_twice(lists: dict[str, LabelList]) -> None:
    if both := sorted(lists["train"].classes.keys() & lists["val"].classes.keys()):
        raise ValueError(f"{lists['val'].path}: {both[0]} is a training image, too; validate on other images")


def _items(found: LabelList, classes: list[str], options: Namespace) -> list[ImageItem]:
    items = []
    for name, of_image in found.classes.items():
        path = options.source / name
        if not path.is_file() or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{found.path}: there is no image {name} in {options.source}")
        if unknown := sorted(of_image - set(classes)):
            raise ValueError(f"{found.path}: {name}: {unknown[0]!r} is not one of the {len(classes):,} classes")
        targets = bytes(each in of_image for each in classes)
        items.append(ImageItem(name, 0, path.stat().st_size, targets=targets))
    return items


def _parser() -> ArgumentParser:
    parser = Parser(prog="prepare_multilabel.py", description="Write images with any number of classes as shards.")
    parser.add_argument("source", type=Path, help="folder of the images that the lists name")
    parser.add_argument("--labels", type=Path, metavar="FILE", required=True, help="CSV file of the training images")
    parser.add_argument("--val-labels", type=Path, metavar="FILE", help="CSV file of the validation images")
    parser.add_argument(
        "--separator", default=";", metavar="TEXT", help="text between two names of classes (default: %(default)s)"
    )
    add_image_options(parser)
    return parser


if __name__ == "__main__":
    run_main(main)
