"""The JSON schema of recipes: the source of the list of keys, of hints in messages, and of completion in editors.

A *node* is the schema of one key. References to other classes are resolved in it, and null is left out of its types,
because null at any key means its default.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from pipeline.losses._registry import LossSpec, find_loss, known_losses

Node = dict[str, Any]

LOSSES = {"$ref": "#/definitions/losses"}
"""Node of losses by name. It stays a reference, because a loss may contain another one."""
_CONSTANT = r"^\$\{.*\}$"
"""Pattern of a constant's name, which files may give as any value."""
FILE_KEYS: dict[str, Node] = {
    "base": {
        "description": "Files that this one lies over, relative to it; later ones win.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    },
    "method": {
        "description": "Method under this recipe, a file of ``configs/methods/``; ``method=NAME`` replaces it.",
        "type": "string",
    },
    "constants": {
        "description": "Values by name, which files use as ``${name}`` at several keys.",
        "type": "object",
    },
    "overrides": {
        "description": "In a method: what it changes of the recipe that lies over it.",
        "type": "object",
        "allOf": [{"$ref": "#/definitions/recipe"}],
    },
}
"""Keys of a recipe file that say how it is composed."""


class _Generator(GenerateJsonSchema):
    """The schema generator of pydantic, for models with losses."""

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        # A loss is read from plain data by a validator, so the fields of its dataclass are no keys.
        return {} if schema["cls"] is LossSpec else super().dataclass_schema(schema)


@cache  # pydantic takes a tenth of a second, and a resolved recipe is checked key by key
def model_schema(model: type[BaseModel]) -> Node:
    """Return the node of a config class, which nobody may change."""
    schema = model.model_json_schema(schema_generator=_Generator)
    return _resolved(schema, schema.get("$defs", {}))


def loss_schema(name: str) -> Node:
    """Return the node of a loss's config, described by the loss's paper. Raises ValueError if there is no such loss."""
    loss = find_loss(name)
    # A file of the project has one loss, and begins with its paper; of a user's own file that is not known.
    text = loss.__doc__ if ":" in name else sys.modules[loss.__module__].__doc__
    title = (text or "").strip().partition("\n")[0].partition("   ")[0]
    return {**model_schema(loss.Config), "description": title}


def subkeys(node: Node) -> dict[str, Node]:
    """Return the nodes of the keys below a node; those of a list are the keys of its items."""
    for part in (node, node.get("items", {}), *node.get("anyOf", ())):
        if "properties" in part:
            return part["properties"]
    return {}


def find_node(node: Node, location: Iterable[str]) -> Node | None:
    """Return the node at a key below ``node``, None if there is no such key. Indices of lists are skipped."""
    for part in location:
        if part.isdecimal():
            continue
        if is_losses(node):
            node = loss_schema(part)
        elif part in subkeys(node):
            node = subkeys(node)[part]
        else:
            return None
    return node


def known_keys(node: Node | None) -> list[str]:
    """Return the names of the keys below a node, sorted; none if there is no node or it accepts any name."""
    if node is None:
        return []
    return known_losses() if is_losses(node) else sorted(subkeys(node))


def dotted_keys(node: Node, above: str = "") -> Iterator[str]:
    """Yield the dotted name of every key below a node, without those in lists."""
    for name, below in node.get("properties", {}).items():
        yield f"{above}{name}"
        yield from dotted_keys(below, f"{above}{name}.")


def is_losses(node: Node) -> bool:
    """Return whether the keys below a node are names of losses."""
    return node.get("$ref") == LOSSES["$ref"]


def _resolved(node: Node, definitions: Node) -> Node:
    """Return a node of pydantic's schema with its references resolved, without titles and null."""
    node = {key: value for key, value in node.items() if key not in ("title", "$defs")}
    options = [part for part in node.pop("anyOf", ()) if part.get("type") != "null"]
    options += node.pop("allOf", ())
    if reference := node.pop("$ref", None):
        name = reference.rpartition("/")[2]
        options.append(LOSSES if name == LossSpec.__name__ else definitions[name])
    if len(options) == 1:
        return {**(options[0] if options == [LOSSES] else _resolved(options[0], definitions)), **node}
    if options:
        return {**node, "anyOf": [_resolved(option, definitions) for option in options]}
    if "const" in node:
        node["enum"] = [node.pop("const")]
    if "prefixItems" in node:  # all our tuples of fixed length have items of one type
        node["items"] = node.pop("prefixItems")[0]
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            node[key] = _resolved(node[key], definitions)
    if node.get("additionalProperties") is True:  # a mapping of any values
        return node
    if is_losses(node.get("additionalProperties") or {}):
        return {**LOSSES, "type": "object", "description": node.get("description", "")}
    if "properties" in node:
        node["properties"] = {key: _resolved(below, definitions) for key, below in node["properties"].items()}
    return node


def file_schema(model: type[BaseModel]) -> Node:
    """Return the JSON schema (draft 7) of recipe files, of which each has some of the keys of a recipe ``model``."""
    recipe = _loosened(model_schema(model))
    own = {":": {"type": ["object", "string", "null"]}}
    losses = {"type": "object", "properties": {name: loss_schema(name) for name in known_losses()}}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **recipe,
        "description": "A recipe, or a part of one.",
        "properties": {
            **{key: _in_markdown(node) for key, node in FILE_KEYS.items()},
            **{key: {"$ref": f"#/definitions/recipe/properties/{key}"} for key in recipe["properties"]},
        },
        "definitions": {
            "recipe": recipe,
            "losses": {**_loosened(losses), "patternProperties": own, "additionalProperties": False},
        },
    }


def _loosened(node: Node, key: str = "") -> Node:
    """Return the schema of a ``key`` in a file, which may lack keys and have ``${name}`` or null as any value."""
    node = _in_markdown(_with_short_form(node, key))
    kept = {name: node[name] for name in ("description", "default") if name in node}
    if "$ref" in node:
        return {**kept, "allOf": [LOSSES]}  # draft 7 ignores what stands beside a reference
    if "anyOf" in node:
        return {**kept, "anyOf": [_loosened(option) for option in node["anyOf"]]}
    if "enum" in node:
        return {**kept, "anyOf": [{"enum": node["enum"]}, {"type": ["string", "null"], "pattern": _CONSTANT}]}
    if node["type"] == "string":
        return {**node, "type": ["string", "null"]}
    loose = {**node, "type": [node["type"], "string", "null"], "pattern": _CONSTANT}
    loose.pop("required", None)
    if "properties" in node:
        loose["properties"] = {name: _loosened(below, name) for name, below in node["properties"].items()}
    for name in ("items", "additionalProperties"):
        if isinstance(node.get(name), dict):
            loose[name] = _loosened(node[name])
    return loose


def _with_short_form(node: Node, key: str) -> Node:
    """Return the node with the other form in which a file may write the value of this key."""
    text = {"type": "string"}
    if key == "compare":  # a list of files
        return {**node, "items": {"anyOf": [node["items"], text]}}
    if key == "with":  # a single overlay
        return {"anyOf": [{"type": "array", "items": text}, text], "description": node.get("description", "")}
    if key == "model":  # a network of the user's own, with its stages
        stages = {"type": "object", "additionalProperties": text}
        mapping = {"type": "object", "properties": {"path": text, "stages": stages}, "additionalProperties": False}
        return {"anyOf": [text, mapping], "description": node.get("description", "")}
    return node


def _in_markdown(node: Node) -> Node:
    """Return the node with a description as editors show it."""
    description = " ".join(node.get("description", "").replace("``", "`").split())
    return {**node, "description": description} if description else node
