"""The keys of a recipe: type, default and meaning of each, from the config classes; ``train.py --keys`` prints them."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from pipeline.config.habits import key_for
from pipeline.config.messages import key_elsewhere
from pipeline.config.recipe import Recipe
from pipeline.config.schema import (
    FILE_KEYS,
    Node,
    find_node,
    is_losses,
    known_keys,
    loss_schema,
    model_schema,
    subkeys,
)
from pipeline.errors import RecipeError, error_context
from pipeline.losses._registry import known_losses

OWN_LOSS = "The name of your own loss is ``package.module:Class``."
_OPTION = "command line: --keys"
_WITH: Node = {
    "type": "string",
    "description": "On the command line: overlays over the recipe, files of ``overlays/`` beside it.",
}
"""The key that only the command line has."""


class KeyRow(NamedTuple):
    """A key of a recipe, as texts."""

    key: str
    type: str
    default: str
    """The default value, or ``required``."""
    description: str


def key_rows(node: Node, above: str = "") -> Iterator[KeyRow]:
    """Yield a row for every key below a node, and for the keys of its sections; ``above`` begins their names."""
    for name, below in subkeys(node).items():
        yield key_row(f"{above}{name}", below, name in node.get("required", ()))
        # The items of a list may have the keys of the section that the list is in, such as the members of a teacher.
        if is_section(below) and not subkeys(below).items() <= subkeys(node).items():
            yield from section_rows(f"{above}{name}", below)


def section_rows(key: str, node: Node) -> Iterator[KeyRow]:
    """Yield the rows of the keys below a section, or below the items of a list of sections."""
    return key_rows(node["items"], f"{key}[].") if "items" in node else key_rows(node, f"{key}.")


def key_row(key: str, node: Node, required: bool = False) -> KeyRow:
    """Return the row of a key."""
    description = " ".join(node.get("description", "").split())
    return KeyRow(key, type_text(node), "required" if required else default_text(node), description)


def is_section(node: Node) -> bool:
    """Return whether the keys below a node have rows of their own, because its value is always a section."""
    return "properties" in node or "properties" in node.get("items", {})


def type_text(node: Node) -> str:
    """Return a node's type as a short text: ``0 <= float < 1``, ``"step" | "cosine"``, ``list of str``."""
    if is_losses(node):
        return "{name: {…}, …}" if "type" in node else "{name: {…}}"
    if options := node.get("anyOf"):
        return " | ".join(map(type_text, options))
    if "enum" in node:
        return " | ".join(json.dumps(value) for value in node["enum"])
    kind: str = node.get("type", "any")
    if kind in ("integer", "number"):
        return _number_text(node, {"integer": "int", "number": "float"}[kind])
    if kind == "array":
        item = type_text(node["items"])
        if "maxItems" in node:
            return f"[{', '.join([item] * node['maxItems'])}]"
        return f"list of ({item})" if " | " in item else f"list of {item}"
    if kind == "object":
        return _mapping_text(node)
    return {"string": "str", "boolean": "bool"}.get(kind, kind)


def _mapping_text(node: Node) -> str:
    if keys := subkeys(node):
        return f"{{{', '.join(keys)}}}" if len(keys) <= 3 else "section"
    values = node.get("additionalProperties")
    return f"{{name: {type_text(values)}}}" if isinstance(values, dict) else "mapping"


def _number_text(node: Node, name: str) -> str:
    """Return ``int > 0``, ``float <= 1`` or ``0 < int <= 4``."""
    bounds = {key: _value_text(node[key]) for key in (*_LOWER, *_UPPER) if key in node}
    lower = [f"{bounds[key]} {sign} " for key, sign in _LOWER.items() if key in bounds]
    upper = [f" {sign} {bounds[key]}" for key, sign in _UPPER.items() if key in bounds]
    if lower and not upper:
        return next(f"{name} {sign.replace('<', '>')} {bounds[key]}" for key, sign in _LOWER.items() if key in bounds)
    return "".join([*lower, name, *upper])


_LOWER = {"exclusiveMinimum": "<", "minimum": "<="}
_UPPER = {"exclusiveMaximum": "<", "maximum": "<="}


def default_text(node: Node) -> str:
    """Return a node's default as YAML, empty for a section, whose keys have their own."""
    default = node.get("default")
    return "" if isinstance(default, dict) and subkeys(node) else _value_text(default)


