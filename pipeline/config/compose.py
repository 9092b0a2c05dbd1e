"""Composition of a recipe from its method, its own file, overlays, the command line and ``constants:``.

Later sources win, and ``null`` deletes a key. A file lies over its ``base:`` files. What a method must change of the
recipe above it stands under its ``overrides:``. ``${name}`` is replaced by the value at that dotted name under
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
from typing import Any, NoReturn

import yaml

from pipeline.config.reading import MAX_DEPTH, MAX_VALUES, is_plain, load_yaml, read_yaml
from pipeline.config.source import RecipeSource, find_recipe, known_methods, method_file, overlay_file, split_source
from pipeline.errors import RecipeError, display_path

COMMAND_LINE = "command line"
MAX_FILES = 100
"""Largest number of files in a recipe's composition, each counted as often as it is named."""
_TEXTS = ("folder", "path", "cache", "weights", "recipe", "model", "out", "class_map", "real_labels", "val_labels")
"""Keys of any section whose value is a name or a path."""

Origins = dict[tuple[str, ...], str]
"""The file that set the value at a key, or the command line."""
_REFERENCE = re.compile(r"\$\{(.*)\}")
_UNDER = "${}"
"""Key of a ``${name}`` in a mapping whose other keys override that constant's."""


def read_source(path: Path, overrides: Sequence[str] = ()) -> tuple[RecipeSource, list[str]]:
    """Return the files that a command line names by its recipe, ``method=`` and ``with=``, and its other overrides.

    Raises RecipeError if one of them does not exist.
    """
    method, overlays, others = split_source(overrides)
    return find_source(path, method, overlays), others


def find_source(path: Path, method: str | None, overlays: Sequence[str]) -> RecipeSource:
    """Return the files of a recipe by a method. Raises RecipeError if there is no recipe file at ``path``."""
    path = find_recipe(path)
    # Naming the default changes nothing, so it must be the same run.
    is_default = method is not None and own_tree(path).get("method") == method
    return RecipeSource(path, None if is_default else method, tuple(overlays))


def compose(source: RecipeSource, overrides: Sequence[str] = (), origins: Origins | None = None) -> dict[str, Any]:
    """Return the tree of a recipe, complete or not: its files, overrides and constants.

    ``origins`` is filled with the source of every value. Raises RecipeError for files that cannot be read or composed.
    """
    origins = {} if origins is None else origins
    tree = compose_files(source, origins)
    # Whole losses on the command line make a pair complete, too; a key of one does not. Nor do those of its own
    # ``overrides``, which replace the task's loss in any method.
    has_losses = _names_losses(source) or any(
        override.partition("=")[0].count(".") < 2 for override in _of_losses(overrides)
    )
    if not has_losses and "student" in tree:
        _need_method(source, overrides)
    for override in overrides:
        _check_loss(tree, override.partition("=")[0])
        _merge(tree, _parse_override(override), COMMAND_LINE, origins)
    unpack_compare(tree)
    constants = _Constants(tree.pop("constants", None) or {}, origins, display_path(source.path))
    # Nulls come last, because they may delete keys of a base or of a constant.
    filled = _without_nulls(constants.fill(tree, ()))
    constants.check_command_line()
    return filled


def _names_losses(source: RecipeSource) -> bool:
    """Return whether a recipe has losses of its own, or a method."""
    return source.method is not None or bool({"losses", "method"} & own_tree(source.path).keys())


def _need_method(source: RecipeSource, overrides: Sequence[str]) -> NoReturn:
    """Raise RecipeError for a pair without a method, which may be a misspelt key."""
    keys = [override.partition("=")[0] for override in overrides]
    if near := difflib.get_close_matches("method", keys, n=1, cutoff=0.8):
        raise RecipeError(f"{COMMAND_LINE}: {near[0]}: unknown key; did you mean 'method'?")
    methods = ", ".join(known_methods())
    raise RecipeError(f"{source}: it needs a method: method=NAME (compare.py: methods=A,B); methods are {methods}")


def _of_losses(overrides: Sequence[str]) -> list[str]:
    return [override for override in overrides if override.startswith(("losses=", "losses."))]


def own_tree(path: Path) -> dict[str, Any]:
    """Return the tree of a recipe file with its ``base:`` files, without method and overlays."""
    return _compose(path, {}, (), [])


def compose_files(source: RecipeSource, origins: Origins) -> dict[str, Any]:
    """Return the tree of the method, the recipe file over it and the overlays over both."""
    own_origins: Origins = {}
    own = _compose(source.path, own_origins, (), [])
    default, _ = own.pop("method", None), own_origins.pop(("method",), None)
    if not isinstance(default, str | None):
        raise RecipeError(f"{display_path(source.path)}: method: expected the name of a method, got {default!r}")
    if source.method and default is None and "losses" in own:
        raise RecipeError(f"{source}: this recipe has losses of its own; method= is for a recipe without losses")
    method = source.method or default
    tree = _compose(method_file(method), origins, (), []) if method else {}
    _merge(tree, own, None, {})
    origins |= own_origins
    _merge_overrides(tree, origins, display_path(source.path))
    for name in source.overlays:
        path = overlay_file(name, source, method)
        overlay = _compose(path, origins, (), [])
        _check_losses(overlay, tree, path)
        _merge(tree, overlay, None, {})
    return tree


