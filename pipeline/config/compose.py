"""Composition: what a YAML file, its ``base:`` files, the command line and ``constants:`` say together.

Later ones win, ``null`` deletes a key, and ``${name}`` stands for what ``constants:`` hold under that dotted name, so
that a number that several places share stands once. An error is one line that names the file and the dotted key.
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
"""Of ``base:`` that a recipe may stand on, each counted as often as it is named."""
_TEXTS = ("folder", "path", "cache", "weights", "recipe", "model", "out")
"""Keys, whatever section they stand in, whose value is a name or a path."""

Origins = dict[tuple[str, ...], str]
"""Which file, or the command line, said the value at a key."""
_SLOT = re.compile(r"\$\{(.*)\}")
_UNDER = "${}"
"""Key of the slot that the other keys of its mapping lie over."""


def compose(path: Path, overrides: Sequence[str] = (), origins: Origins | None = None) -> dict[str, Any]:
    """Return what a recipe file, a whole one or a part, says with its ``base:`` files, overrides and constants.

    ``origins`` learns who said what. Raises RecipeError for what cannot be read or composed.
    """
    origins = {} if origins is None else origins
    tree = _compose(path, origins, (), [])
    for word in overrides:
        _merge(tree, _override(word), COMMAND_LINE, origins)
    constants = _Constants(tree.pop("constants", None) or {}, origins, display_path(path))
    # Nulls last: one may delete a key of a base, or of a constant.
    filled = _without_nulls(constants.fill(tree, ()))
    constants.check_command_line()
    return filled


def find_recipe(path: Path) -> Path:
    """Return a recipe file, absolute or from the current folder or the project's. Raises RecipeError."""
    for candidate in (path, ROOT / path):
        if candidate.is_file():
            return candidate.resolve()
    raise RecipeError(f"{path}: no such recipe; recipes stand under {display_path(ROOT / 'configs')}")


def _compose(path: Path, origins: Origins, above: tuple[Path, ...], files: list[Path]) -> dict[str, Any]:
    if path in above:
        raise RecipeError(f"{display_path(path)}: base: the file is its own base, by way of {display_path(above[-1])}")
    files.append(path)
    if len(files) > MAX_FILES:
        raise RecipeError(f"{display_path(files[0])}: base: it stands on more than {MAX_FILES} files; name fewer")
    own = read_yaml(path)
    if not isinstance(own, dict):
        raise RecipeError(f"{display_path(path)}: expected a mapping of keys, got {type(own).__name__}")
    bases = own.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise RecipeError(f"{display_path(path)}: base: expected a file or a list of files, got {bases!r}")
    tree: dict[str, Any] = {}
    for base in bases:
        base_path = (path.parent / base).resolve()
        if not base_path.is_file():
            raise RecipeError(f"{display_path(path)}: base: there is no file {base!r} beside it")
        _merge(tree, _compose(base_path, origins, (*above, path), files), None, origins)
    _resolve_paths(own, path)
    _merge(tree, own, display_path(path), origins)
    return tree


def _merge(
    tree: dict[str, Any],
    own: dict[str, Any],
    origin: str | None,
    origins: Origins,
    at: tuple[str, ...] = (),
) -> None:
    """Lay ``own`` over ``tree``: mappings are merged, anything else replaces. ``origins`` learns who said what."""
    for key, value in own.items():
        here = (*at, str(key))
        if origin is not None:
            origins[here] = origin
        if isinstance(value, dict):
            below = tree.get(key)
            if origin == COMMAND_LINE and below and not value:
                raise RecipeError(
                    f"{origin}: {key}: nothing laid over it changes nothing; {key}.NAME=null takes one away"
                )
            if isinstance(below, str) and _SLOT.fullmatch(below):
                below = {_UNDER: below}  # a constant that is a mapping may be changed in part
            tree[key] = below if isinstance(below, dict) else {}
            _merge(tree[key], value, origin, origins, here)
        else:
            tree[key] = value


