"""A recipe's arguments for the factory of a network, and what is wrong with them, in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, signature
from typing import Annotated, Any

from pydantic import AfterValidator

FIXED = {
    "num_classes": "the shards set the number of classes",
    "features_only": "a network without a classifier cannot be trained",
    **dict.fromkeys(
        ("weights", "weights_backbone", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"),
        "weights are given by start.weights of the student or weights of the teacher",
    ),
}
"""Arguments that a recipe cannot give, with the reason."""


class ArgumentError(ValueError):
    """Arguments with which a network cannot be built; the message is one line."""


def _checked(arguments: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the arguments as JSON would store them; None if there are none."""
    for name, value in (arguments or {}).items():
        if name in FIXED:
            raise ValueError(f"{name} cannot be given here; {FIXED[name]}")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(
                f"{name}: expected numbers, texts, true, false, lists or mappings, got {value!r}"
            ) from None
    return json.loads(json.dumps(arguments)) if arguments else None


Arguments = Annotated[dict[str, Any] | None, AfterValidator(_checked)]
"""Keyword arguments of a network's factory, as a recipe gives them."""


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
    known = [each for each in dict.fromkeys(names) if each not in (*FIXED, "progress")]
    if unknown := [argument for argument in arguments if argument not in known]:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise ArgumentError(f"{name} takes no argument {unknown[0]!r}; {takes}")


def failed(name: str, arguments: Mapping[str, Any], error: Exception) -> ArgumentError:
    """Return the error for arguments with which a factory raised ``error``."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return ArgumentError(f"{name} cannot be built with {json.dumps(dict(arguments))}: {reason}")
