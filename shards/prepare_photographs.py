"""Write the project's own photographs as shards of super-resolution, for its demo.

    python shards/prepare_photographs.py DESTINATION [--scale 2]

``shards/photographs`` has twelve photographs of 299 × 299 pixels, eight to train on and four to measure with. Their
authors and licences are in ``images.csv`` there. This takes about a second.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a script: Python put this folder, not the root, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards import prepare_super_resolution
from shards.command import Parser, run_main
from shards.manifest import COPY_SCALES

PHOTOGRAPHS = Path(__file__).resolve().parent / "photographs"
"""Folder of the photographs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    return prepare_super_resolution.main([str(PHOTOGRAPHS), str(options.destination), "--scale", str(options.scale)])


def _parser() -> Parser:
    parser = Parser(prog="prepare_photographs.py", description="Write the project's own photographs as shards.")
    parser.add_argument("destination", type=Path, help="folder of the shards, created if missing")
    parser.add_argument(
        "--scale",
        type=int,
        choices=COPY_SCALES,
        default=2,
        help="how many times smaller the copies are (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    run_main(main)
