"""Composition of a recipe from a YAML file, its ``base:`` files, the command line and ``constants:``.

Later sources win, and ``null`` deletes a key. ``${name}`` is replaced by the value at that dotted name under
``constants:``, so that a number that several keys share is written once. An error is one line that names the file and
the dotted key.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.reading import MAX_DEPTH, MAX_VALUES, is_plain, load_yaml, read_yaml
from pipeline.errors import ROOT, RecipeError, display_path

COMMAND_LINE = "command line"
MAX_FILES = 100
"""Largest number of files in a recipe's composition, each counted as often as it is named."""
_TEXTS = ("folder", "path", "cache", "weights", "recipe", "model", "out")
"""Keys of any section whose value is a name or a path."""

Origins = dict[tuple[str, ...], str]
"""The file that set the value at a key, or the command line."""
_REFERENCE = re.compile(r"\$\{(.*)\}")
_UNDER = "${}"
"""Key of a ``${name}`` in a mapping whose other keys override that constant's."""


def compose(path: Path, overrides: Sequence[str] = (), origins: Origins | None = None) -> dict[str, Any]:
    """Return the tree of a recipe file, complete or not, with its ``base:`` files, overrides and constants.

    ``origins`` is filled with the source of every value. Raises RecipeError for files that cannot be read or composed.
    """
    origins = {} if origins is None else origins
    tree = _compose(path, origins, (), [])
    for override in overrides:
        _merge(tree, _parse_override(override), COMMAND_LINE, origins)
    constants = _Constants(tree.pop("constants", None) or {}, origins, display_path(path))
    # Nulls come last, because they may delete keys of a base or of a constant.
    filled = _without_nulls(constants.fill(tree, ()))
    constants.check_command_line()
    return filled


def find_recipe(path: Path) -> Path:
    """Return the absolute path of a recipe, searched from the current folder, then the project.

    Raises RecipeError if there is no such file.
    """
    for candidate in (path, ROOT / path):
        if candidate.is_file():
            return candidate.resolve()
    raise RecipeError(f"{path}: no such recipe; recipes are under {display_path(ROOT / 'configs')}")


def _compose(path: Path, origins: Origins, above: tuple[Path, ...], files: list[Path]) -> dict[str, Any]:
    if path in above:
        raise RecipeError(f"{display_path(path)}: base: the file is its own base, through {display_path(above[-1])}")
    files.append(path)
    if len(files) > MAX_FILES:
        raise RecipeError(f"{display_path(files[0])}: base: it has more than {MAX_FILES} files below it; name fewer")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise RecipeError(f"{display_path(path)}: expected a mapping of keys, got {type(content).__name__}")
    bases = content.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise RecipeError(f"{display_path(path)}: base: expected a file or a list of files, got {bases!r}")
    tree: dict[str, Any] = {}
    for base in bases:
        base_path = (path.parent / base).resolve()
        if not base_path.is_file():
            raise RecipeError(f"{display_path(path)}: base: there is no file {base!r} beside it")
        _merge(tree, _compose(base_path, origins, (*above, path), files), None, origins)
    _resolve_paths(content, path)
    _merge(tree, content, display_path(path), origins)
    return tree


def _merge(
    tree: dict[str, Any],
    upper: dict[str, Any],
    origin: str | None,
    origins: Origins,
    at: tuple[str, ...] = (),
) -> None:
    """Merge ``upper`` into ``tree``, and note its ``origin``. Mappings are merged by key; other values are replaced."""
    for key, value in upper.items():
        location = (*at, str(key))
        if origin is not None:
            origins[location] = origin
        if isinstance(value, dict):
            lower = tree.get(key)
            if origin == COMMAND_LINE and lower and not value:
                raise RecipeError(
                    f"{origin}: {key}: an empty mapping changes nothing; remove an entry with {key}.NAME=null"
                )
            if isinstance(lower, str) and _REFERENCE.fullmatch(lower):
                lower = {_UNDER: lower}  # the constant may be a mapping, of which these keys change a part
            tree[key] = lower if isinstance(lower, dict) else {}
            _merge(tree[key], value, origin, origins, location)
        else:
            tree[key] = value


