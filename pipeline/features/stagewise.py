"""The stages of a network that alone train: which modules belong to a stage, and the freezing of all others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from pipeline.features.taps import JOIN, TAP_SYNTAX, FeatureTaps, tap_shapes
from pipeline.image_size import Resolution

HEAD = "head"
"""Name of what comes after the last stage."""


def train_stages(network: FeatureTaps, wanted: Sequence[str], image_size: Resolution) -> None:
    """Let only the parameters of these stages train; the BatchNorms of the others keep their statistics.

    Stages are ``stem``, ``stage1``, …, as far as the network has them, and ``head``. Raises ValueError for another
    name, and if no parameter is left to train.
    """
    found, known = stages_of_modules(network, image_size)
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"{unknown[0]!r} is no stage of this network; it has {', '.join(known)}")
    others = {path: network.model.get_submodule(path) for path, stage in found.items() if stage not in wanted}
    for module in others.values():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
    network.frozen = (*network.frozen, *(path for path, module in others.items() if isinstance(module, _NormBase)))
    if not any(parameter.requires_grad for parameter in network.model.parameters()):
        raise ValueError(f"no parameter is in {', '.join(wanted)}; add a stage that has some")


def stages_of_modules(network: FeatureTaps, image_size: Resolution) -> tuple[dict[str, str], list[str]]:
    """Return the stage of each module by its path, and the names of all stages in the order of the forward.

    A module belongs to the first stage whose tensor is computed after the module was called; those called later are
    the head's. One that the forward never calls belongs with the module that holds it, or to the head.
    """
    calls, ends = _clock_forward(network, image_size)
    order = sorted(ends, key=lambda name: ends[name])
    found = {}
    for path, _ in network.model.named_modules():
        holder = path
        while holder not in calls:
            holder = holder.rpartition(".")[0]
        reached = holder or not path  # the network itself holds all that it never calls
        found[path] = next((name for name in order if reached and ends[name] > calls[holder]), HEAD)
    return found, [*order, HEAD]


def _clock_forward(network: FeatureTaps, image_size: Resolution) -> tuple[dict[str, int], dict[str, int]]:
    """Return when the forward first calls each module, by path, and when it computes each stage's tensor, by name."""
    calls: dict[str, int] = {}
    ends: dict[str, int] = {}
    clock = count()

    def begin(path: str, *_: Any) -> None:
        calls.setdefault(path, next(clock))

    def end(name: str, *_: Any) -> None:
        ends[name] = next(clock)

    with ExitStack() as hooks:
        for path, module in network.model.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(partial(begin, path)))
        for name, joined in network.stages.items():
            for path in joined.split(JOIN) if re.fullmatch(r"stem|stage\d+", name) else ():
                hooks.enter_context(_at_tensor(network.model, path, partial(end, name)))
        tap_shapes(network, image_size)
    return calls, ends


def _at_tensor(model: nn.Module, path: str, hook: Any) -> Any:
    """Call ``hook`` where the forward has the tensor of a stage's path, and return the hook's handle."""
    module, parsed = model.get_submodule(path.partition(":")[0]), TAP_SYNTAX.fullmatch(path)
    if parsed and parsed["input"]:
        return module.register_forward_pre_hook(hook)
    return module.register_forward_hook(hook)
