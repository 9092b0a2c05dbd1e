"""Write COCO, or images with annotations in its format, as shards of images with boxes.

    python shards/prepare_coco.py SOURCE DESTINATION [--skip-empty]

SOURCE has ``annotations/instances_train2017.json`` and ``instances_val2017.json``. The images are in the folders
``train2017`` and ``val2017``, or still in ``train2017.zip`` and ``val2017.zip``, which are read in place. One of the
two splits is enough. ``--train NAME`` and ``--val NAME`` are for other names.

Classes are the categories in the order of their ids, 80 of COCO's. Crowds are kept, and marked as such.
``--skip-empty`` leaves out training images without a box, as is usual; validation always has all images.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

if not __package__:  # started as a script: Python put this folder, not the root, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pydantic import Field, FiniteFloat
from pydantic.dataclasses import dataclass

from shards.annotations import AnnotatedFiles, BoxedSplit, list_boxes, prepare_boxed, print_counts
from shards.command import Parser, run_main
from shards.documents import read_document
from shards.plan import ImageItem
from shards.upright import add_upright_options

_DEFAULTS = {"train": "train2017", "val": "val2017"}


@dataclass(frozen=True)
class CocoImage:
    """An image of a file of annotations."""

    id: int
    file_name: str
    width: Annotated[int, Field(gt=0)]
    height: Annotated[int, Field(gt=0)]


@dataclass(frozen=True)
class CocoCategory:
    """A class; ids need not be consecutive."""

    id: int
    name: str


@dataclass(frozen=True, slots=True)
class CocoObject:
    """An object: its box is left, top, width and height. Without an area it is the box's."""

    image_id: int
    category_id: int
    bbox: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
    area: Annotated[FiniteFloat, Field(ge=0)] | None = None
    iscrowd: Literal[0, 1] = 0

    def row(self, label: int) -> tuple[float, ...]:
        """Return the object as a row of ``shards/boxes.py``."""
        left, top, width, height = self.bbox
        area = max(width, 0) * max(height, 0) if self.area is None else self.area
        return left, top, left + width, top + height, label, self.iscrowd, area


@dataclass(frozen=True)
class CocoFile:
    """A file of annotations, as far as boxes need it."""

    images: list[CocoImage]
    annotations: list[CocoObject]
    categories: Annotated[list[CocoCategory], Field(min_length=1)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    paths = _find_annotations(options.source, {"train": options.train, "val": options.val})
    classes: dict[int, str] = {}
    splits = {}
    for split, (name, path) in paths.items():
        content = read_document(path, CocoFile, "expected images, annotations and categories in COCO's format")
        found = _classes(path, content.categories)
        if classes and found != classes:
            raise ValueError(f"{path}: its categories differ from those of training: give both files the same ones")
        classes = found
        splits[split] = _read_split(split, path, content, [*classes], _find_images(options.source, name))
    return prepare_boxed("prepare_coco", [*classes.values()], splits, options, options.skip_empty)


def _find_annotations(source: Path, given: dict[str, str | None]) -> dict[str, tuple[str, Path]]:
    """Return the name and the file of annotations of each split that there is."""
    found = {}
    for split, name in given.items():
        path = source / "annotations" / f"instances_{name or _DEFAULTS[split]}.json"
        if path.is_file():
            found[split] = (name or _DEFAULTS[split], path)
        elif name:
            raise FileNotFoundError(f"--{split} {name}: there is no {path}")
    if not found:
        wanted = "annotations/instances_train2017.json nor instances_val2017.json"
        raise FileNotFoundError(f"{source} has neither {wanted}: unpack the annotations, or give --train NAME")
    return found


def _classes(path: Path, categories: list[CocoCategory]) -> dict[int, str]:
    """Return the class names by category id, in the order of the ids."""
    found = {each.id: each.name for each in sorted(categories, key=lambda each: each.id)}
    if len(found) < len(categories) or len(set(found.values())) < len(categories):
        raise ValueError(f"{path}: categories: two have the same id or name; give each its own")
    return found


def _find_images(source: Path, name: str) -> AnnotatedFiles:
    for folder in (source / name, source / "images" / name):
        if folder.is_dir():
            return AnnotatedFiles(folder)
    archive = source / f"{name}.zip"
    if archive.is_file():
        return AnnotatedFiles(archive, f"{name}/")
    raise FileNotFoundError(f"{source} has no images of {name}: neither the folder {name} nor {name}.zip")


def _read_split(split: str, path: Path, content: CocoFile, categories: list[int], files: AnnotatedFiles) -> BoxedSplit:
    """Return the images of a file of annotations with their boxes, and print the number of boxes."""
    labels = {number: label for label, number in enumerate(categories)}
    images = {image.id: image for image in content.images}
    if len(images) < len(content.images) or len({image.file_name for image in content.images}) < len(images):
        raise ValueError(f"{path}: images: two have the same id or file_name; give each its own")
    for name in (image.file_name for image in content.images):
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{path}: images: {name!r} is outside of the folder of images; name files inside")
    rows = defaultdict(list)
    for number, each in enumerate(content.annotations):
        if each.category_id not in labels or each.image_id not in images:
            key = "image_id" if each.category_id in labels else "category_id"
            reason = f"no {key[:-3]} has the id {getattr(each, key)}; add it, or take the annotation off"
            raise ValueError(f"{path}: annotations.{number}.{key}: {reason}")
        rows[each.image_id].append(each.row(labels[each.category_id]))
    sizes, counts, items = files.sizes([image.file_name for image in content.images]), Counter[str](), []
    for image in content.images:
        boxes = list_boxes(rows[image.id], image.width, image.height, counts)
        items.append(ImageItem(image.file_name, 0, sizes[image.file_name], boxes=boxes))
    print_counts(split, len(items), counts)
    return BoxedSplit(files, items)


def _parser() -> ArgumentParser:
    parser = Parser(prog="prepare_coco.py", description="Write COCO as shards of images with boxes.")
    parser.add_argument("source", type=Path, help="folder with annotations/ and the images, in folders or zips")
    for split, name in _DEFAULTS.items():
        what = f"name of the {'training' if split == 'train' else 'validation'} images and annotations"
        parser.add_argument(f"--{split}", metavar="NAME", help=f"{what} (default: {name})")
    parser.add_argument("--skip-empty", action="store_true", help="leave out training images without a box")
    add_upright_options(parser)
    return parser


if __name__ == "__main__":
    run_main(main)
