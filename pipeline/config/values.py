"""What no key of a recipe may hold, whatever section or loss it belongs to, with the place where it was said."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pipeline.config.compose import Origins
from pipeline.errors import RecipeError

Key = tuple[str, ...]

_LARGEST_INT = 10**6
"""Of a whole number in the sections that ask for memory, threads or loops by it."""
_BOUNDED = ("losses", "data", "student", "teacher")
_UNBOUNDED = ("seed", "samples", "classes")
"""Keys that ask for nothing."""


def check_numbers(tree: dict[str, Any], origins: Origins, file: str) -> None:
    """Raise RecipeError for a number that is not finite, and for one that no machine has the room for."""
    for key, value in _values(tree):
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"{location_of(key, origins, file)}: expected a finite number, got {value}")
        bounded = key[0] in _BOUNDED and key[-1] not in _UNBOUNDED
        if bounded and isinstance(value, int) and value > _LARGEST_INT:
            raise RecipeError(f"{location_of(key, origins, file)}: expected at most {_LARGEST_INT:,}, got {value:,}")


def check_switches(tree: dict[str, Any], typed: dict[str, Any], origins: Origins, file: str) -> None:
    """Raise RecipeError where true or false was given and became the number 1 or 0 in the ``typed`` recipe."""
    known = dict(_values(typed))
    for key, value in _values(tree):
        if isinstance(value, bool) and isinstance(known.get(key), (int, float)) and not isinstance(known[key], bool):
            raise RecipeError(f"{location_of(key, origins, file)}: expected a number, got {str(value).lower()}")


def location_of(key: Key, origins: Origins, file: str) -> str:
    """Return who said the value at a key, and the key, as a message names them."""
    said = next((origins[key[:n]] for n in range(len(key), 0, -1) if key[:n] in origins), file)
    return f"{said}: {'.'.join(key)}"


def _values(tree: Any, above: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Yield every value that is no mapping and no list, and where it stands."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _values(value, (*above, str(key)))
    elif isinstance(tree, (list, tuple)):
        for place, value in enumerate(tree):
            yield from _values(value, (*above, str(place)))
    else:
        yield above, tree
