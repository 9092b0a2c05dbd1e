"""Messages for errors in a recipe, one line each: the file, the dotted key, what was given and what was expected."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from datetime import date
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.config.compose import Origins, nested_keys
from pipeline.config.habits import answer_for, key_for, key_in_section, loss_key
from pipeline.config.schema import Node, dotted_keys, find_node, known_keys, model_schema
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
    return f"{where}: {_describe_errors(errors, location, model, tree)}{more}"


def check_nulls(model: type[BaseModel], tree: dict[str, Any], origins: Origins, file: str) -> None:
    """Raise RecipeError for a null at a key that ``model`` does not have: it deletes nothing, so it must be a typo."""
    for key in origins:
        section = _section(tree, key[:-1])
        if key[0] == "constants" or section is None or key[-1] in section:
            continue
        # A null deletes a user's own loss, whose name ``package.module:Class`` is not a field of any model.
        if key[0] == "losses" and re.fullmatch(r"[\w.]+:[A-Za-z_]\w*", key[-1]):
            continue
        known = known_keys(find_node(model_schema(model), key[:-1]))
        if known and key[-1] not in known:
            raise RecipeError(f"{location_of(key, origins, file)}: {_unknown(key, model, tree)}")


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


def _describe_errors(errors: list[Any], location: tuple[str, ...], model: type[BaseModel], tree: Any) -> str:
    """Return what is wrong at a key; several errors come from a union, one from each of its types."""
    first = errors[0]
    if first["type"] == "extra_forbidden":
        return _unknown(location, model, tree)
    if first["type"] == "missing":
        return "this key is required"
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    if first["type"] == "string_type" and isinstance(first["input"], (int, float, date)):
        return f"YAML reads {first['input']!r} here; write text in quotes"
    message = ", or ".join(item["msg"].removeprefix("Input ") for item in errors)
    return f"{message}, got {first['input']!r}"


def _unknown(location: tuple[str, ...], model: type[BaseModel], tree: dict[str, Any]) -> str:
    """Return the message for an unknown key: what it is called here, or the key it may be a misspelling of."""
    root, (*above, name) = model_schema(model), location
    known = known_keys(find_node(root, above))
    typo, similar = (difflib.get_close_matches(name, known, n=1, cutoff=cutoff) for cutoff in (0.85, 0.6))
    if above[:1] == ["losses"]:
        key = _keys_of_losses(above, name, tree) or key_in_section(above, name, known)
    else:
        key = key_in_section(above, name, known) or _key_of_recipe(above, name, root, tree, is_typo=bool(typo))
    if key:
        return f"unknown key; use {key}"
    if above[:1] != ["losses"] and (answer := answer_for(name)):
        return f"unknown key; {answer}"
    if ":" in name:
        return f"unknown key; YAML needs a space after the colon: {{{name.replace(':', ': ', 1)}}}"
    if similar:
        return f"unknown key; did you mean {similar[0]!r}?"
    return f"unknown key; known here are {', '.join(known)}"


def _key_of_recipe(above: Sequence[str], name: str, root: Node, tree: dict[str, Any], *, is_typo: bool) -> str | None:
    """Return the key, of any section, that a ``name`` in a section other than losses means, None if there is none.

    ``is_typo``: it is nearly a key of its own section.
    """
    if above and is_typo:
        return None
    # What a habit means by the name comes before a key that happens to have it.
    key = key_for(name) or (None if is_typo or answer_for(name) else key_elsewhere(name, root))
    if not above and (key is None or key.startswith("losses.")):
        return _keys_of_losses(["losses"], name, tree) or key
    return key


def _keys_of_losses(above: Sequence[str], name: str, tree: dict[str, Any]) -> str | None:
    """Return the keys in the tree, in the losses below ``above``, that ``name`` means; None if there are none."""
    section = ".".join(above)
    found = nested_keys(loss_key(name), _section(tree, above), section)
    return " or ".join(key for key in found if key != f"{section}.{name}") or None


def key_elsewhere(name: str, root: Node) -> str | None:
    """Return the key at the top level, or else the only dotted key, that ends in ``name``; None if there is none."""
    if name in root["properties"]:
        return name
    found = [key for key in dotted_keys(root) if key.rpartition(".")[2] == name]
    return found[0] if len(found) == 1 else None
