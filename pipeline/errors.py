"""Errors that a user can cause: one line that says where, the file or the key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class RecipeError(ValueError):
    """A recipe that cannot be used; the message is one line."""


class AlreadyReported(Exception):
    """What a user can mend, which a process that was begun for it has said already, in one line."""


class Interrupted(Exception):
    """What was to be made was told to stop before its end; the same command continues it."""


def one_line(error: BaseException, longest: int | None = None) -> str:
    """Return an error's own words in one line, cut after so many characters."""
    return " ".join(str(error).split())[:longest]


@contextmanager
def error_context(location: str) -> Iterator[None]:
    """Say in front of what a user got wrong inside where it was said: a file or a key."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise RecipeError(f"{location}: {error}") from error


def display_path(path: Path) -> str:
    """Return the path as a message shows it: relative to the project where it lies inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
