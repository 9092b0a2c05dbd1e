"""Write CIFAR-100 as shards.

    python shards/prepare_cifar.py SOURCE DESTINATION [--train-per-class 100] [--superclasses]

SOURCE is the official ``cifar-100-python.tar.gz``, or the unpacked folder ``cifar-100-python``. Its 50,000 training
images become the split ``train``, its 10,000 test images the split ``val``. An id is the image's row in the official
file; with --train-per-class only the kept rows are counted. Labels are the 100 fine ones in the official order, or the
20 coarse ones with --superclasses. Images are PNGs, which keep every pixel: JPEG would cost three points of accuracy.
"""

from __future__ import annotations

import io
import pickle
import sys
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: Python put this folder, not the root, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from PIL import Image

from shards.archives import DamagedArchive, read_archive
from shards.command import Parser, positive, run_main
from shards.plan import EncodedImage, ImageItem, make_job
from shards.prepare import add_arguments, prepare

FOLDER = "cifar-100-python"
FILES = {"train": "train", "val": "test"}
_SIDE = 32
COMPRESSION = 1
"""PNG compression level. The highest level takes three times as long and saves a tenth."""


class _ArraysOnly(pickle.Unpickler):
    """An unpickler of NumPy arrays that refuses all other classes, as a pickle may run any code."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        # Taken from an array, because the private module of _reconstruct differs between NumPy versions.
        allowed = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}
        if module_name.partition(".")[0] != "numpy" or global_name not in allowed:
            raise pickle.UnpicklingError(f"it contains {module_name}.{global_name}, which is not allowed")
        return allowed[global_name]


@dataclass(frozen=True)
class CifarFiles:
    """The official files of CIFAR-100, as a source of images."""

    source: Path

    def load(self, split: str, item: ImageItem) -> EncodedImage:
        """Return the image of a row, encoded as PNG."""
        # A row has all red values first, then green and blue.
        pixels = _column(self.source, FILES[split], "data")[int(item.path)].reshape(3, _SIDE, _SIDE).transpose(1, 2, 0)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=COMPRESSION)
        return EncodedImage(buffer.getvalue(), _SIDE, _SIDE)


def _column(source: Path, name: str, key: str) -> Any:
    content = _read(source, name)
    if not isinstance(content, dict) or key.encode() not in content:
        raise ValueError(f"{source} is damaged or not CIFAR-100: {name} has no {key}")
    return content[key.encode()]


@lru_cache
def _read(source: Path, name: str) -> Any:
    """Return the contents of one of the official files. Each worker process reads it once."""
    try:
        return _ArraysOnly(io.BytesIO(_content(source, name)), encoding="bytes").load()
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {error.filename}; pass the folder {FOLDER}, or {FOLDER}.tar.gz") from None
    except DamagedArchive:
        raise
    except (pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{source} is damaged or not CIFAR-100: {name}: {error}") from None


def _content(source: Path, name: str) -> bytes:
    if source.is_dir():
        folder = source / FOLDER if (source / FOLDER).is_dir() else source
        return (folder / name).read_bytes()
    return read_archive(source, (name,))[name]


def _class_names(source: Path, kind: str) -> list[str]:
    names = _column(source, "meta", f"{kind}_label_names")
    if not isinstance(names, list) or not all(isinstance(name, bytes) and name.isascii() for name in names):
        raise ValueError(f"{source} is damaged or not CIFAR-100: the {kind}_label_names of meta are not names")
    return [name.decode() for name in names]


def _listing(source: Path, name: str, kind: str, classes: int) -> list[ImageItem]:
    pixels, labels = _column(source, name, "data"), _column(source, name, f"{kind}_labels")
    fits = (
        isinstance(labels, list)
        and all(type(label) is int and 0 <= label < classes for label in labels)
        and isinstance(pixels, np.ndarray)
        and pixels.dtype == np.uint8
        and pixels.shape == (len(labels), 3 * _SIDE * _SIDE)
    )
    if not fits:
        raise ValueError(f"{source} is damaged or not CIFAR-100: {name} does not contain an image for each label")
    return [ImageItem(f"{row:05d}", label, 3 * _SIDE * _SIDE) for row, label in enumerate(labels)]


def _first_of_each_class(listing: list[ImageItem], count: int) -> list[ImageItem]:
    seen = Counter[int]()
    kept = []
    for item in listing:
        seen[item.label] += 1
        if seen[item.label] <= count:
            kept.append(item)
    return kept


def _parser() -> ArgumentParser:
    parser = Parser(prog="prepare_cifar.py", description="Write CIFAR-100 as shards.")
    parser.add_argument("source", type=Path, help=f"the folder {FOLDER}, or {FOLDER}.tar.gz")
    parser.add_argument("destination", type=Path, help="folder of the shards, created if missing")
    parser.add_argument(
        "--train-per-class", type=positive, metavar="N", help="only the first N training images of every class"
    )
    parser.add_argument(
        "--superclasses", action="store_true", help="label the images by the 20 superclasses instead of the 100 classes"
    )
    add_arguments(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    source = options.source.resolve()
    kind = "coarse" if options.superclasses else "fine"
    classes = _class_names(source, kind)
    listings = {split: _listing(source, name, kind, len(classes)) for split, name in FILES.items()}
    if options.train_per_class:
        listings["train"] = _first_of_each_class(listings["train"], options.train_per_class)
    job = make_job("prepare_cifar", "png", classes, listings, CifarFiles(source), options, {})
    return prepare(job, options.destination, options)


if __name__ == "__main__":
    run_main(main)
