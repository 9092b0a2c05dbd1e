"""What a command line says: a recipe, its overrides ``key=value``, and a command's own words."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.config.compose import read_value
from pipeline.config.recipe import Recipe
from pipeline.errors import ROOT, RecipeError

ArgsT = TypeVar("ArgsT", bound=BaseModel)
DEFAULT = ROOT / "configs" / "demo.yaml"


def split_command_args(args: Sequence[str], keys: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return (values by key, the other words) of those ``key=value`` words that are a command's own, no recipe's."""
    own = {key: value for key, _, value in (word.partition("=") for word in args) if key in keys}
    others = {word.partition("=")[0] for word in args if "=" in word} - own.keys() - Recipe.model_fields.keys()
    for key in sorted(key for key in others if "." not in key):
        if near := difflib.get_close_matches(key, keys, n=1):
            raise RecipeError(f"command line: {key}: unknown key; did you mean {near[0]!r}?")
    return own, [word for word in args if word.partition("=")[0] not in keys]


def parse_command_args(own: dict[str, str], kind: type[ArgsT]) -> ArgsT:
    """Return a command's own words, in YAML syntax, as ``kind`` knows them. Raises RecipeError."""
    try:
        return kind.model_validate({key: read_value(key, text) for key, text in own.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise RecipeError(f"command line: {key}: {first['msg']}, got {first['input']!r}") from None


def parse_recipe_args(args: Sequence[str], default: Path = DEFAULT) -> tuple[Path, list[str]]:
    """Return (recipe, overrides) of a command line ``[RECIPE] [key=value …]``."""
    paths = [word for word in args if "=" not in word]
    if len(paths) > 1:
        raise RecipeError(
            f"command line: expected one recipe, got {' and '.join(paths)}; overrides are written key=value"
        )
    return (Path(paths[0]) if paths else default), [word for word in args if "=" in word]
