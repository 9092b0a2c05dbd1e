"""Patterns of a recipe for the parameters of a network, such as ``layer1.*``, ``conv1`` or ``*.bias``.

A pattern is for the dotted names of parameters, as in the network's state dict, and ``*`` stands for any characters,
dots included. A pattern that names a module stands for all parameters in it: ``conv1`` is ``conv1.*``, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def matches(name: str, pattern: str) -> bool:
    """Return whether the pattern is for a parameter of this name."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def frozen_norms(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Return the paths of the normalisation layers with running statistics that a pattern is for."""
    patterns, norms = list(patterns), {path for path, module in model.named_modules() if isinstance(module, _NormBase)}
    # The statistics are tensors of the layer like its parameters, so a pattern for a parameter alone is not for them.
    return [path for path in sorted(norms) if any(matches(f"{path}.running_mean", pattern) for pattern in patterns)]


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Switch off the gradients of the parameters that the patterns are for.

    Raises ValueError for a pattern that is for no parameter, and if no parameter is left to train.
    """
    for pattern in patterns:
        for parameter in _found(pattern, dict(model.named_parameters())).values():
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("every parameter of the network is frozen; leave some to train")


def rate_multipliers(model: nn.Module, rates: Mapping[str, float]) -> dict[nn.Parameter, float]:
    """Return the multiplier of the learning rate for each parameter that a pattern of ``rates`` is for.

    Raises ValueError for a pattern that is for no parameter that trains, and for two that are for the same one.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found: dict[nn.Parameter, tuple[str, float]] = {}
    for pattern, rate in rates.items():
        for name, parameter in _found(pattern, trained, "parameter that trains").items():
            if parameter in found:
                raise ValueError(f"{found[parameter][0]!r} and {pattern!r} are both for {name}; give it one of them")
            found[parameter] = (pattern, rate)
    return {parameter: rate for parameter, (_, rate) in found.items()}


def _found(pattern: str, named: Mapping[str, nn.Parameter], kind: str = "parameter") -> dict[str, nn.Parameter]:
    """Return the parameters that the pattern is for, by name. Raises ValueError if there are none."""
    found = {name: parameter for name, parameter in named.items() if matches(name, pattern)}
    if not found:
        paths = {name.rsplit(".", depth)[0]: None for name in named for depth in range(name.count(".") + 1)}
        near = get_close_matches(pattern.removesuffix(".*"), [*named, *paths], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the first is {next(iter(named), 'none')}"
        raise ValueError(f"{pattern!r} is the name or path of no {kind}; {hint}")
    return found
