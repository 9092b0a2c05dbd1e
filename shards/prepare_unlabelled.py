"""Write images without labels as shards, for ``data.unlabelled`` of a recipe.

    python shards/prepare_unlabelled.py SOURCE DESTINATION

SOURCE is a folder of images, with or without folders inside, whose names mean nothing. Every image gets the label −1,
and the shards have no classes.

The images are JPEG or PNG, as their contents say. A JPEG keeps its bytes, and a PNG becomes a JPEG. DESTINATION gets
what ``shards/prepare_imagenet.py`` writes, by the same code, with one split. After an interruption the same command
continues.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

if not __package__:  # started as a script: Python put this folder, not the root, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.choice import choose
from shards.command import Parser, run_main
from shards.jpeg import Transform
from shards.layouts import AS_LISTED, SUFFIXES, ImageLocation
from shards.plan import ImageItem, make_job
from shards.prepare import add_arguments, prepare
from shards.prepare_imagenet import ImageFiles, add_conversion_options
from shards.write import NO_LABEL


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    items = find_images(options.source)
    print(f"train: {len(items):,} images without labels in {options.source}")
    if options.subset:
        items = choose(items, options.subset, options.seed, "train")
    transform = Transform(options.resize_short, options.max_side, options.quality)
    source = ImageFiles({"train": ImageLocation(options.source.resolve(), AS_LISTED)}, transform)
    chosen = {"images_per_split": options.subset}
    job = make_job(
        "prepare_unlabelled",
        "jpg",
        (),
        {"train": items},
        source,
        options,
        asdict(transform),
        task="unlabelled",
        **chosen,
    )
    return prepare(job, options.destination, options)


def find_images(source: Path) -> list[ImageItem]:
    """Return the image files of a folder and of those inside, but hidden ones. Raises OSError if there are none."""
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder: name the folder of the images")
    inside = ((path, path.relative_to(source)) for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    found = [
        ImageItem(relative.as_posix(), NO_LABEL, path.stat().st_size)
        for path, relative in inside
        if path.is_file() and not any(part.startswith(".") for part in relative.parts)
    ]
    if not found:
        raise FileNotFoundError(f"{source} has no images: they end in {', '.join(SUFFIXES)}")
    return found


def _parser() -> ArgumentParser:
    parser = Parser(prog="prepare_unlabelled.py", description="Write images without labels as shards.")
    parser.add_argument("source", type=Path, help="folder of images, with or without folders inside")
    parser.add_argument("destination", type=Path, help="folder of the shards, created if missing")
    add_conversion_options(parser, "shrunk images, PNG and CMYK")
    add_arguments(parser)
    return parser


if __name__ == "__main__":
    run_main(main)
