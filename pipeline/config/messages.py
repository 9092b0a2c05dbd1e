"""Messages for errors in a recipe, one line each: the file, the dotted key, what was given and what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from datetime import date
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.config.compose import Origins
from pipeline.config.schema import find_node, known_keys, model_schema
from pipeline.config.values import location_of
from pipeline.errors import RecipeError


def validation_message(
    error: ValidationError, model: type[BaseModel], tree: dict[str, Any], origins: Origins, file: str
) -> str:
    """Return why ``tree`` is not a valid ``model``; values without an origin are reported under ``file``."""
    found: dict[tuple[str, ...], list[Any]] = {}
    for item in error.errors(include_url=False):
        found.setdefault(_key(item, tree), []).append(item)
    location, errors = next(iter(found.items()))
    where = location_of(location, origins, file) if location else file
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{where}: {_describe_errors(errors, location, model)}{more}"


def check_nulls(model: type[BaseModel], tree: dict[str, Any], origins: Origins, file: str) -> None:
    """Raise RecipeError for a null at a key that ``model`` does not have: it deletes nothing, so it must be a typo."""
    for key in origins:
        section = _section(tree, key[:-1])
        if key[0] == "constants" or section is None or key[-1] in section:
            continue
        if ":" in key[-1]:  # A null deletes a user's own loss, whose name is not a field of any model.
            continue
        known = known_keys(find_node(model_schema(model), key[:-1]))
        if known and key[-1] not in known:
            raise RecipeError(f"{location_of(key, origins, file)}: {_unknown(key[-1], known)}")


def _section(tree: Any, location: Iterable[str]) -> dict[str, Any] | None:
    """Return the mapping at a key, None if there is none."""
    for part in location:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else None


def _key(error: Any, tree: Any) -> tuple[str, ...]:
    """Return the key of an error, without the names of types that pydantic appends for a union."""
    location = tuple(map(str, error["loc"]))
    for depth, part in enumerate(error["loc"]):
        if isinstance(tree, list) and isinstance(part, int):
            tree = tree[part] if part < len(tree) else None
        elif isinstance(tree, dict) and (part in tree or error["type"] == "missing"):
            tree = tree.get(part)
        else:
            return location[:depth]
    return location


def _describe_errors(errors: list[Any], location: tuple[str, ...], model: type[BaseModel]) -> str:
    """Return what is wrong at a key; several errors come from a union, one from each of its types."""
    first = errors[0]
    if first["type"] == "extra_forbidden":
        return _unknown(location[-1], known_keys(find_node(model_schema(model), location[:-1])))
    if first["type"] == "missing":
        return "this key is required"
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    if first["type"] == "string_type" and isinstance(first["input"], (int, float, date)):
        return f"YAML reads {first['input']!r} here; write text in quotes"
    message = ", or ".join(item["msg"].removeprefix("Input ") for item in errors)
    return f"{message}, got {first['input']!r}"


def _unknown(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key; did you mean {near[0]!r}?" if near else f"unknown key; known here are {', '.join(known)}"