def _without_nulls(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree without the keys that a null deletes; only now, since a base may delete another base's."""
    kept = ((key, value) for key, value in tree.items() if value is not None)
    return {key: _without_nulls(value) if isinstance(value, dict) else value for key, value in kept}


class _Constants:
    """What stands under ``constants:``, put where it is named."""

    def __init__(self, constants: Any, origins: Origins, file: str) -> None:
        if not isinstance(constants, dict):
            raise RecipeError(f"{origins.get(('constants',), file)}: constants: expected a mapping, got {constants!r}")
        self.constants = constants
        self.origins = origins
        self.file = file
        self.used: set[tuple[str, ...]] = set()
        self.filled = 0
        """Values that were looked at, those of constants as often as they are named."""
        self.open: list[tuple[str, ...]] = []
        """The constants being filled: one that is among them again stands for itself."""

    def fill(self, value: Any, at: tuple[str, ...]) -> Any:
        """Return ``value``, which stands at that key, with every ``${name}`` in it replaced."""
        self.filled += 1
        if self.filled > MAX_VALUES or len(at) + len(self.open) > MAX_DEPTH:
            kind = f"more than {MAX_VALUES:,} values" if self.filled > MAX_VALUES else f"deeper than {MAX_DEPTH} levels"
            raise RecipeError(f"{self.location(at)}: what the constants stand for is {kind}; name fewer of them")
        if isinstance(value, dict):
            filled: dict[str, Any] = {}
            for key, below in value.items():
                found = self.fill(below, at if key == _UNDER else (*at, str(key)))
                if key == _UNDER and not isinstance(found, dict):
                    raise RecipeError(f"{self.location(at)}: {below} is one value, {found!r}, and has no keys")
                _merge(filled, found if key == _UNDER else {key: found}, None, {})
            return filled
        if isinstance(value, list):
            return [self.fill(below, (*at, str(index))) for index, below in enumerate(value)]
        return self.constant(value, at) if isinstance(value, str) and "${" in value else value

    def constant(self, text: str, at: tuple[str, ...]) -> Any:
        """Return what ``text``, a slot, stands for; who said that is who said the value here."""
        slot = _SLOT.fullmatch(text)
        if slot is None:
            raise RecipeError(f"{self.location(at)}: {text!r}: a constant stands for a whole value")
        name = tuple(slot[1].split("."))
        found: Any = self.constants
        for part in name:
            if not isinstance(found, dict) or part not in found:
                known = f"known are {', '.join(self.constants)}" if self.constants else "there are none"
                raise RecipeError(f"{self.location(at)}: there is no constant {slot[1]!r}; {known}")
            found = found[part]
        if name in self.open:
            raise RecipeError(f"{self.location(at)}: the constant {slot[1]!r} stands for itself")
        self.used.add(name)
        for key, origin in list(self.origins.items()):
            if key[: len(name) + 1] == ("constants", *name):
                below = (*at, *key[len(name) + 1 :])
                self.origins[below] = origin if below == at else self.origins.get(below, origin)
        self.open.append(name)
        filled = self.fill(deepcopy(found), at)
        self.open.pop()
        return filled

    def location(self, at: tuple[str, ...]) -> str:
        """Return file and key as a message names them."""
        return f"{self.origins.get(at, self.file)}: {'.'.join(at)}"

    def check_command_line(self) -> None:
        """Raise RecipeError for a constant that the command line gives and nothing takes."""
        for key, origin in self.origins.items():
            name = key[1:]
            if key[:1] != ("constants",) or origin != COMMAND_LINE or not name:
                continue
            if not any(name[: len(used)] == used[: len(name)] for used in self.used):
                known = sorted(".".join(used) for used in self.used)
                near = difflib.get_close_matches(".".join(name), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"used are {', '.join(known) or 'none'}"
                raise RecipeError(f"{COMMAND_LINE}: constants.{'.'.join(name)}: nothing uses this constant; {hint}")


def read_value(key: str, text: str) -> Any:
    """Return the YAML value that the command line gives a key. Raises RecipeError.

    Nothing of a plain word is a comment, and for a key that names a file or a folder it is text, whatever YAML would
    make of it: ``folder=2024``. ``null`` takes a key away all the same.
    """
    try:
        value = load_yaml(text)
        plain = is_plain(text)
    except yaml.MarkedYAMLError as error:
        told = f"{text[:80]!r} is not YAML ({error.problem}); text may stand in quotes: {_quoted(key, text[:80])}"
        raise RecipeError(f"{COMMAND_LINE}: {key}: {told}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{COMMAND_LINE}: {key}: {text[:80]!r} is not YAML: {error}") from None
    is_text = key.rpartition(".")[2] in _TEXTS and value is not None
    return text.strip() if plain and (is_text or "#" in text) else value


def _quoted(key: str, text: str) -> str:
    return shlex.quote(f"{key}={json.dumps(text, ensure_ascii=False)}")


def _override(word: str) -> dict[str, Any]:
    key, _, text = word.partition("=")
    if not all(key.split(".")):
        raise RecipeError(f"{COMMAND_LINE}: {word[:80]!r}: no key before the =; overrides are written key=value")
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
    """Yield every place, as container and key, that names another recipe."""
    for network in network_sections(tree):
        for section in (network, network.get("start")):
            if isinstance(section, dict) and isinstance(section.get("recipe"), str):
                yield section, "recipe"
    if isinstance(tree.get("compare"), list):
        yield from ((tree["compare"], index) for index in range(len(tree["compare"])))


def _resolve_paths(own: dict[str, Any], path: Path) -> None:
    """Make what a file says of other recipes relative to that file hold wherever the file is used as a base."""
    for container, key in references(own):
        beside = path.parent / str(container[key])
        if beside.is_file():
            container[key] = display_path(beside.resolve())
