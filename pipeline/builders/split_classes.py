"""Builds the classes of a split that has fewer classes than the network, other labels, or several accepted ones."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from pipeline.errors import RecipeError
from pipeline.tasks._registry import find_task
from pipeline.training.comparison import SplitClasses
from shards.documents import DamagedFile, read_document
from shards.image_order import image_numbers
from shards.manifest import Manifest
from shards.read import SplitReader

INDEX = "index"
"""Value of ``class_map`` for shards whose class names are the numbers of the network's classes."""


def split_classes(network: Manifest, shards: Manifest, path: str, class_map: str | None) -> SplitClasses:
    """Return the classes of ``shards``, in the folder ``path``, among those of the ``network``.

    Classes are the same if their names are, or by ``class_map``: a file, or ``index``. Logits of other classes are left
    out. Raises RecipeError for a class that the network does not have.
    """
    if class_map is None and shards.classes == network.classes:
        return SplitClasses(network.classes)
    if not find_task(network.task).one_class:
        if class_map is not None:
            raise RecipeError(f"class_map: task: {network.task} needs shards with the network's own classes; remove it")
        raise RecipeError(
            f"data.path: the classes of {path} are not those of the network; task: {network.task} needs them"
        )
    numbers = _numbers_of(network, shards, path, class_map)
    columns = sorted(set(numbers))
    position = {number: index for index, number in enumerate(columns)}
    names = tuple(network.classes[number] for number in columns)
    labels_L = torch.tensor([position[number] for number in numbers])
    return SplitClasses(names, torch.tensor(columns) if len(columns) < network.num_classes else None, labels_L)


def _numbers_of(network: Manifest, shards: Manifest, path: str, class_map: str | None) -> list[int]:
    """Return the network's number of each class of the shards."""
    known = {name: number for number, name in enumerate(network.classes)}
    by_number = {str(number): number for number in range(network.num_classes)}
    if class_map is not None and class_map != INDEX:
        mapped = _read_map(Path(class_map), known, by_number)
        reason = f"has no line in class_map: {class_map}; add it, or prepare {path} without it"
    else:
        mapped = by_number if class_map == INDEX else known
        such = next(iter(mapped))
        reason = f"is none of the network's {len(mapped):,}, such as {such!r}; give class_map=FILE, or class_map=index"
    if missing := [name for name in shards.classes if name not in mapped]:
        more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
        raise RecipeError(f"data.path: the class {missing[0]!r}{more} of {path} {reason}")
    return [mapped[name] for name in shards.classes]


def _read_map(path: Path, known: dict[str, int], by_number: dict[str, int]) -> dict[str, int]:
    """Return the network's number of each name in the first column of a file; the second has a class or its number."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"class_map: {path} cannot be read ({error}); give a file of lines 'folder class'") from None
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = re.split(r"\t", line) if "\t" in line else line.split()
        name, target = (fields[0].strip(), fields[1].strip()) if len(fields) == 2 else ("", "")
        index = known.get(target, by_number.get(target))
        if index is None or found.setdefault(name, index) != index:
            raise RecipeError(
                f"class_map: {path}: line {number}: {line.strip()[:80]!r} is no folder with one of the network's "
                f"{len(known):,} classes, by name or number; separate the two by a tab"
            )
    return found


def accept_real_labels(classes: SplitClasses, reader: SplitReader, path: str, val_labels: str | None) -> SplitClasses:
    """Return the classes with the accepted labels of ImageNet's validation images in a file, such as ReaL's.

    The file is a JSON list with a list of classes for each image, in the order of ``ILSVRC2012_val_00000001``. Its
    classes are positions in the sorted wnids, or the labels if the classes have other names. ``val_labels`` is the file
    of ``image_numbers``. Raises RecipeError if it does not fit the images.
    """
    if classes.labels_L is not None:
        raise RecipeError("real_labels: it is for images with the network's own classes; leave out class_map")
    try:
        accepted = read_document(Path(path), list[list[int]], "download it again")
        numbers = image_numbers(reader, Path(val_labels) if val_labels else None)
    except (DamagedFile, ValueError, OSError) as error:
        raise RecipeError(f"real_labels: {error}") from None
    if (most := int(numbers.max())) > len(accepted):
        raise RecipeError(f"real_labels: {path} has {len(accepted):,} images, and {reader.folder} has image {most:,}")
    names = classes.names
    is_wnid = all(re.fullmatch(r"n\d{8}", name) for name in names)
    order = sorted(range(len(names)), key=names.__getitem__) if is_wnid else list(range(len(names)))
    accepted_NK = torch.zeros(len(numbers), len(names), dtype=torch.bool)
    for image, number in enumerate(numbers.tolist()):
        for label in accepted[number - 1] if number else ():
            if not 0 <= label < len(names):
                raise RecipeError(f"real_labels: {path}: image {number:,} has the class {label} of {len(names):,}")
            accepted_NK[image, order[label]] = True
    if not accepted_NK.any():
        raise RecipeError(f"real_labels: {path} has no label for an image of {reader.folder}")
    return classes._replace(accepted_NK=accepted_NK)