def _without_nulls(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree without keys whose value is null."""
    kept = ((key, value) for key, value in tree.items() if value is not None)
    return {key: _without_nulls(value) if isinstance(value, dict) else value for key, value in kept}


class _Constants:
    """The constants of a recipe, and their replacement in its tree."""

    def __init__(self, constants: Any, origins: Origins, file: str) -> None:
        if not isinstance(constants, dict):
            raise RecipeError(f"{origins.get(('constants',), file)}: constants: expected a mapping, got {constants!r}")
        self.constants = constants
        self.origins = origins
        self.file = file
        self.used: set[tuple[str, ...]] = set()
        self.filled = 0
        """Number of values seen so far, those of a constant counted as often as it is named."""
        self.open: list[tuple[str, ...]] = []
        """The constants that are being replaced now, to detect cycles."""

    def fill(self, value: Any, at: tuple[str, ...]) -> Any:
        """Return ``value``, the value at the key ``at``, with every ``${name}`` in it replaced."""
        self.filled += 1
        if self.filled > MAX_VALUES or len(at) + len(self.open) > MAX_DEPTH:
            kind = f"more than {MAX_VALUES:,} values" if self.filled > MAX_VALUES else f"more than {MAX_DEPTH} levels"
            raise RecipeError(f"{self.location(at)}: the constants expand to {kind}; use fewer ${{name}} references")
        if isinstance(value, dict):
            filled: dict[str, Any] = {}
            for key, below in value.items():
                found = self.fill(below, at if key == _UNDER else (*at, str(key)))
                if key == _UNDER and not isinstance(found, dict):
                    raise RecipeError(f"{self.location(at)}: {below} is a single value, {found!r}, and has no keys")
                _merge(filled, found if key == _UNDER else {key: found}, None, {})
            return filled
        if isinstance(value, list):
            return [self.fill(below, (*at, str(index))) for index, below in enumerate(value)]
        return self.constant(value, at) if isinstance(value, str) and "${" in value else value

    def constant(self, text: str, at: tuple[str, ...]) -> Any:
        """Return the value of ``text``, a ``${name}``. The origin of the constant becomes the origin of the value."""
        reference = _REFERENCE.fullmatch(text)
        if reference is None:
            raise RecipeError(f"{self.location(at)}: {text!r}: a constant must be the complete value")
        name = tuple(reference[1].split("."))
        found: Any = self.constants
        for part in name:
            if not isinstance(found, dict) or part not in found:
                known = f"known are {', '.join(self.constants)}" if self.constants else "there are none"
                raise RecipeError(f"{self.location(at)}: there is no constant {reference[1]!r}; {known}")
            found = found[part]
        if name in self.open:
            raise RecipeError(f"{self.location(at)}: the constant {reference[1]!r} refers to itself")
        self.used.add(name)
        for key, origin in list(self.origins.items()):  # a list, because the loop adds keys
            if key[: len(name) + 1] == ("constants", *name):
                below = (*at, *key[len(name) + 1 :])
                self.origins[below] = origin if below == at else self.origins.get(below, origin)
        self.open.append(name)
        filled = self.fill(deepcopy(found), at)
        self.open.pop()
        return filled

    def location(self, at: tuple[str, ...]) -> str:
        """Return the file and the key for a message."""
        return f"{self.origins.get(at, self.file)}: {'.'.join(at)}"

    def check_command_line(self) -> None:
        """Raise RecipeError for a constant that the command line sets and the recipe does not use."""
        for key, origin in self.origins.items():
            name = key[1:]
            if key[:1] != ("constants",) or origin != COMMAND_LINE or not name:
                continue
            # Used, if it is part of a constant that is used, or a constant that is used is part of it.
            if not any(name[: len(used)] == used[: len(name)] for used in self.used):
                known = sorted(".".join(used) for used in self.used)
                near = difflib.get_close_matches(".".join(name), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"used are {', '.join(known) or 'none'}"
                raise RecipeError(f"{COMMAND_LINE}: constants.{'.'.join(name)}: nothing uses this constant; {hint}")


def read_value(key: str, text: str) -> Any:
    """Return the YAML value that the command line sets for a key. Raises RecipeError for text that is not YAML.

    In a plain value, ``#`` begins no comment. If the key names a file or a folder, a plain value is always text, even
    one that YAML reads as a number: ``folder=2024``. ``null`` still deletes the key.
    """
    try:
        value = load_yaml(text)
        plain = is_plain(text)
    except yaml.MarkedYAMLError as error:
        message = f"{text[:80]!r} is not YAML ({error.problem}); write text in quotes: {_quoted(key, text[:80])}"
        raise RecipeError(f"{COMMAND_LINE}: {key}: {message}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{COMMAND_LINE}: {key}: {text[:80]!r} is not YAML: {error}") from None
    is_text = key.rpartition(".")[2] in _TEXTS and value is not None
    return text.strip() if plain and (is_text or "#" in text) else value


def _quoted(key: str, text: str) -> str:
    # Quoted twice: for YAML, then for the shell.
    return shlex.quote(f"{key}={json.dumps(text, ensure_ascii=False)}")


def _parse_override(override: str) -> dict[str, Any]:
    key, _, text = override.partition("=")
    if not all(key.split(".")):
        raise RecipeError(f"{COMMAND_LINE}: {override[:80]!r}: no key before the =; overrides are written key=value")
    value = read_value(key, text)
    if key.count(".") >= MAX_DEPTH:
        raise RecipeError(f"{COMMAND_LINE}: {key[:40]}…: deeper than {MAX_DEPTH} levels")
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def network_sections(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the sections that describe a network: the student's, the teacher's and those of its members."""
    teacher = tree.get("teacher")
    members = teacher.get("members") if isinstance(teacher, dict) else None
    for section in (tree.get("student"), teacher, *(members if isinstance(members, list) else ())):
        if isinstance(section, dict):
            yield section


def references(tree: dict[str, Any]) -> Iterator[tuple[dict[str, Any] | list[Any], Any]]:
    """Yield the container and the key of every value that names another recipe."""
    for network in network_sections(tree):
        for section in (network, network.get("start")):
            if isinstance(section, dict) and isinstance(section.get("recipe"), str):
                yield section, "recipe"
    if isinstance(tree.get("compare"), list):
        yield from ((tree["compare"], index) for index in range(len(tree["compare"])))


def _resolve_paths(tree: dict[str, Any], path: Path) -> None:
    """Replace the names of other recipes that are relative to a file, so that it can be a base anywhere."""
    for container, key in references(tree):
        beside = path.parent / str(container[key])
        if beside.is_file():
            container[key] = display_path(beside.resolve())
