"""Names that well-known code gives to weights of networks that have other names here.

RepDistiller's and mdistiller's networks for CIFAR are the same as this project's, layer by layer. So are mmdetection's
RetinaNet, whose P6 is computed from C5, and its Faster R-CNN, but for the order of the classes. Torchvision's published
DenseNets have the names of its first release. A family is a function from our name to the foreign name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torchvision.models import DenseNet, ResNet

from pipeline.models.cifar_mobilenet_v2 import CifarMobileNetV2
from pipeline.models.cifar_shufflenet_v1 import CifarShuffleNetV1
from pipeline.models.cifar_shufflenet_v2 import CifarShuffleNetV2
from pipeline.models.cifar_vgg import CifarVGG
from pipeline.models.cifar_wrn import CifarWideResNet
from pipeline.models.detector import RetinaNetDetector
from pipeline.models.faster_rcnn import FasterRCNNDetector

_PAIR = ("conv", "bn")
"""Foreign names of the first and the second module of a ``Conv2dNormActivation``."""


def foreign_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return our names by foreign name; empty for a network without foreign names."""
    for family, foreign_name in NAME_FAMILIES.items():
        if isinstance(model, family):
            return {foreign_name(name): name for name in names}
    return {}


def from_foreign(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state with our names, but in foreign form, in the form of ``model``."""
    return _background_first(state) if isinstance(model, FasterRCNNDetector) else state


def _wide_resnet(name: str) -> str:
    return re.sub(r"^layer(\d)\.", r"block\1.layer.", name).replace(".shortcut.", ".convShortcut.")


def _vgg(name: str) -> str:
    """Return the foreign name: blocks are numbered from 0, the stem, and the layers of a block are one flat list."""

    def rename(match: re.Match[str]) -> str:
        block = 0 if match[1] == "stem" else int(match[2])
        return f"block{block}.{3 * int(match[3]) + int(match[4])}."

    return re.sub(r"^(stem|stage(\d))\.(\d)\.(\d)\.", rename, name).replace("fc.", "classifier.")


def _mobilenet_v2(name: str) -> str:
    """Return the foreign name: blocks are in seven groups by their channels, and a block's layers are one flat list."""
    # Blocks of each group in our stages, and the number of each stage's first group.
    groups = {1: (1, 2), 2: (3,), 3: (4, 3), 4: (3, 1)}
    first = {1: 0, 2: 2, 3: 3, 4: 5}

    def rename(match: re.Match[str]) -> str:
        stage, block = int(match[1]), int(match[2])
        group = first[stage]
        for length in groups[stage]:
            if block < length:
                break
            group, block = group + 1, block - length
        return f"blocks.{group}.{block}.conv.{3 * int(match[3]) + int(match[4])}."

    name = re.sub(r"^stage(\d)\.(\d)\.layers\.(\d)\.(\d)\.", rename, name)
    return name.replace("stem.", "conv1.").replace("last.", "conv2.").replace("fc.", "classifier.0.")


def _shufflenet(name: str) -> str:
    """Return the name with the foreign stem and head, which both ShuffleNets share."""
    name = re.sub(r"^stem\.(\d)\.", lambda match: f"{_PAIR[int(match[1])]}1.", name)
    return name.replace("stage", "layer", 1).replace("fc.", "linear.")


def _shufflenet_v1(name: str) -> str:
    layers = {"squeeze": 1, "filter": 2, "widen": 3}

    def rename(match: re.Match[str]) -> str:
        return f".{_PAIR[int(match[2])]}{layers[match[1]]}."

    return re.sub(r"\.(squeeze|filter|widen)\.(\d)\.", rename, _shufflenet(name))


def _shufflenet_v2(name: str) -> str:
    """Return the foreign name: convolutions are numbered across both branches of a unit.

    Only the first unit of a stage has two convolutions in its first branch.
    """
    layers = {"branch1": (0, 0, 1, 1), "branch2": (0, 0, None, 1, 1, 2, 2)}

    def rename(match: re.Match[str]) -> str:
        unit, branch, index = match[1], match[2], int(match[3])
        number = 1 + (layers[branch][index] or 0) + (2 if unit == "0" and branch == "branch2" else 0)
        norm = index in ((1, 3) if branch == "branch1" else (1, 4, 6))
        return f".{unit}.{_PAIR[norm]}{number}."

    name = re.sub(r"\.(\d)\.(branch\d)\.(\d)\.", rename, _shufflenet(name))
    return re.sub(r"^last\.(\d)\.", lambda match: f"{_PAIR[int(match[1])]}2.", name)


def _resnet(name: str) -> str:
    return name.replace(".downsample.", ".shortcut.").replace("fc.", "linear.")


def _densenet(name: str) -> str:
    return re.sub(r"(denselayer\d+\.(?:norm|conv))(\d\.)", r"\1.\2", name)


def _with_pyramid(name: str) -> str:
    """Return mmdetection's name of what stands before the heads."""
    name = re.sub(r"^backbone\.body\.", "backbone.", name)
    name = re.sub(r"^backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv.", name)
    return re.sub(r"^backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv.", name)


def _retinanet(name: str) -> str:
    """Return mmdetection's name: P3 to P7 are one list of convolutions, and both towers are one head."""
    name = _with_pyramid(name)
    for index, level in enumerate(("p6", "p7"), start=3):
        name = name.replace(f"backbone.fpn.extra_blocks.{level}.", f"neck.fpn_convs.{index}.conv.")
    for ours, kind, last in (("classification", "cls", "cls_logits"), ("regression", "reg", "bbox_reg")):
        name = re.sub(rf"^head\.{ours}_head\.conv\.(\d)\.0\.", rf"bbox_head.{kind}_convs.\1.conv.", name)
        name = name.replace(f"head.{ours}_head.{last}.", f"bbox_head.retina_{kind}.")
    return name


def _faster_rcnn(name: str) -> str:
    """Return mmdetection's name of a Faster R-CNN whose second stage has two linear layers before its answers."""
    name = _with_pyramid(name).replace("rpn.head.conv.0.0.", "rpn_head.rpn_conv.")
    for ours, theirs in {"cls_logits": "cls", "bbox_pred": "reg"}.items():
        name = name.replace(f"rpn.head.{ours}.", f"rpn_head.rpn_{theirs}.")
    for index, layer in enumerate(("fc6", "fc7")):
        name = name.replace(f"roi_heads.box_head.{layer}.", f"roi_head.bbox_head.shared_fcs.{index}.")
    for ours, theirs in {"cls_score": "cls", "bbox_pred": "reg"}.items():
        name = name.replace(f"roi_heads.box_predictor.{ours}.", f"roi_head.bbox_head.fc_{theirs}.")
    return name


def _background_first(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return mmdetection's weights with the background's row in front, not last, and zeros as its box, which is unused.

    Heads that have one box for all classes stay as they are, and do not fit.
    """
    scores, boxes = (f"roi_heads.box_predictor.{name}" for name in ("cls_score", "bbox_pred"))
    classes = len(state.get(f"{scores}.bias", ())) - 1
    if len(state.get(f"{boxes}.bias", ())) != 4 * classes:
        return state
    found = dict(state)
    for kind in ("weight", "bias"):
        found[f"{scores}.{kind}"] = state[f"{scores}.{kind}"].roll(1, 0)
        value = state[f"{boxes}.{kind}"]
        found[f"{boxes}.{kind}"] = torch.cat([torch.zeros_like(value[:4]), value])
    return found


NAME_FAMILIES: dict[type[nn.Module], Callable[[str], str]] = {
    CifarWideResNet: _wide_resnet,
    CifarVGG: _vgg,
    CifarMobileNetV2: _mobilenet_v2,
    CifarShuffleNetV1: _shufflenet_v1,
    CifarShuffleNetV2: _shufflenet_v2,
    ResNet: _resnet,
    DenseNet: _densenet,
    RetinaNetDetector: _retinanet,
    FasterRCNNDetector: _faster_rcnn,
}
