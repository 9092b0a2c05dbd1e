"""Annotations in the XML format of Pascal VOC: the boxes of listed images.

A folder has ``JPEGImages/<name>.jpg``, ``Annotations/<name>.xml`` and lists of names, ``ImageSets/Main/<list>.txt``.
Corners are pixels, counted from 1, and belong to the box. So 1 is taken from left and top edge, as in other tools.
Difficult objects are marked like crowds: they are no targets.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from shards.annotations import AnnotatedFiles, BoxedSplit, list_boxes, print_counts
from shards.classes import number_classes, read_lines
from shards.jpeg import open_image
from shards.layouts import SUFFIXES
from shards.plan import ImageItem, Unusable, printable

_LISTS, _IMAGES, _ANNOTATIONS = "ImageSets/Main", "JPEGImages", "Annotations"
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VocObject(NamedTuple):
    """An object of an annotation: its class, its corners in pixels from 1, and whether it is difficult."""

    name: str
    corners: tuple[float, ...]
    difficult: bool

    def row(self, label: int) -> tuple[float, ...]:
        """Return the object as a row of ``shards/boxes.py``; equal corners are those of an empty box."""
        left, top, right, bottom = self.corners
        left, top = (left - 1 if left < right else right), (top - 1 if top < bottom else bottom)
        return left, top, right, bottom, label, self.difficult, (right - left) * (bottom - top)


class VocImage(NamedTuple):
    """An image, by its path in the source: its size in pixels, and its objects."""

    path: str
    size: tuple[int, int]
    objects: list[VocObject]


def find_boxed_splits(
    source: Path, lists: Mapping[str, Sequence[str]], listed: Path | None
) -> tuple[list[str], dict[str, BoxedSplit]]:
    """Return the classes, and the images of each split with their boxes; print the number of boxes.

    A list is the name of a file in ``ImageSets/Main``; a folder of the source may stand before it, as in
    ``VOC2007/trainval``. The file ``listed`` names the classes in their order; without it they are sorted. Raises
    ValueError or OSError for what is missing or cannot be read.
    """
    splits = {split: [image for name in names for image in _read_list(source, name)] for split, names in lists.items()}
    seen: dict[str, str] = {}
    for split, images in splits.items():
        for image in images:
            if image.path in seen:
                where = (
                    f"in the lists of {seen[image.path]} and {split}" if seen[image.path] != split else "listed twice"
                )
                raise ValueError(f"{source}: {image.path} is {where}: take it off one")
            seen[image.path] = split
    used = {split: {each.name for image in images for each in image.objects} for split, images in splits.items()}
    classes = number_classes(used, {}, listed)
    labels = {name: label for label, name in enumerate(classes)}
    if not classes:
        raise ValueError(f"{source}: no training image has an object: check the lists in {_LISTS}")
    return classes, {split: _split(split, source, images, labels) for split, images in splits.items()}


def _split(split: str, source: Path, images: list[VocImage], labels: dict[str, int]) -> BoxedSplit:
    files, counts, items = AnnotatedFiles(source), Counter[str](), []
    sizes = files.sizes([image.path for image in images])
    for image in images:
        boxes = list_boxes([each.row(labels[each.name]) for each in image.objects], *image.size, counts)
        items.append(ImageItem(image.path, 0, sizes[image.path], boxes=boxes))
    print_counts(split, len(items), counts)
    return BoxedSplit(files, items)


def _read_list(source: Path, name: str) -> list[VocImage]:
    folder, _, file = name.rpartition("/")
    path = source / folder / _LISTS / f"{file}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: name a list in {_LISTS}, such as trainval or VOC2007/trainval")
    return [_read_image(source, folder, each) for each in read_lines(path)]


def _read_image(source: Path, folder: str, name: str) -> VocImage:
    within = Path(folder)
    images = [each for ending in SUFFIXES if (source / (each := within / _IMAGES / f"{name}{ending}")).is_file()]
    if not images:
        raise ValueError(f"{source / within / _IMAGES} has no image {printable(name)}: add it, or take it off the list")
    path = source / within / _ANNOTATIONS / f"{name}.xml"
    try:
        root = ElementTree.parse(path).getroot()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: an image without objects has an annotation without them") from None
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is not XML ({error}): annotate the image again") from None
    size = (_integer(root, "size/width"), _integer(root, "size/height"))
    return VocImage(
        images[0].as_posix(),
        size if min(size) > 0 else _size_of(source / images[0]),
        [_read_object(path, each) for each in root.findall("object")],
    )


def _read_object(path: Path, element: ElementTree.Element) -> VocObject:
    name = (element.findtext("name") or "").strip()
    if not name:
        raise ValueError(f"{path}: an object has no name: give it the name of its class")
    corners = tuple(_corner(path, name, tag, element.findtext(f"bndbox/{tag}")) for tag in _CORNERS)
    return VocObject(name, corners, _integer(element, "difficult") == 1)


def _corner(path: Path, name: str, tag: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path}: {tag} of {name} is {text!r}, not a number: correct the annotation")
    return value


def _integer(element: ElementTree.Element, tag: str) -> int:
    """Return the whole number in an element, 0 if there is none: some tools write no size."""
    text = (element.findtext(tag) or "").strip()
    return int(text) if text.isdecimal() else 0


def _size_of(path: Path) -> tuple[int, int]:
    try:
        return open_image(path.read_bytes()).size
    except Unusable as reason:
        raise ValueError(f"{path} is {reason}, and its annotation has no size: take it off the list") from None
