"""A recipe's arguments for the factory of a network, and what is wrong with them, in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, signature
from typing import Any

GIVEN = ("num_classes", "weights", "weights_backbone", "progress")
"""Parameters of torchvision's builders that are no arguments of a recipe."""


class ArgumentError(ValueError):
    """Arguments with which a network cannot be built; the message is one line."""


def check_arguments(
    name: str, arguments: Mapping[str, Any], callables: Iterable[Callable[..., Any]], more: Iterable[str] = ()
) -> None:
    """Raise ArgumentError for an argument that is in no signature of ``callables`` and not in ``more``.

    The message lists those that are. ``**kwargs`` counts for nothing: some of torchvision's networks ignore what they
    do not know.
    """
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    parameters = [parameter for each in callables for parameter in signature(each).parameters.values()]
    names = [*(each.name for each in parameters if each.kind in named), *more]
    known = [each for each in dict.fromkeys(names) if each not in GIVEN]
    if unknown := [argument for argument in arguments if argument not in known]:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise ArgumentError(f"{name} takes no argument {unknown[0]!r}; {takes}")


def needed_arguments(factory: Callable[..., Any]) -> list[str]:
    """Return the names of the keyword arguments without which a factory cannot be called."""
    parameters = signature(factory).parameters.values()
    return [each.name for each in parameters if each.kind == Parameter.KEYWORD_ONLY and each.default is Parameter.empty]


def failed(name: str, arguments: Mapping[str, Any], error: Exception) -> ArgumentError:
    """Return the error for arguments with which a factory raised ``error``."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return ArgumentError(f"{name} cannot be built with {json.dumps(dict(arguments))}: {reason}")
