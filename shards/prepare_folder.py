"""Write images of your own, in a folder for each class, as shards.

    python shards/prepare_folder.py SOURCE DESTINATION --val-share 0.1

SOURCE contains a folder for each class with its images, ``<class>/<file>``. Or it is split already, into
``train/<class>/<file>`` and ``val/<class>/<file>``; ``validation``, ``valid`` and ``test`` are other names of ``val``.
Names of classes and files may have any characters of Unicode (UTF-8).

The images are JPEG or PNG, as their contents say. A JPEG keeps its bytes, and a PNG becomes a JPEG. DESTINATION gets
what ``shards/prepare_imagenet.py`` writes, by the same code. After an interruption the same command continues.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a script: Python put this folder, not the root, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.command import Parser, run_main
from shards.prepare_imagenet import add_image_options, find_items, prepare_images


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    return prepare_images("prepare_folder", *find_items(options), options)


def _parser() -> ArgumentParser:
    parser = Parser(prog="prepare_folder.py", description="Write images in a folder for each class as shards.")
    parser.add_argument("source", type=Path, help="folder of class folders, or of train/ and val/ with class folders")
    parser.add_argument(
        "--val-labels",
        type=Path,
        metavar="FILE",
        help="classes of validation images that lie in one folder: lines of 'file class'",
    )
    add_image_options(parser)
    return parser


if __name__ == "__main__":
    run_main(main)
