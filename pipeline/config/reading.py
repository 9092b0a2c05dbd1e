"""YAML, read safely and within bounds: what a text says, or one line with its place.

A few bytes of aliases that stand for aliases would fill any memory, and a few thousand brackets any stack, so that a
text is measured before anything is made of it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import RecipeError, display_path

MAX_VALUES = 10_000
"""Keys and values of a text, those of an alias counted as often as it stands there."""
MAX_DEPTH = 50
"""Levels of mappings and lists within one another."""
MAX_LENGTH = 2**20
"""Bytes of a text."""


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file; a repeated key, bad syntax and too much of it are a RecipeError."""
    try:
        if path.stat().st_size > MAX_LENGTH:
            raise RecipeError(f"{display_path(path)}: more than {MAX_LENGTH:,} bytes, which is no recipe")
        return load_yaml(path.read_text())
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise RecipeError(f"{display_path(path)}: line {line}: {error.problem}") from None
    except RecipeError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{display_path(path)}: not a YAML file: {error}") from None


def load_yaml(text: str) -> Any:
    """Return what a text says. Raises YAMLError, and ValueError for numbers, dates and tags that cannot be."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"more than {MAX_LENGTH:,} characters")
    _measure(text)
    try:
        return yaml.load(text, _Yaml)
    except (AttributeError, LookupError, TypeError) as error:  # of PyYAML, as for !!timestamp before a word
        raise ValueError("a tag such as !!bool does not fit its value; take it away") from error


def is_plain(text: str) -> bool:
    """Whether a text is one value without quotes, tag or anchor, or what YAML takes for a comment only."""
    events = [event for event in yaml.parse(text, _Fast) if isinstance(event, yaml.NodeEvent)]
    if not events:
        return bool(text.strip())
    first, *others = events
    return not others and isinstance(first, yaml.ScalarEvent) and not (first.style or first.tag or first.anchor)


_Fast: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where it is


class _Yaml(_Fast):
    """Safe YAML that reads 1e-4 as a number (YAML 1.2) and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if repr(key) in seen:
                raise _error(f"the key {key!r} stands twice", key_node.start_mark)
            seen.add(repr(key))
        return super().construct_mapping(node, deep)


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _error(problem: str, position: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=position)


def _measure(text: str) -> None:
    """Raise MarkedYAMLError for a text of too many values or levels, or of an alias that stands for itself."""
    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, _Fast):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((anchor, 1))
            if len(opened) > MAX_DEPTH + 1:
                raise _error(f"deeper than {MAX_DEPTH} levels", event.start_mark)
            continue
        size = 0
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = opened.pop()
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
        elif isinstance(event, yaml.AliasEvent):
            if anchor not in sizes:
                raise _error(f"there is no &{anchor} above", event.start_mark)
            size = sizes[anchor]
        if anchor is not None and not isinstance(event, yaml.AliasEvent):
            sizes[anchor] = size
        above, total = opened[-1]
        opened[-1] = (above, total + size)
        if total + size > MAX_VALUES:
            raise _error(f"more than {MAX_VALUES:,} values", event.start_mark)