def _value_text(value: Any) -> str:
    """Return a value as it is written in YAML; a large power of two as a power."""
    if isinstance(value, list):
        return f"[{', '.join(map(_value_text, value))}]"
    if isinstance(value, int) and value >= 10_000:
        return f"2**{value.bit_length() - 1}" if value & (value - 1) == 0 else f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def keys_text(words: Sequence[str]) -> str:
    """Return what ``--keys`` prints: the sections and keys at the top level, or those of one section or key.

    ``words`` are the words after ``--keys``. Raises RecipeError for several words, and for an unknown section.
    """
    if len(words) > 1:
        raise RecipeError(f"{_OPTION}: expected one section, got {' and '.join(words)}")
    recipe = model_schema(Recipe)
    if not words:
        return _overview(recipe)
    location = _split(words[0])
    node, key = _find(recipe, location), ".".join(location)
    if is_losses(node):
        return _loss_list(key)
    if not subkeys(node):
        above = _find(recipe, location[:-1])
        return _plain(_table([key_row(key, node, location[-1] in above.get("required", ()))], first_sentences=False))
    return _plain(f"{key}: {_first_sentence(node.get('description', ''))}\n\n{_table(section_rows(key, node))}")


def _split(text: str) -> list[str]:
    """Return the parts of a dotted key; the name of a user's own loss, ``package.module:Class``, is one part."""
    own = re.fullmatch(r"losses\.([\w.]+:\w+)\.?(.*)", text)
    parts = ["losses", own[1], *own[2].split(".")] if own else text.split(".")
    return [part.removesuffix("[]") for part in parts if part]


def _find(recipe: Node, location: Sequence[str]) -> Node:
    """Return the node at a key. Raises RecipeError if there is no such key."""
    with error_context(_OPTION):
        for depth in range(1, len(location) + 1):
            if find_node(recipe, location[:depth]) is None:
                raise RecipeError(_unknown(recipe, location[: depth - 1], location[depth - 1]))
        node = find_node(recipe, location)
    assert node is not None
    return node


def _unknown(recipe: Node, above: Sequence[str], name: str) -> str:
    """Return the message for a key that the section ``above`` does not have."""
    known = known_keys(find_node(recipe, above))
    near = [".".join([*above, key]) for key in difflib.get_close_matches(name, known, n=1)]
    found = key_for(name) or key_elsewhere(name, recipe) or next(iter(near), None)
    where = f"in {'.'.join(above)}" if above else "at the top level"
    hint = f"did you mean {found}?" if found else f"known are {', '.join(known) or 'none'}"
    return f"there is no key {name!r} {where}; {hint}"


def _overview(recipe: Node) -> str:
    """Return the sections with a line each, and the keys at the top level."""
    nodes = subkeys(recipe)
    sections = {name: node for name, node in nodes.items() if is_section(node) or is_losses(node)}
    rest = {**recipe, "properties": {name: node for name, node in nodes.items() if name not in sections}}
    width = max(map(len, sections))
    return _plain(
        "The keys of a recipe. On the command line: key=value, dotted, such as data.size=224.\n\n"
        "Sections (--keys SECTION prints the keys of one):\n"
        + "".join(f"  {name:{width}}  {_first_sentence(node['description'])}\n" for name, node in sections.items())
        + f"\nKeys at the top level:\n{_table(key_rows(rest))}\n\n"
        f"Keys that name a recipe's files:\n{_table(file_rows())}"
    )


def file_rows() -> Iterator[KeyRow]:
    """Yield the rows of the keys that are no settings, but say how a recipe is composed."""
    for key, node in {**FILE_KEYS, "with": _WITH}.items():
        yield key_row(key, node)._replace(default="")


def _loss_list(key: str) -> str:
    """Return the losses with a line each."""
    names = known_losses()
    width = max(map(len, names))
    lines = [f"  {name:{width}}  {loss_schema(name)['description']}" for name in names]
    head = f"{key}: losses by name (--keys losses.NAME prints the keys of one). {OWN_LOSS}"
    return _plain("\n".join([head, "", *lines]))


def _table(rows: Iterable[KeyRow], first_sentences: bool = True) -> str:
    """Return two lines for each row: its key, type and default in columns, and its description below."""
    rows = list(rows)
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    lines = []
    for row in rows:
        default = row.default if row.default in ("required", "") else f"default {row.default}"
        lines.append(f"  {row.key:{widths[0]}}  {row.type:{widths[1]}}  {default}".rstrip())
        lines.append(f"      {_first_sentence(row.description) if first_sentences else row.description}")
    return "\n".join(lines)


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.])\s+(?=[A-Z`])", " ".join(text.split()), maxsplit=1)[0]


def _plain(text: str) -> str:
    return text.replace("``", "")
