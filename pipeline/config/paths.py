"""Print the folders of a recipe's shards, run and teacher's cache, one per line, without slow imports.

    python pipeline/config/paths.py RECIPE [key=value …]

For scripts that need the folders before training begins.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from collections.abc import Sequence
from typing import Any

from pipeline.config.compose import compose, read_source
from pipeline.config.source import RecipeSource
from pipeline.errors import RecipeError, run_script


def main(args: Sequence[str]) -> None:
    """Print ``data.path``, the run folder and ``teacher.cache``, or the run folder again if there is no cache."""
    recipes = [arg for arg in args if "=" not in arg]
    if len(recipes) != 1:
        raise RecipeError("command line: name one recipe; overrides are written key=value")
    source, overrides = read_source(Path(recipes[0]), [arg for arg in args if "=" in arg])
    tree = compose(source, overrides)
    shards = _text(tree, recipes[0], "data", "path")
    if not shards:
        raise RecipeError(f"{recipes[0]}: data.path: this key is required")
    print(shards)
    data = tree.get("data")
    holdout = isinstance(data, dict) and bool(data.get("holdout"))
    folder = default_folder(source, _seed(tree, recipes[0]), holdout)
    folder = _text(tree, recipes[0], "folder") or folder
    print(folder)
    print(_text(tree, recipes[0], "teacher", "cache") or folder)


def _text(tree: Any, file: str, *key: str) -> str | None:
    """Return the text at a key, None if there is none. Raises RecipeError for a number, or for several lines."""
    for part in key:
        tree = tree.get(part) if isinstance(tree, dict) else None
    if tree is None or (isinstance(tree, str) and "\n" not in tree):
        return tree
    raise RecipeError(f"{file}: {'.'.join(key)}: expected one line of text, got {tree!r}; write it in quotes")


def _seed(tree: Any, file: str) -> int:
    """Return the seed. Raises RecipeError if it is invalid, so that a job stops here and not in every task."""
    seed = tree.get("seed", 0)
    # A bool is an int in Python, but ``seed: yes`` is a mistake.
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise RecipeError(f"{file}: seed: expected a whole number from 0 to {2**64 - 1}, got {seed!r}")
    return seed


def default_folder(source: RecipeSource, seed: int, holdout: bool) -> Path:
    """Return the run folder of a recipe that names none, relative to the current folder.

    A run with ``data.holdout`` has its own, so that it stands beside the run that is trained on all images.
    """
    return Path("runs") / source.run_name / f"seed-{seed}{'-holdout' if holdout else ''}"


if __name__ == "__main__":
    run_script(main)
