"""A network whose first channels are a network, too: one set of weights, and two networks that answer.

Wang et al., "Towards compact single image super-resolution via contrastive self-distillation", IJCAI 2021,
arXiv:2105.11683. A convolution before a ``PixelShuffle`` of step s has s² rows for a channel, one behind
the other. So the first rows of every tensor are the first channels there, too.

B batch, C channels, H W space.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.models.segmenter import has_hooks
from pipeline.models.super_resolution import Enlarger


class Slimmable(Enlarger):
    """A network of super-resolution that answers the image of its first channels.

    ``part`` has the layers of the narrow network; its tensors are never read. They are the first entries of those of
    ``whole``, in every dimension. The whole network's image is the output of ``full``, and is computed if a hook, such
    as a tap's, reads it. Raises ValueError if the narrow network is no part of the whole.
    """

    def __init__(self, whole: nn.Module, part: nn.Module) -> None:
        if not (isinstance(whole, Enlarger) and isinstance(part, Enlarger)):
            raise ValueError(f"a {type(part).__name__} is no network of super-resolution; remove within")
        super().__init__(whole.scale, residual=False)
        self.whole = whole
        self.full = nn.Identity()
        # In a tuple, so that its tensors, which nothing reads, are none of this network's.
        self._part = (part,)
        _check_part(_tensors(whole), _tensors(part))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the images of the first channels, ``scale`` times as high and wide."""
        if has_hooks(self.full):
            self.full(self.whole(images_BCHW))
        return functional_call(self._part[0], self._sliced(), (images_BCHW,))

    @torch.no_grad()
    def alone(self) -> nn.Module:
        """Return the first channels as a plain network with weights of its own."""
        sliced = self._sliced()
        example = next(iter(sliced.values()))
        network = copy.deepcopy(self._part[0]).to_empty(device=example.device).to(example.dtype)
        for name, tensor in _tensors(network).items():
            tensor.copy_(sliced[name])
        return network

    def tap_paths(self) -> dict[str, str]:
        """Return the module path of the whole network's image."""
        return {"full": "full"}

    def _sliced(self) -> dict[str, Tensor]:
        whole = _tensors(self.whole)
        return {
            name: whole[name][tuple(slice(side) for side in tensor.shape)]
            for name, tensor in _tensors(self._part[0]).items()
        }


def exported_network(model: nn.Module) -> nn.Module:
    """Return the network whose weights a run leaves: the first channels of a ``Slimmable``, or ``model`` itself."""
    return model.alone() if isinstance(model, Slimmable) else model


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, also those that are not saved."""
    return dict(network.named_parameters()) | dict(network.named_buffers())


def _check_part(whole: Mapping[str, Tensor], part: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless both networks have the same tensors, and those of the part are nowhere larger."""
    if whole.keys() != part.keys():
        missing = min(whole.keys() ^ part.keys())
        raise ValueError(f"only one of both networks has {missing}; within may change the number of channels alone")
    for name, tensor in part.items():
        shapes = tensor.shape, whole[name].shape
        larger = any(ours > theirs for ours, theirs in zip(*shapes, strict=True))
        if larger or shapes[0][2:] != shapes[1][2:]:
            sizes = " and ".join(" × ".join(map(str, shape)) for shape in shapes)
            raise ValueError(f"{name} is {sizes} in the student and around it; within needs more channels, not fewer")
