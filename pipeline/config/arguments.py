"""Parsing of a command line: a recipe, its overrides ``key=value``, and the options of a command."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.config.compose import read_value
from pipeline.config.recipe import Recipe
from pipeline.config.source import SELECTION
from pipeline.errors import ROOT, RecipeError

ArgsT = TypeVar("ArgsT", bound=BaseModel)
DEFAULT = ROOT / "configs" / "demo.yaml"


def split_command_args(args: Sequence[str], keys: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the command's options ``key=value`` by key, and the other arguments, which belong to the recipe."""
    options = {key: value for key, _, value in (arg.partition("=") for arg in args) if key in keys}
    others = (
        {arg.partition("=")[0] for arg in args if "=" in arg}
        - options.keys()
        - Recipe.model_fields.keys()
        - {*SELECTION}
    )
    # A mistyped option would count as an unknown key of the recipe, whose message knows no options.
    for key in sorted(key for key in others if "." not in key):
        if near := difflib.get_close_matches(key, keys, n=1):
            raise RecipeError(f"command line: {key}: unknown key; did you mean {near[0]!r}?")
    return options, [arg for arg in args if arg.partition("=")[0] not in keys]


def parse_command_args(options: dict[str, str], model: type[ArgsT]) -> ArgsT:
    """Return the command's options, whose values are YAML, as a ``model``. Raises RecipeError for a wrong value."""
    try:
        return model.model_validate({key: read_value(key, text) for key, text in options.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise RecipeError(f"command line: {key}: {first['msg']}, got {first['input']!r}") from None


def parse_recipe_args(args: Sequence[str], default: Path = DEFAULT) -> tuple[Path, list[str]]:
    """Return the recipe and the overrides of a command line ``[RECIPE] [key=value …]``."""
    paths = [arg for arg in args if "=" not in arg]
    if len(paths) > 1:
        raise RecipeError(
            f"command line: expected one recipe, got {' and '.join(paths)}; overrides are written key=value"
        )
    return (Path(paths[0]) if paths else default), [arg for arg in args if "=" in arg]
