"""Where each network computes the canonical stages ``stem, stage1 … stage4, embedding, logits`` and ``stageN.preact``.

A stage is written as a module path: ``layer4`` is that module's output, ``layer4.1.relu:in`` its last call's input.
A stage's output comes after its last activation and ``.preact`` before it; they are one tensor where it ends linearly.
A family of networks is one function and one entry of ``FAMILIES``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import cast

from torch import nn
from torchvision.models import EfficientNet, MobileNetV2, ResNet

from pipeline.models.cifar_resnet import CifarResNet
from pipeline.models.mobilenet_v1 import MobileNetV1

HEADS = ("fc", "classifier", "head", "heads")
STAGE = re.compile(r"stage(\d+)")


def stages(model: nn.Module) -> dict[str, str]:
    """Return the module path of each canonical stage of ``model``.

    Of a network of no known family only the embedding and the logits are named, and only where its head is obvious.
    """
    for family, paths in FAMILIES.items():
        if isinstance(model, family):
            return paths(model)
    return _head(model)


def find_stage(paths: Mapping[str, str], name: str) -> str:
    """Return the module path of the tap ``name``; ``last`` and ``last.preact`` stand for the deepest stage.

    Raises ValueError where the network has no such stage.
    """
    if name in paths:
        return paths[name]
    numbers = [int(match[1]) for match in map(STAGE.fullmatch, paths) if match]
    stage, dot, kind = name.partition(".")
    resolved = f"stage{max(numbers)}{dot}{kind}" if stage == "last" and numbers else name
    if resolved not in paths:
        known = f"it has {', '.join(paths)}" if paths else "none is known"
        raise ValueError(f"the network has no stage {name!r}: {known}; name it by stages: {{{name}: <module path>}}")
    return paths[resolved]


def _resnet(model: nn.Module) -> dict[str, str]:
    """Name the stages of torchvision's ResNets and of ours; a block has one ReLU, whose last call follows the sum."""
    paths = {"stem": "maxpool" if isinstance(model, ResNet) else "relu"}
    for number in range(1, 5):
        if blocks := getattr(model, f"layer{number}", None):
            paths |= _stage(number, f"layer{number}", f"layer{number}.{len(blocks) - 1}.relu:in")
    return paths | _head(model)


def _mobilenet_v1(model: nn.Module) -> dict[str, str]:
    paths = {"stem": "stem"}
    for number in range(1, 5):
        blocks = cast(nn.Sequential, model.get_submodule(f"stage{number}"))
        paths |= _stage(number, f"stage{number}", f"stage{number}.{len(blocks) - 1}.1.2:in")
    return paths | _head(model)


def _inverted_bottlenecks(*ends: int) -> Callable[[nn.Module], dict[str, str]]:
    """Name the stages of networks whose ``features`` are linear bottlenecks and a last convolution with activation."""

    def paths(model: nn.Module) -> dict[str, str]:
        last = len(cast(nn.Sequential, model.get_submodule("features"))) - 1
        found = {"stem": "features.0"}
        for number, end in enumerate(ends, start=1):
            found |= _stage(number, f"features.{end}", f"features.{end}")
        return found | _stage(4, f"features.{last}", f"features.{last}.2:in") | _head(model)

    return paths


def _stage(number: int, output: str, before_activation: str) -> dict[str, str]:
    return {f"stage{number}": output, f"stage{number}.preact": before_activation}


def _head(model: nn.Module) -> dict[str, str]:
    head = next((name for name in HEADS if isinstance(getattr(model, name, None), nn.Module)), None)
    return {"embedding": f"{head}:in", "logits": head} if head else {}


FAMILIES: dict[type[nn.Module], Callable[[nn.Module], dict[str, str]]] = {
    ResNet: _resnet,
    CifarResNet: _resnet,
    MobileNetV1: _mobilenet_v1,
    MobileNetV2: _inverted_bottlenecks(3, 6, 13),
    EfficientNet: _inverted_bottlenecks(2, 3, 5),
}
