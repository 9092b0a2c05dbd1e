"""Parsing of a command line: a recipe, its overrides ``key=value``, and the options of a command."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.config.compose import read_value
from pipeline.config.habits import answer_for, key_for
from pipeline.config.messages import key_elsewhere
from pipeline.config.recipe import Recipe
from pipeline.config.schema import dotted_keys, model_schema
from pipeline.config.source import SELECTION
from pipeline.errors import ROOT, RecipeError

ArgsT = TypeVar("ArgsT", bound=BaseModel)
DEFAULT = ROOT / "configs" / "demo.yaml"
MAX_NUMBERS = 1000


def split_command_args(args: Sequence[str], keys: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the command's options ``key=value`` by key, and the other arguments, which belong to the recipe."""
    _check_options(args)
    options = {key: value for key, _, value in (arg.partition("=") for arg in args) if key in keys}
    known = {*options, *Recipe.model_fields, *SELECTION}
    others = {arg.partition("=")[0] for arg in args if "=" in arg} - known
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


def parse_numbers(options: dict[str, str], key: str, default: str) -> list[int]:
    """Return the whole numbers of an option of a command. Raises RecipeError for other values."""
    numbers = options.get(key, default).split(",")
    if not all(number.isdecimal() for number in numbers):
        raise RecipeError(f"command line: {key}: expected whole numbers such as {key}={default}, got {options[key]!r}")
    if len(numbers) > MAX_NUMBERS:
        raise RecipeError(f"command line: {key}: expected at most {MAX_NUMBERS} numbers")
    return [int(number) for number in numbers]


def parse_number(options: dict[str, str], key: str, largest: int, default: int = 1) -> int:
    """Return the number, 1 to ``largest``, that an option of a command gives. Raises RecipeError for others."""
    number = options.get(key, str(default))
    if not (number.isdecimal() and 1 <= int(number) <= largest):
        raise RecipeError(f"command line: {key}: expected a number from 1 to {largest}, got {number!r}")
    return int(number)


def parse_recipe_args(args: Sequence[str], default: Path = DEFAULT) -> tuple[Path, list[str]]:
    """Return the recipe and the overrides of a command line ``[RECIPE] [key=value …]``."""
    _check_options(args)
    paths = [arg for arg in args if "=" not in arg]
    if len(paths) > 1:
        raise RecipeError(
            f"command line: expected one recipe, got {' and '.join(paths)}; overrides are written key=value"
        )
    return (Path(paths[0]) if paths else default), [arg for arg in args if "=" in arg]


def _check_options(args: Sequence[str]) -> None:
    """Raise RecipeError for an option, such as ``--name value``; the message has the override that it may mean."""
    for index, arg in enumerate(args):
        if arg.startswith("-"):
            option, equals, value = arg.partition("=")
            after = args[index + 1] if index + 1 < len(args) else "-"
            if not equals and not after.startswith("-") and "=" not in after and not after.endswith(".yaml"):
                value = after
            raise RecipeError(f"command line: {option}: unknown option; {_override_for(option, value)}")


def _override_for(option: str, value: str) -> str:
    """Return what to write instead of an option."""
    name, root = option.strip("-").replace("-", "_"), model_schema(Recipe)
    keys = [*dotted_keys(root), "method", "with"]
    key = name if name in keys else key_for(name)
    if key is None and (answer := answer_for(name)):
        return answer
    near = difflib.get_close_matches(name, keys, n=1, cutoff=0.85)
    key = key or next(iter(near), None) or key_elsewhere(name, root)
    if key is None:
        return "overrides are written key=value; --help lists the options"
    if " " in key:
        return f"use {key}; overrides are written key=value"
    return f"overrides are written key=value: {key}={shlex.quote(value) if value else '…'}"
