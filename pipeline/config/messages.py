"""One line for what is wrong in a recipe: where it was said, the dotted key, given and expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from datetime import date
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from pipeline.config.compose import Origins
from pipeline.config.values import said_at
from pipeline.losses._registry import LossSpec, find_loss


def validation_message(
    error: ValidationError, kind: type[BaseModel], tree: dict[str, Any], origins: Origins, file: str
) -> str:
    """Return what is wrong with ``tree``, which is no ``kind``; ``file`` is named where nobody said the value."""
    found: dict[tuple[str, ...], list[Any]] = {}
    for each in error.errors(include_url=False):
        found.setdefault(_key(each, tree), []).append(each)
    location, errors = next(iter(found.items()))
    where = said_at(location, origins, file) if location else file
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{where}: {_explained(errors, location, kind)}{more}"


def _key(error: Any, tree: Any) -> tuple[str, ...]:
    """Return the key that an error is about, without the names that pydantic gives to what may stand there."""
    location = tuple(map(str, error["loc"]))
    for depth, part in enumerate(error["loc"]):
        if isinstance(tree, list) and isinstance(part, int):
            tree = tree[part] if part < len(tree) else None
        elif isinstance(tree, dict) and (part in tree or error["type"] == "missing"):
            tree = tree.get(part)
        else:
            return location[:depth]
    return location


def _explained(errors: list[Any], location: tuple[str, ...], kind: type[BaseModel]) -> str:
    """Return what is wrong at a key; of several errors each is about another thing that might have stood there."""
    first = errors[0]
    if first["type"] == "extra_forbidden":
        known = sorted(_known_keys(kind, location[:-1]))
        near = difflib.get_close_matches(location[-1], known, n=1)
        return f"unknown key; did you mean {near[0]!r}?" if near else f"unknown key; known here are {', '.join(known)}"
    if first["type"] == "missing":
        return "this key is required"
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    if first["type"] == "string_type" and isinstance(first["input"], (int, float, date)):
        return f"YAML reads {first['input']!r} here; write text in quotes"
    message = ", or ".join(each["msg"].removeprefix("Input ") for each in errors)
    return f"{message}, got {first['input']!r}"


def _known_keys(kind: type[BaseModel], location: Iterable[str]) -> list[str]:
    """Return the keys that may stand in the section at ``location`` of a ``kind``."""
    section: Any = kind
    for part in location:
        if part.isdecimal():  # a place in a list, whose sections are all alike
            continue
        if section is LossSpec:  # what stands here is the name of a loss
            section = find_loss(part).Config
            continue
        annotation = section.model_fields[part].annotation
        candidates = [each for each in (annotation, *_unpacked(annotation)) if isinstance(each, type)]
        section = next(each for each in candidates if each is LossSpec or issubclass(each, BaseModel))
    return [field.alias or name for name, field in section.model_fields.items()]


def _unpacked(annotation: Any) -> Iterator[Any]:
    for argument in get_args(annotation):
        yield argument
        yield from _unpacked(argument)
