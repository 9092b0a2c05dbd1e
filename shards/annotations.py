"""Images and their annotated boxes: checking the boxes, and writing both as shards. All preparations of boxes use it.

A box that reaches beyond its image is clipped. One of which less than a pixel is inside is dropped. Both are counted.
"""

from __future__ import annotations

import zipfile
import zlib
from argparse import Namespace
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shards.boxes import BOX_COLUMNS, BOX_DTYPE
from shards.choice import choose
from shards.jpeg import Transform
from shards.pairs import common_extensions
from shards.plan import EncodedImage, ImageItem, ListedBoxes, Unusable, make_job, printable
from shards.prepare import prepare
from shards.upright import read_upright

_HEAD_BYTES = 4
_CROWD = BOX_COLUMNS.index("crowd")


@dataclass(frozen=True)
class AnnotatedFiles:
    """A folder of images, or a zip, which is read in place; ``folder`` is then the part of its names to leave out."""

    root: Path
    folder: str = ""

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        """Return the sizes of files in bytes. Raises ValueError if some are missing."""
        if self.root.is_file():
            inside = {info.filename: info.file_size for info in _open_zip(self.root).infolist()}
            found = {name: size for name in names if (size := inside.get(self.folder + name)) is not None}
        else:
            found = {name: path.stat().st_size for name in names if (path := self.root / name).is_file()}
        if missing := sorted(set(names) - found.keys()):
            name = printable(missing[0]) + (f", nor {len(missing) - 1:,} more" if len(missing) > 1 else "")
            raise ValueError(f"{self.root} has no image {name}, which annotations name: add it, or take it off them")
        return found

    def read(self, name: str, count: int = -1) -> bytes:
        """Return the contents of a file, or its first bytes."""
        if not self.root.is_file():
            with (self.root / name).open("rb") as file:
                return file.read(count)
        try:
            with _open_zip(self.root).open(self.folder + name) as file:
                return file.read(count)
        except (zipfile.BadZipFile, RuntimeError, EOFError, zlib.error) as error:
            raise ValueError(f"{self.root}: {printable(name)} cannot be read ({error}): download it again") from None


class BoxedSplit(NamedTuple):
    """The images of a split, with their boxes, and the folder or zip that has them."""

    files: AnnotatedFiles
    items: list[ImageItem]


@dataclass(frozen=True)
class BoxedFiles:
    """A source of images with boxes: each split's files, and the conversion of images."""

    files: dict[str, AnnotatedFiles]
    transform: Transform

    def load(self, split: str, item: ImageItem) -> EncodedImage:
        """Return an image and its boxes, converted. Raises Unusable, and ValueError if a file's size has changed."""
        data = self.files[split].read(item.path)
        if len(data) != item.size or item.boxes is None:
            raise ValueError(f"{item.path} has changed since it was listed: start again when nothing writes to it")
        upright = read_upright(data)
        listed, (width, height) = item.boxes, upright.image.size
        if (width, height) != (listed.width, listed.height):
            raise Unusable(f"it is {width}×{height}, but {listed.width}×{listed.height} in its annotation")
        image = upright.stored(self.transform)
        boxes = np.frombuffer(listed.rows, BOX_DTYPE).reshape(-1, len(BOX_COLUMNS))
        return image._replace(boxes=_scaled(boxes, (width, height), (image.width, image.height)))


def list_boxes(rows: Sequence[tuple[float, ...]], width: int, height: int, counts: Counter[str]) -> ListedBoxes:
    """Return annotated boxes, rows of ``shards/boxes.py``, inside of their image; ``counts`` gets what happened."""
    table = np.array(rows, np.float64).reshape(-1, len(BOX_COLUMNS))
    edges = np.clip(table[:, :4], 0, [width, height, width, height])
    # Rounded, because the difference of two coordinates is not exact.
    kept = (np.round(edges[:, 2:] - edges[:, :2], 3) >= 1).all(axis=1)
    counts["clipped"] += int((edges[kept] != table[kept, :4]).any(axis=1).sum())
    counts["dropped"] += int((~kept).sum())
    counts["boxes"] += int(kept.sum())
    counts["empty"] += int(not kept.any())
    return ListedBoxes(width, height, np.concatenate([edges, table[:, 4:]], axis=1)[kept].astype(BOX_DTYPE).tobytes())


def print_counts(split: str, images: int, counts: Counter[str]) -> None:
    """Print how many boxes a split has, and what happened to them."""
    print(
        f"{split}: {counts['boxes']:,} boxes in {images:,} images, {counts['empty']:,} without a box; "
        f"{counts['clipped']:,} clipped to their image, {counts['dropped']:,} dropped outside of it or empty"
    )


def without_empty(items: list[ImageItem]) -> list[ImageItem]:
    """Return the images with a box that is not of a crowd."""
    rows = [np.frombuffer(item.boxes.rows if item.boxes else b"", BOX_DTYPE) for item in items]
    tables = [each.reshape(-1, len(BOX_COLUMNS)) for each in rows]
    return [item for item, table in zip(items, tables, strict=True) if (table[:, _CROWD] == 0).any()]


def prepare_boxed(
    tool: str, classes: Sequence[str], splits: Mapping[str, BoxedSplit], options: Namespace, skip_empty: bool = False
) -> int:
    """Write images with boxes as shards, as the options of ``add_upright_options`` say, and return the exit code.

    ``tool`` is the name of the command, for the manifest. With ``skip_empty`` images without a box are not for
    training. Raises like ``prepare``.
    """
    if "val" not in splits:
        print("there is no validation split: training will not validate")
    items = {split: each.items for split, each in splits.items()}
    if skip_empty and "train" in items:
        count = len(items["train"])
        items["train"] = without_empty(items["train"])
        print(f"train: {count - len(items['train']):,} images without a box are not used")
    if options.subset:
        items = {split: choose(each, options.subset, options.seed, split) for split, each in items.items()}
    transform = Transform(options.resize_short, options.max_side, options.quality)
    files = {split: each.files for split, each in splits.items()}
    heads = (files[split].read(item.path, _HEAD_BYTES) for split, each in items.items() for item in each)
    job = make_job(
        tool,
        common_extensions(heads),
        classes,
        items,
        BoxedFiles(files, transform),
        options,
        asdict(transform),
        task="detection",
        images_per_split=options.subset,
        skip_empty=skip_empty,
    )
    return prepare(job, options.destination, options)


def _scaled(boxes_N7: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Return the boxes of an image of another width and height."""
    if old == new:
        return boxes_N7
    x, y = new[0] / old[0], new[1] / old[1]
    # The crop of rounding errors: no box may reach beyond its image.
    scaled = (boxes_N7 * [x, y, x, y, 1, 1, x * y]).astype(BOX_DTYPE)
    scaled[:, :4] = np.minimum(scaled[:, :4], [*new, *new])
    return scaled


@cache
def _open_zip(path: Path) -> zipfile.ZipFile:
    """Return a zip that stays open, once in a process: its list of files is read only once."""
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a complete zip ({error}): download it again") from None
