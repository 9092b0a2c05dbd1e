"""Write images with smaller copies as shards, to train networks that enlarge images.

    python shards/prepare_super_resolution.py SOURCE DESTINATION --scale 2

SOURCE is DIV2K's folder, with ``DIV2K_train_HR`` and ``DIV2K_valid_HR``, or a folder with ``train`` and ``val``. Any
other folder of images has one split: ``--split`` names it, and ``--val-share`` sets some images aside.

The copies are made here by bicubic interpolation, as by MATLAB's ``imresize``; those of a data set are not read. An
image is cut at its right and lower edge to multiples of the scale. ``--part 480 --step 240`` stores overlapping parts
of the training images in place of whole ones.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # started as a script: Python put this folder, not the root, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.choice import set_aside
from shards.command import Parser, positive, run_main, share
from shards.copies import PAIRED_CLASSES, ImagePart, decode_rgb, encode_pair
from shards.jpeg import open_image
from shards.layouts import SUFFIXES, VALIDATION
from shards.manifest import COPY_SCALES
from shards.plan import EncodedImage, ImageItem, Unusable, make_job
from shards.prepare import add_arguments, prepare

_TRAIN, _VAL = ("DIV2K_train_HR", "train"), ("DIV2K_valid_HR", *VALIDATION)


@dataclass(frozen=True)
class PairedFiles:
    """A source of images with smaller copies: each split's folder."""

    folders: dict[str, Path]
    scale: int

    def load(self, split: str, item: ImageItem) -> EncodedImage:
        """Return an image and its copy. Raises Unusable, and ValueError if a file's size has changed."""
        path = self.folders[split] / item.path
        data = path.read_bytes()
        if len(data) != item.size:
            raise ValueError(f"{path} has changed since it was listed: start again when nothing writes to it")
        return encode_pair(decode_rgb(data), self.scale, item.crop)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    _check_parts(options)
    folders = _find_folders(options)
    items = {split: _list_images(folder) for split, folder in folders.items()}
    if options.val_share:
        items["train"], items["val"] = set_aside(items["train"], options.val_share, options.seed)
        folders["val"] = folders["train"]
    for split, each in items.items():
        print(f"{split}: {len(each):,} images in {folders[split]}")
    if options.part and "train" in items:
        items["train"] = [part for item in items["train"] for part in _parts(folders["train"], item, options)]
        print(f"train: {len(items['train']):,} parts of {options.part} × {options.part} pixels")
    transform = {"scale": options.scale, "part": options.part, "step": options.part and options.step}
    source = PairedFiles({split: folder.resolve() for split, folder in folders.items()}, options.scale)
    job = make_job(
        "prepare_super_resolution", "png", PAIRED_CLASSES, items, source, options, transform, task="super_resolution"
    )
    return prepare(job, options.destination, options)


def _find_folders(options: Namespace) -> dict[str, Path]:
    """Return the folder of each split. Raises ValueError or FileNotFoundError where the options do not fit it."""
    source: Path = options.source
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder: name the folder of the images")
    found = {
        split: next((source / name for name in names if (source / name).is_dir()), None)
        for split, names in (("train", _TRAIN), ("val", _VAL))
    }
    folders = {split: folder for split, folder in found.items() if folder}
    if "train" in folders:
        if options.split or options.val_share:
            raise ValueError(f"{source} has the folder {folders['train'].name}: remove --split and --val-share")
        return folders
    if options.split == "val" and options.val_share:
        raise ValueError("--val-share: all images are validation images by --split val: remove one of them")
    return {options.split or "train": source}


def _list_images(folder: Path) -> list[ImageItem]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return [ImageItem(path.relative_to(folder).as_posix(), 0, path.stat().st_size) for path in paths]


def _parts(folder: Path, item: ImageItem, options: Namespace) -> Iterator[ImageItem]:
    """Yield the parts of an image; all of it if it is smaller than one, or if it cannot be read."""
    try:
        width, height = open_image((folder / item.path).read_bytes()).size
    except Unusable:  # it is left out when it is written
        width, height = 0, 0
    corners = [_starts(side // options.scale * options.scale, options) for side in (width, height)]
    for top in corners[1]:
        for left in corners[0]:
            part: ImagePart = (left, top, options.part, options.part)
            yield item._replace(crop=part)
    if not all(corners):
        yield item


def _starts(side: int, options: Namespace) -> list[int]:
    """Return where the parts along a side begin; the last one ends with the side."""
    last = side - options.part
    return [] if last < 0 else [*range(0, last, options.step), last]


def _check_parts(options: Namespace) -> None:
    for name, value in (("part", options.part), ("step", options.step)):
        if value is not None and value % options.scale:
            raise ValueError(f"--{name} {value}: expected a multiple of the scale {options.scale}")
    if (options.part is None) != (options.step is None):
        raise ValueError("--part and --step: give both, such as --part 480 --step 240, or none")


def _parser() -> ArgumentParser:
    parser = Parser(prog="prepare_super_resolution.py", description="Write images with smaller copies as shards.")
    parser.add_argument("source", type=Path, help="folder of images, or of DIV2K")
    parser.add_argument("destination", type=Path, help="folder of the shards, created if missing")
    parser.add_argument(
        "--scale",
        type=int,
        choices=COPY_SCALES,
        required=True,
        help="how many times smaller the copies are",
    )
    parser.add_argument("--part", type=positive, metavar="N", help="store training images as parts of N × N pixels")
    parser.add_argument("--step", type=positive, metavar="N", help="pixels from a part to the next")
    parser.add_argument("--split", choices=("train", "val"), help="the split of a folder of images")
    parser.add_argument(
        "--val-share", type=share, metavar="S", help="use this share, such as 0.1, for validation, chosen at random"
    )
    add_arguments(parser)
    return parser


if __name__ == "__main__":
    run_main(main)
