"""Removal of a network's head, its last layer, which maps features to the logits of its classes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class NoHead(nn.Module):
    """The place of a removed head. It has no weights, and its logits have no classes, [B, 0]."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, …, 0] for features [B, …, D]: a network may pool or flatten after its head."""
        return x[..., :0]


def without_head(model: nn.Module, stages: Mapping[str, str]) -> dict[str, str]:
    """Replace the module of the stage ``logits`` by ``NoHead``, and return the other stages.

    Raises ValueError if the stages do not name it, or the network has no such module.
    """
    if "logits" not in stages:
        raise ValueError(
            "head: none: no last linear layer of this network is known; name it under stages: {logits: <module path>}"
        )
    path = stages["logits"].partition(":")[0]
    try:
        model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"head: none: {type(model).__name__} has no module {path!r}: {error}") from error
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, NoHead())
    return {name: other for name, other in stages.items() if name != "logits"}


def head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of the names that the weights of removed heads have; () for a complete network."""
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, NoHead))
