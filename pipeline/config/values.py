"""Checks of a recipe's values that apply to every section and loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pipeline.config.compose import Origins
from pipeline.errors import RecipeError

Key = tuple[str, ...]

_LARGEST_INT = 10**6
"""Largest whole number in the sections where numbers set memory, threads or loops."""
_BOUNDED = ("losses", "data", "student", "teacher")
_UNBOUNDED = ("seed", "samples", "classes")
"""Keys whose numbers cost no memory or time."""


def check_numbers(tree: dict[str, Any], origins: Origins, file: str) -> None:
    """Raise RecipeError for a number that is not finite, or too large for any machine."""
    for key, value in _values(tree):
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"{location_of(key, origins, file)}: expected a finite number, got {value}")
        bounded = key[0] in _BOUNDED and key[-1] not in _UNBOUNDED
        if bounded and isinstance(value, int) and value > _LARGEST_INT:
            raise RecipeError(f"{location_of(key, origins, file)}: expected at most {_LARGEST_INT:,}, got {value:,}")


def check_switches(tree: dict[str, Any], typed: dict[str, Any], origins: Origins, file: str) -> None:
    """Raise RecipeError where true or false became the number 1 or 0 in the ``typed`` recipe."""
    known = dict(_values(typed))
    for key, value in _values(tree):
        if isinstance(value, bool) and isinstance(known.get(key), (int, float)) and not isinstance(known[key], bool):
            raise RecipeError(f"{location_of(key, origins, file)}: expected a number, got {str(value).lower()}")


def location_of(key: Key, origins: Origins, file: str) -> str:
    """Return the source of the value at a key, and the key, for a message."""
    # A value inside a list or a mapping may have no origin of its own; the nearest section above it has one.
    source = next((origins[key[:n]] for n in range(len(key), 0, -1) if key[:n] in origins), file)
    return f"{source}: {'.'.join(key)}"


def _values(tree: Any, above: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Yield every value that is neither a mapping nor a list, with its key."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _values(value, (*above, str(key)))
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from _values(value, (*above, str(index)))
    else:
        yield above, tree
