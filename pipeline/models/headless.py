"""Removal of a network's head, its last layer, which maps features to the logits of its classes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from pipeline.models.detector import Detector
from pipeline.models.segmenter import Segmenter


class NoHead(nn.Module):
    """The place of a removed head. It has no weights, and its logits have no classes, [B, 0].

    ``of_map`` says that the head was a convolution, whose logits are a map.
    """

    def __init__(self, *, of_map: bool = False) -> None:
        super().__init__()
        self.of_map = of_map

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, 0] for a map; logits [B, …, 0] for features [B, …, D], which the network may pool or flatten."""
        return x.flatten(1)[:, :0] if self.of_map else x[..., :0]


def without_head(model: nn.Module, stages: Mapping[str, str]) -> dict[str, str]:
    """Replace the module of the stage ``logits`` by ``NoHead``, remove an auxiliary head, and return the other stages.

    A detector's heads are removed with all that they compute, and its pyramid stays. Raises ValueError if the stages do
    not name the module, if there is none, or if it is not a segmenter's last one.
    """
    if isinstance(model, Detector):
        of_heads = model.tap_paths()
        for name in model.heads:
            setattr(model, name, NoHead())
        removed = of_heads.keys() - model.tap_paths().keys()
        return {name: path for name, path in stages.items() if name not in removed}
    if "logits" not in stages:
        raise ValueError(
            "head: none: no last linear layer of this network is known; name it under stages: {logits: <module path>}"
        )
    path = stages["logits"].partition(":")[0]
    try:
        head = model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"head: none: {type(model).__name__} has no module {path!r}: {error}") from error
    if isinstance(model, Segmenter):
        if not isinstance(head, nn.Conv2d):
            raise ValueError(f"head: none: the logits at {path!r} are not those of one convolution; keep the head")
        model.aux_classifier = None
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, NoHead(of_map=isinstance(model, Segmenter)))
    return {name: other for name, other in stages.items() if name not in ("logits", "aux")}


def head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of the names that the weights of removed heads have; () for a complete network."""
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, NoHead))
