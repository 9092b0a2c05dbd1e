"""Folding of BatchNorms into the convolutions before them, in the module tree: a traced copy would lose the hooks.

One forward shows which convolution and BatchNorm are a pair. Each must run exactly once. The BatchNorm must take the
tensor that the convolution returned, and nothing else may read that tensor. Torchvision's ``FrozenBatchNorm2d`` counts
as a BatchNorm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.ops import FrozenBatchNorm2d


def fold_batchnorms(model: nn.Module, images_BCHW: Tensor, *, spared: Collection[nn.Module] = ()) -> int:
    """Fold BatchNorms of ``model``, which is in evaluation mode, in place; return how many became ``nn.Identity``.

    ``images_BCHW`` is any batch of images of the network's size. Modules in ``spared``, such as those with hooks, are
    left unchanged.
    """
    _replace_frozen(model, spared)
    probe = _Probe()
    hooks = register_module_forward_pre_hook(probe.before), register_module_forward_hook(probe.after)
    with torch.no_grad(), hooks[0], hooks[1], probe:
        model(images_BCHW)
    pairs = {bn: conv for conv, bn in probe.pairs() if conv not in spared and bn not in spared}
    for bn, conv in pairs.items():
        _fold(conv, bn)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child in pairs:
                setattr(parent, name, nn.Identity())
    return len(pairs)


def _replace_frozen(model: nn.Module, spared: Collection[nn.Module]) -> None:
    """Replace each ``FrozenBatchNorm2d`` by the BatchNorm in evaluation mode that computes the same."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, FrozenBatchNorm2d) and child not in spared:
                state = child.state_dict()  # without a counter of batches
                norm = nn.BatchNorm2d(len(state["weight"]), child.eps).to(state["weight"]).requires_grad_(False)
                norm.eval().load_state_dict(state, strict=False)
                setattr(parent, name, norm)


class _Probe(TorchDispatchMode):
    """A record of one forward: the convolution that made a tensor, the BatchNorm that took it, and its readers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[nn.Module]()
        # By the tensor's id. The tensor is stored too: it stays alive, so Python cannot reuse its id.
        self.made: dict[int, tuple[nn.Conv2d, Tensor]] = {}
        self.taken: list[tuple[int, nn.BatchNorm2d]] = []
        self.reads = Counter[int]()

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.calls[module] += 1
        # Not a subclass: timm's subclass of BatchNorm2d also computes an activation.
        if type(module) is nn.BatchNorm2d and not module.training and module.running_mean is not None:
            self.taken += [(id(x), module) for x in args if id(x) in self.made]

    def after(self, module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, nn.Conv2d):
            self.made[id(output)] = (module, output)
            self.reads[id(output)] = 0  # forget the reads of an earlier tensor with the same id

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Hooks see modules only. Here every operation is seen, also the additions in a network's own forward.
        self.reads.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))

    def pairs(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """Return the pairs of a convolution and the BatchNorm that alone read its output, if both ran once."""
        candidates = [(self.made[key][0], bn) for key, bn in self.taken if self.reads[key] == 1]
        return [(conv, bn) for conv, bn in candidates if self.calls[conv] == self.calls[bn] == 1]


def _fold(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    assert bn.running_mean is not None
    assert bn.running_var is not None
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
