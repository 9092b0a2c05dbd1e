"""The optimizers that a recipe can name: torch's, and timm's as ``timm/<name>``, with the extra ``timm``.

An optimizer is one of them if a skipped step leaves its state as it was, and its saved state goes on bit for bit. Tests
show both of each.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import Any

from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from pipeline.errors import one_line

TIMM = "timm/"
"""Beginning of the names of timm's optimizers."""
TORCH_OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sgd": SGD,
    "adam": Adam,
    "adamw": AdamW,
    "adadelta": Adadelta,
    "adagrad": Adagrad,
    "adamax": Adamax,
    "asgd": ASGD,
    "nadam": NAdam,
    "radam": RAdam,
    "rmsprop": RMSprop,
}
"""torch's optimizers by the name that a recipe gives them."""
FUSED = ("sgd", "adam", "adamw")
"""Those with a fused step, which reads on the device whether it is skipped, and which a CUDA graph can capture."""
_TIMM_CLASSES = (
    *("AdaBelief", "Adafactor", "AdamP", "AdamWLegacy", "Adan", "Adopt", "LaProp", "Lamb", "Lars", "Lion", "MADGRAD"),
    *("Mars", "Muon", "NAdamLegacy", "NAdamW", "NvNovoGrad", "RAdamLegacy", "RMSpropTF", "SGDP", "SGDW"),
)
"""timm's classes. Others draw random numbers, need a second backward, or another package."""
KEYS = ("momentum", "nesterov", "betas", "eps")
"""Arguments with keys of their own in the recipe's section."""
_FIXED = {
    "params": "the run decides what trains",
    "lr": "it is schedule.rate",
    "weight_decay": "it is the key optimizer.weight_decay",
    **{key: f"it is the key optimizer.{key}" for key in KEYS},
    **dict.fromkeys(("fused", "foreach", "capturable", "differentiable"), "the run chooses how a step is computed"),
    "maximize": "losses are minimised",
    "verbose": "it changes no number",
}
"""Arguments that ``optimizer.arguments`` cannot give, with the reason."""


def make_optimizer(
    kind: str, groups: Sequence[dict[str, Any]], rate: float, keys: Mapping[str, Any], arguments: Mapping[str, Any]
) -> Optimizer:
    """Return the optimizer of this name over parameter groups; ``rate`` is the largest learning rate of the run.

    ``keys`` are values of ``KEYS`` and ``weight_decay``. Raises ValueError, in one line, if there is no such optimizer,
    or if it does not accept a key or an argument.
    """
    check_keys(kind, keys, arguments)
    factory, _ = _find(kind)
    fused = {"fused": True} if kind in FUSED else {}
    try:
        return factory(list(groups), lr=rate, **keys, **arguments, **fused)
    except Exception as error:  # a value of another type or out of range may raise nearly any error
        raise ValueError(f"{kind} cannot be made: {one_line(error, 300) or type(error).__name__}") from error


def _find(kind: str) -> tuple[Callable[..., Optimizer], Mapping[str, Parameter]]:
    """Return the factory of an optimizer, and the arguments that it accepts."""
    if kind.startswith(TIMM):
        return _find_in_timm(kind)
    if kind not in TORCH_OPTIMIZERS:
        near = get_close_matches(kind, TORCH_OPTIMIZERS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(TORCH_OPTIMIZERS)} and {TIMM}<name>"
        raise ValueError(f"there is no optimizer {kind!r}; {hint}")
    return TORCH_OPTIMIZERS[kind], signature(TORCH_OPTIMIZERS[kind]).parameters


def _find_in_timm(kind: str) -> tuple[Callable[..., Optimizer], Mapping[str, Parameter]]:
    try:
        timm = importlib.import_module("timm.optim")
    except ImportError as error:
        raise ValueError(f"{kind}: timm is not installed; install this project's extra 'timm'") from error
    if not hasattr(timm, "list_optimizers"):
        raise ValueError(f"{kind}: this timm has no list of optimizers; install timm 1.0.12 or later")
    name, names = kind.removeprefix(TIMM), timm.list_optimizers()
    if name not in names:
        near = get_close_matches(name, names, n=1)
        hint = f"; did you mean {TIMM}{near[0]}?" if near else ""
        raise ValueError(f"there is no optimizer {kind!r}{hint}")
    found = timm.get_optimizer_info(name).opt_class
    if found in TORCH_OPTIMIZERS.values():
        raise ValueError(f"{kind} is torch's own; give {found.__name__.lower()}")
    if isinstance(found, str) or found.__name__ not in _TIMM_CLASSES:
        raise ValueError(f"{kind} is not supported: a skipped or resumed step of it may not be exact")

    def create(groups: list[dict[str, Any]], **keys: Any) -> Optimizer:
        return timm.create_optimizer_v2(groups, opt=name, **keys)

    return create, signature(found).parameters


def check_keys(kind: str, keys: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if there is no such optimizer, or for a key or an argument that it does not accept."""
    _, accepted = _find(kind)
    if foreign := [key for key in keys if key not in accepted]:
        own = ", ".join(key for key in KEYS if key in accepted) or "none of these keys"
        advice = " ".join(f"optimizer.{key}=null" for key in foreign)
        raise ValueError(f"{kind} has no {' and no '.join(foreign)}, but {own}; give {advice}")
    usual = accepted["betas"].default if "betas" in keys else None
    if usual and len(usual) != len(keys["betas"]):
        raise ValueError(f"betas: {kind} has {len(usual)}, such as {list(usual)}, got {list(keys['betas'])}")
    for name in arguments:
        if name in _FIXED:
            raise ValueError(f"arguments: {name} cannot be given here; {_FIXED[name]}")
        if name not in accepted:
            known = [other for other in accepted if other not in _FIXED]
            raise ValueError(f"arguments: {kind} takes no {name}; it takes {', '.join(known) or 'none'}")
