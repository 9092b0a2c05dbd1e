"""Safe reading of YAML within bounds; an error is one line with the position in the text.

A few bytes of nested aliases could fill the memory, and a few thousand brackets the stack. Therefore a text is measured
before any object is built from it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import RecipeError, display_path

MAX_VALUES = 10_000
"""Largest number of keys and values of a text, those of an alias counted at each use."""
MAX_DEPTH = 50
"""Largest depth of nested mappings and lists."""
MAX_LENGTH = 2**20
"""Largest size of a text in bytes."""


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file. Raises RecipeError for a repeated key, bad syntax or too large a file."""
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
    """Return the content of a text. Raises YAMLError, and ValueError for impossible numbers, dates and tags."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"more than {MAX_LENGTH:,} characters")
    _measure(text)
    try:
        return yaml.load(text, _Yaml)
    except (AttributeError, LookupError, TypeError) as error:  # raised by PyYAML, for example for !!timestamp word
        raise ValueError("a tag such as !!bool does not fit its value; remove it") from error


def is_plain(text: str) -> bool:
    """Return whether a text is a single value without quotes, tag or anchor, or is only a comment for YAML."""
    events = [event for event in yaml.parse(text, _Fast) if isinstance(event, yaml.NodeEvent)]
    if not events:
        return bool(text.strip())
    first, *others = events
    return not others and isinstance(first, yaml.ScalarEvent) and not (first.style or first.tag or first.anchor)


# libyaml's loader, if it is installed: much faster.
_Fast: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Yaml(_Fast):
    """A safe YAML loader that reads 1e-4 as a number (as YAML 1.2 does) and rejects repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            name = repr(key)  # a key may be a list, which cannot be hashed
            if name in lines:
                problem = f"the key {key!r} is repeated; the first one is in line {lines[name]}"
                raise _error(problem, key_node.start_mark)
            lines[name] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _error(problem: str, position: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=position)


def _measure(text: str) -> None:
    """Raise MarkedYAMLError for too many values or levels, or for an alias that refers to itself."""
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
            anchor, size = opened.pop()  # its size is now known, so later aliases of it can be counted
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
        elif isinstance(event, yaml.AliasEvent):
            if anchor not in sizes:
                raise _error(f"there is no anchor &{anchor} above", event.start_mark)
            size = sizes[anchor]
        if anchor is not None and not isinstance(event, yaml.AliasEvent):
            sizes[anchor] = size
        above, total = opened[-1]
        opened[-1] = (above, total + size)
        if total + size > MAX_VALUES:
            raise _error(f"more than {MAX_VALUES:,} values", event.start_mark)
