"""The report of ``--list``: methods, recipe files and networks, by the names that a command line takes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config.compose import own_tree
from pipeline.config.source import CONFIGS, OVERLAYS, known_methods, method_file
from pipeline.config.tables import load_tables
from pipeline.errors import RecipeError, display_path
from pipeline.models import known_models


def listing() -> str:
    """Return the methods with their titles, the pairs with their overlays, complete recipes and networks."""
    titles = load_tables().methods
    methods = [f"  {name:<26} {titles.get(name) or _first_line(method_file(name))}" for name in known_methods()]
    pairs = [f"  {display_path(path):<52} {_note(path, tree)}".rstrip() for path, tree in _recipes() if is_pair(tree)]
    complete = [f"  {display_path(path)}" for path, tree in _recipes() if "losses" in tree and "student" in tree]
    names = textwrap.fill(", ".join(known_models()), 110, initial_indent="  ", subsequent_indent="  ")
    networks = [names, "  timm/NAME with timm installed; package.module:factory"]
    sections = {
        "methods (method=NAME)": methods,
        "pairs, which need a method unless one is named here": pairs,
        "complete recipes": complete,
        "networks (student.model, teacher.model)": networks,
    }
    return "\n\n".join("\n".join([title, *lines]) for title, lines in sections.items())


def known_pairs() -> list[Path]:
    """Return the recipe files under ``configs/`` that need a method, or name one themselves."""
    return [path for path, tree in _recipes() if is_pair(tree)]


def is_pair(tree: dict[str, Any]) -> bool:
    """Return whether a recipe file takes its losses from a method."""
    return "student" in tree and ("method" in tree or "losses" not in tree)


def _recipes() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the YAML files of recipes under ``configs/`` and their trees."""
    for path in sorted(CONFIGS.rglob("*.yaml")):
        if path.parent.name not in ("methods", OVERLAYS):
            try:
                yield path, own_tree(path)
            except RecipeError:  # another kind of YAML file
                continue


def _note(path: Path, tree: dict[str, Any]) -> str:
    overlays = sorted(file.stem for file in (path.parent / OVERLAYS).glob("*.yaml"))
    overlays = [name for name in overlays if name.rpartition("_")[0] not in overlays]  # the others are for a method
    named = [f"method: {tree['method']}"] if "method" in tree else []
    return ", ".join([*named, *(f"with={name}" for name in overlays)])


def _first_line(path: Path) -> str:
    """Return what a method's file says of it first, without the formula after the colon."""
    return path.read_text().partition("\n")[0].partition(":")[0].removeprefix("# ")
