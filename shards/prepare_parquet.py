"""Write images from Parquet files of Hugging Face's ``datasets`` as shards.

    python shards/prepare_parquet.py SOURCE DESTINATION

SOURCE contains files such as ``train-00000-of-00002.parquet`` and ``validation-00000-of-00001.parquet``, itself or in
its folder ``data``. A word in their names is their split, or ``--train`` and ``--val`` name them. The images are JPEG
or PNG, as their contents say. A JPEG keeps its bytes, and a PNG becomes a JPEG. Ids follow the sorted names of the
files and the order of their rows.

A Parquet file cannot give one image without reading its neighbours, and shards are shuffled. So all images are first
copied to a file beside DESTINATION, which has no name and ends with this command. Needs the package pyarrow.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO, NamedTuple

if not __package__:  # started as a script: Python put this folder, not the root, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.classes import Label, name_labels, number_classes, number_of
from shards.command import Parser, progress_bar, run_main
from shards.layouts import ARCHIVE, ImageLocation
from shards.manifest import writing
from shards.parquet import ImageTable, open_table, read_table
from shards.plan import ImageItem
from shards.prepare_imagenet import add_image_options, prepare_images
from shards.split_names import add_split_options, assign_splits, print_splits


class Row(NamedTuple):
    """A row of a table: its path in the split, its label, and the size and position of its image in the copy."""

    path: str
    label: Label
    size: int
    offset: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    tables = {
        split: [open_table(path, options.image_column, options.label_column) for path in paths]
        for split, paths in find_files(options).items()
    }
    needed = sum(table.image_bytes for each in tables.values() for table in each)
    with nullcontext() if options.dry_run else _copy_of_images(options.destination, needed) as copy:
        with writing(options.destination.absolute(), 0):
            rows = _unpack(tables, copy)
        classes, numbers = _number_classes(tables, rows, options.classes)
        items = {
            split: [ImageItem(row.path, numbers[row.label], row.size, row.offset) for row in each]
            for split, each in rows.items()
        }
        # The processes that read the copy find it by its descriptor in this one.
        path = Path(f"/proc/{os.getpid()}/fd/{copy.fileno()}") if copy else options.source
        location = ImageLocation(path, ARCHIVE)
        return prepare_images("prepare_parquet", classes, items, dict.fromkeys(items, location), options)


def find_files(options: Namespace) -> dict[str, list[Path]]:
    """Return the Parquet files of each split. Raises FileNotFoundError if there are none."""
    source = options.source
    folder = source / "data" if (source / "data").is_dir() else source
    paths = {path.name: path for path in sorted(folder.glob("*.parquet"))}
    if not paths:
        raise FileNotFoundError(f"{folder} contains no .parquet file: name the folder with train-….parquet")
    splits = assign_splits(list(paths), options.train, options.val)
    print_splits(splits, list(paths))
    return {split: [paths[name] for name in names] for split, names in splits.items()}


@contextmanager
def _copy_of_images(destination: Path, needed: int) -> Iterator[BinaryIO]:
    """Open a file without a name beside the destination, which the disk forgets when this process ends.

    Raises UnwritableFile if there is no room for ``needed`` bytes.
    """
    folder = next(parent for parent in destination.absolute().parents if parent.is_dir())
    with writing(folder / "copy of all images", needed):
        copy = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, closed below
    with copy:
        yield copy


def _unpack(tables: dict[str, list[ImageTable]], copy: BinaryIO | None) -> dict[str, list[Row]]:
    """Return the rows of each split, and append their images to ``copy``."""
    found: dict[str, list[Row]] = {}
    offset = 0
    with progress_bar(sum(table.rows for each in tables.values() for table in each), "unpack") as bar:
        for split, each in tables.items():
            found[split] = []
            for table in each:
                for number, (label, image) in enumerate(read_table(table)):
                    if copy:
                        copy.write(image)
                    found[split].append(Row(f"{table.path.name}/{number:09d}", label, len(image), offset))
                    offset += len(image)
                    bar.update()
    if copy:
        copy.flush()
    return found


def _number_classes(
    tables: dict[str, list[ImageTable]], rows: dict[str, list[Row]], listed: Path | None
) -> tuple[list[str], dict[Label, int]]:
    """Return the class names in their order, and the number of each label.

    The names are those in the files' metadata, or what the labels give; the file ``listed`` gives another order. Raises
    ValueError for a wrong label.
    """
    labels: dict[str, dict[Label, str]] = {}
    for split, each in rows.items():
        labels[split] = {row.label: row.path for row in reversed(each)}
    found = {label for each in labels.values() for label in each}
    described = {table.names: table.path for each in tables.values() for table in each}
    if len(described) > 1:
        first, second = list(described.values())[:2]
        raise ValueError(f"{first} and {second} name different classes: prepare files of one data set")
    names = next(iter(described))
    if not names:
        # A column of text may hold numbers: sorted as names, "10" would come before "2".
        as_numbers = all(isinstance(label, int) or re.fullmatch("[0-9]+", label) for label in found)
        value = {label: int(label) if as_numbers else label for label in found}
        classes = name_labels({s: {value[x]: path for x, path in each.items()} for s, each in labels.items()}, listed)
        numbers = {name: number for number, name in enumerate(classes)}
        return classes, {label: number_of(value[label], numbers) for label in found}
    for label, path in (pair for each in labels.values() for pair in each.items()):
        if not isinstance(label, int) or not 0 <= label < len(names):
            raise ValueError(f"{path} has the label {label}, which is not from 0 to {len(names) - 1:,}")
    if not listed:
        return list(names), {label: int(label) for label in found}
    # The list orders the names that the files give to their labels. As names of the labels it would exchange classes.
    classes = number_classes({"the files' metadata": set(names)}, {}, listed)
    return classes, {label: classes.index(names[int(label)]) for label in found}


def _parser() -> ArgumentParser:
    parser = Parser(prog="prepare_parquet.py", description="Write images from Hugging Face's Parquet files as shards.")
    parser.add_argument("source", type=Path, help="folder with train-….parquet, or with a folder data that has them")
    parser.add_argument("--image-column", metavar="NAME", help="column of the images (default: the only one)")
    parser.add_argument("--label-column", metavar="NAME", help="column of the labels (default: the only one)")
    add_split_options(parser)
    add_image_options(parser)
    return parser


if __name__ == "__main__":
    run_main(main)