def _check_losses(overlay: dict[str, Any], tree: dict[str, Any], path: Path) -> None:
    """Raise RecipeError for a loss that the overlay changes and that the recipe below it does not have."""
    changed, known = overlay.get("losses"), tree.get("losses")
    for name, keys in changed.items() if isinstance(changed, dict) else ():
        if keys is not None and name not in (known if isinstance(known, dict) else ()):
            raise RecipeError(
                f"{display_path(path)}: losses.{name}: the recipe has no such loss, and an overlay adds none; "
                "add it to the recipe"
            )


def _merge_overrides(tree: dict[str, Any], origins: Origins, file: str) -> None:
    """Merge the section ``overrides`` into the tree that contains it, and remove the section."""
    overrides = tree.pop("overrides", None) or {}
    if not isinstance(overrides, dict):
        raise RecipeError(f"{origins.get(('overrides',), file)}: overrides: expected a mapping, got {overrides!r}")
    moved = {key[1:]: origins.pop(key) for key in list(origins) if key[0] == "overrides"}
    _merge(tree, overrides, None, {})
    origins |= {key: origin for key, origin in moved.items() if key}


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
    for section in (content, content.get("overrides")):
        if isinstance(section, dict):
            _resolve_paths(section, path)
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


def _no_keys(constant: str, value: Any) -> str:
    """Return why keys cannot be laid on a constant that is no mapping, and what to do."""
    if value is not None:
        return f"{constant} is a single value, {value!r}, and has no keys"
    name = constant.removeprefix("${").removesuffix("}")
    return f"{constant} is null in this recipe; remove the override, or set all keys by constants.{name}={{…}}"


class _Constants:
    """The constants of a recipe, and their replacement in its tree."""

    def __init__(self, constants: Any, origins: Origins, file: str) -> None:
        if not isinstance(constants, dict):
            raise RecipeError(f"{origins.get(('constants',), file)}: constants: expected a mapping, got {constants!r}")
        self.constants = constants
        self.origins = origins
        self.file = file
        self.used: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
        """Name of each constant that was used, and the key where it was."""
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
                    raise RecipeError(f"{self.location(at)}: {_no_keys(below, found)}")
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
        self.used.append((name, at))
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
        """Raise RecipeError for a constant that the command line sets; the message names the recipe's own keys."""
        for key in (key for key, origin in self.origins.items() if origin == COMMAND_LINE and key[0] == "constants"):
            name = key[1:]
            if isinstance(_value_at(self.constants, name), dict):  # its values come later in the loop
                continue
            keys = dict.fromkeys(
                ".".join((*at, *name[len(used) :])) for used, at in self.used if name[: len(used)] == used
            )
            hint = f"set {' and '.join(keys)} instead" if keys else "nothing here uses this constant"
            raise RecipeError(f"{COMMAND_LINE}: {'.'.join(key)}: constants are for files; {hint}")


def _value_at(tree: Any, key: tuple[str, ...]) -> Any:
    """Return the value at a key, None if there is none."""
    for part in key:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


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


def _check_loss(tree: dict[str, Any], key: str) -> None:
    """Raise RecipeError for a ``key`` that would add a loss of which the recipe has one within another loss."""
    losses, (section, name, *rest) = tree.get("losses"), (*key.split("."), "")
    if section != "losses" or not any(rest) or not isinstance(losses, dict) or losses.get(name) is not None:
        return
    if found := list(nested_keys(name, losses, section)):
        keys = " or ".join(".".join([*above.split("."), *rest[:-1]]) for above in found)
        raise RecipeError(
            f"{COMMAND_LINE}: {key}: the recipe has no loss {name!r} of its own; use {keys}, "
            f"or add the loss by losses.{name}={{…}}"
        )


def nested_keys(name: str, section: Any, above: str) -> Iterator[str]:
    """Yield the dotted key of each entry ``name`` below a section that is at the key ``above``."""
    for key, value in section.items() if isinstance(section, dict) else ():
        if key == name and value is not None:
            yield f"{above}.{key}"
        yield from nested_keys(name, value, f"{above}.{key}")


def network_sections(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the sections that describe a network: the student's, the teacher's and those of its members."""
    teacher = tree.get("teacher")
    members = teacher.get("members") if isinstance(teacher, dict) else None
    for section in (tree.get("student"), teacher, *(members if isinstance(members, list) else ())):
        if isinstance(section, dict):
            yield section


def references(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the sections that name another recipe, by ``recipe``, or by a ``method`` of the same recipe file."""
    compared = tree.get("compare")
    starts = [network.get("start") for network in network_sections(tree)]
    losses = tree["losses"].values() if isinstance(tree.get("losses"), dict) else ()
    of_losses = [value for loss in losses if isinstance(loss, dict) for value in loss.values()]
    others = compared if isinstance(compared, list) else ()
    for section in (*network_sections(tree), *starts, *of_losses, *others):
        if isinstance(section, dict) and any(isinstance(section.get(key), str) for key in ("recipe", "method")):
            yield section


def unpack_compare(tree: dict[str, Any]) -> None:
    """Write each ``FILE`` in the list ``compare`` as ``{recipe: FILE}``."""
    if isinstance(tree.get("compare"), list):
        tree["compare"] = [{"recipe": item} if isinstance(item, str) else item for item in tree["compare"]]


def _resolve_paths(tree: dict[str, Any], path: Path) -> None:
    """Replace the names of other recipes that are relative to a file, so that it can be a base anywhere."""
    unpack_compare(tree)
    for section in references(tree):
        beside = path.parent / str(section.get("recipe"))
        if beside.is_file():
            section["recipe"] = display_path(beside.resolve())
