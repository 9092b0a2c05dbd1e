"""Errors that a user can cause, each with one line that names the file or the key."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1]
"""The folder that holds the packages ``pipeline`` and ``shards``."""
_PACKAGED = SOURCE / "pipeline" / "files"
IS_INSTALLED = _PACKAGED.is_dir()
"""Whether this is an installed wheel, and no checkout."""
ROOT = _PACKAGED if IS_INSTALLED else SOURCE
"""The folder that holds ``configs``, ``launchers`` and ``slurm``: the checkout, or a wheel's copy (``setup.py``)."""

EXIT_USER_ERROR = 2
"""Exit code of a command that has reported, in one line, an error that the user can correct."""


class RecipeError(ValueError):
    """A recipe that cannot be used; the message is one line."""


class AlreadyReported(Exception):
    """A user's error that a child process has already reported in one line."""


class Interrupted(Exception):
    """A command that was stopped before its end; the same command continues it."""


def one_line(error: BaseException, longest: int | None = None) -> str:
    """Return an error's message in one line, cut after ``longest`` characters."""
    return " ".join(str(error).split())[:longest]


def run_script(main: Callable[[Sequence[str]], None]) -> None:
    """Run a script that has no slow imports; a user's error ends in one line and exit code 2."""
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


@contextmanager
def error_context(location: str) -> Iterator[None]:
    """Prefix errors raised inside the context with ``location``, the file or key that they concern."""
    try:
        yield
    except (ValueError, OSError) as error:
        # A RecipeError is a ValueError, too, so nested contexts add up to "file: key: message".
        raise RecipeError(f"{location}: {error}") from error


def display_path(path: Path) -> str:
    """Return the path as messages show it: relative to the project if it is inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
