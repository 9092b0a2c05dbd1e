"""The module paths of the canonical stages, for each family of networks. ``pipeline.models.stages`` explains stages.

A family is a function from a network to the module path of each stage, and an entry of ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torchvision.models import (
    VGG,
    ConvNeXt,
    DenseNet,
    EfficientNet,
    MobileNetV2,
    MobileNetV3,
    RegNet,
    ResNet,
    ShuffleNetV2,
    SwinTransformer,
    VisionTransformer,
)
from torchvision.models.resnet import Bottleneck

from pipeline.models.cifar_mobilenet_v2 import CifarMobileNetV2
from pipeline.models.cifar_resnet import CifarResNet
from pipeline.models.cifar_shufflenet_v1 import CifarShuffleNetV1
from pipeline.models.cifar_shufflenet_v2 import CifarShuffleNetV2
from pipeline.models.cifar_vgg import CifarVGG
from pipeline.models.cifar_wrn import CifarWideResNet
from pipeline.models.mobilenet_v1 import MobileNetV1

HEADS = ("fc", "classifier", "head", "heads")
POOL_TYPES = ("avgpool", "global_pool")

Paths = dict[str, str]
Family = Callable[[nn.Module], Paths]


def head(model: nn.Module) -> Paths:
    """Return the paths of the last linear layer's input and output, and of the map that is averaged for it.

    Paths that cannot be found are left out.
    """
    name = _first(model, HEADS)
    if name is None:
        return {}
    paths = [name]
    if isinstance(getattr(model, name), nn.Sequential):
        paths = _children(model, name)
        if not paths or not isinstance(model.get_submodule(paths[-1]), nn.Linear):
            return {}
    layers = [model.get_submodule(path) for path in paths]
    first = len(layers) - 1
    # The embedding is taken before dropout, so that losses compare features without its noise.
    while first and isinstance(layers[first - 1], nn.Dropout):
        first -= 1
    pool = _first(model, POOL_TYPES)
    averages = pool is not None and first == 0 and _is_global_average(model.get_submodule(pool))
    return ({"map": f"{pool}:in"} if averages else {}) | {"embedding": f"{paths[first]}:in", "logits": paths[-1]}


def stage_entry(number: int, output: str, preact: str | None = None, norm: str | None = None) -> Paths:
    """Return the paths of one stage. Without ``preact`` it ends linearly, without ``norm`` it ends in no BatchNorm."""
    found = {f"stage{number}": output, f"stage{number}.preact": preact or output}
    return found | ({f"stage{number}.norm": norm} if norm else {})


def _stem_and_stages(preact: str | None, norm: str | None) -> Family:
    """Return the family of networks whose modules are called ``stem``, ``stage1``, ….

    ``preact`` and ``norm`` are paths inside the last block of a stage; None if it has no such tensor or module.
    """

    def paths(model: nn.Module) -> Paths:
        found = {"stem": "stem"}
        for number in range(1, 5):
            if hasattr(model, f"stage{number}"):
                last = _children(model, f"stage{number}")[-1]
                found |= stage_entry(number, f"stage{number}", *(path and f"{last}.{path}" for path in (preact, norm)))
        return found | head(model)

    return paths


def _resnet(model: nn.Module) -> Paths:
    """Return the paths of torchvision's and this project's ResNets."""
    # A block calls one ReLU module several times. The last call follows the sum, so its input is ``.preact``.
    found = {"stem": "maxpool" if isinstance(model, ResNet) else "relu"}
    for number in range(1, 5):
        if hasattr(model, f"layer{number}"):
            last = _children(model, f"layer{number}")[-1]
            norm = "bn3" if isinstance(model.get_submodule(last), Bottleneck) else "bn2"
            found |= stage_entry(number, f"layer{number}", f"{last}.relu:in", f"{last}.{norm}")
    return found | head(model)


def _cifar_wrn(model: nn.Module) -> Paths:
    """Return the paths of the activated maps: a stage's activation is in the first block of the next stage."""
    found = {"stem": "layer1.0.relu1"}
    for number, block in enumerate(("layer2.0.", "layer3.0.", ""), start=1):
        found |= stage_entry(number, f"{block}relu1", f"{block}bn1", f"{block}bn1")
    return found | head(model)


def _mobile(model: nn.Module) -> Paths:
    """Return the paths of MobileNetV2, V3 and EfficientNet: linear bottlenecks, and a last activated convolution.

    A bottleneck stage ends before a block that halves the map. The stem has half the image's width, stage 1 a quarter.
    """
    blocks = _children(model, "features")
    halving = [number for number, block in enumerate(blocks) if _halves(model.get_submodule(block))]
    found = {"stem": blocks[0]}
    for number, start in enumerate(halving[2:], start=1):
        end = blocks[start - 1]
        found |= stage_entry(number, end, norm=_last_norm(model, end))
    last = blocks[-1]
    average = {} if hasattr(model, "avgpool") else {"map": last}  # MobileNetV2 averages without a module
    return found | stage_entry(4, last, f"{last}.2:in", f"{last}.1") | average | head(model)


def _vgg(model: nn.Module) -> Paths:
    """Return the paths of the last activation, before pooling, of each of the five blocks; the first is the stem."""
    layers = _children(model, "features")
    pools = [number for number, path in enumerate(layers) if isinstance(model.get_submodule(path), nn.MaxPool2d)]
    found = {"stem": layers[pools[0] - 1]}
    for number, pool in enumerate(pools[1:], start=1):
        relu, before = layers[pool - 1], layers[pool - 2]
        normed = isinstance(model.get_submodule(before), nn.BatchNorm2d)
        found |= stage_entry(number, relu, f"{relu}:in", before if normed else None)
    return found | head(model)


def _shufflenet_v2(model: nn.Module) -> Paths:
    """Return the paths of torchvision's ShuffleNetV2."""
    # Only the last stage has one tensor before its activation. In the others, each half of the channels is activated
    # separately, so they have no ``.preact``.
    found = {"stem": "conv1", "stage1": "maxpool", "stage2": "stage2", "stage3": "stage3", "map": "conv5"}
    return found | stage_entry(4, "conv5", "conv5.2:in", "conv5.1") | head(model)


def _regnet(model: nn.Module) -> Paths:
    found = {"stem": "stem"}
    for number in range(1, 5):
        last = _children(model, f"trunk_output.block{number}")[-1]
        found |= stage_entry(number, f"trunk_output.block{number}", f"{last}.activation:in", f"{last}.f.c.1")
    return found | head(model)


def _densenet(model: nn.Module) -> Paths:
    """Return the paths of the dense blocks' concatenations, before activation."""
    # The activated map cannot be tapped after the last block: the network overwrites that activation's input in place.
    found = {"stem": "features.pool0"}
    for number in range(1, 5):
        found |= stage_entry(number, f"features.denseblock{number}")
    return found | head(model)


def _convnext(model: nn.Module) -> Paths:
    found = {"stem": "features.0"}
    for number in range(1, 5):
        found |= stage_entry(number, f"features.{2 * number - 1}")
    return found | head(model)


def _swin(model: nn.Module) -> Paths:
    """Return the paths of the stages, with channels last; the last stage ends after the network's LayerNorm."""
    found = {"stem": "features.0:nhwc"}
    for number in range(1, 4):
        found |= stage_entry(number, f"features.{2 * number - 1}:nhwc")
    return found | stage_entry(4, "norm:nhwc") | head(model)


def _vision_transformer(model: nn.Module) -> Paths:
    """Return the paths of the tokens after each quarter of the layers; the last stage ends after the LayerNorm."""
    layers = _children(model, "encoder.layers")
    found = {"stem": "conv_proj"}
    for number, end in enumerate(quarters(layers)[:-1], start=1):
        found |= stage_entry(number, f"{end}:tokens")
    return found | stage_entry(4, "encoder.ln:tokens") | head(model)


def quarters(layers: list[str]) -> list[str]:
    """Return the last layer of each quarter of ``layers``."""
    return [layers[number * len(layers) // 4 - 1] for number in range(1, 5)]


def _children(model: nn.Module, path: str) -> list[str]:
    """Return the paths of the children of the module at ``path``, in order."""
    return [f"{path}.{name}" for name, _ in model.get_submodule(path).named_children()]


def _first(model: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(getattr(model, name, None), nn.Module)), None)


def _is_global_average(module: nn.Module) -> bool:
    return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))


def _halves(block: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) and module.stride == (2, 2) for module in block.modules())


def _last_norm(model: nn.Module, path: str) -> str:
    """Return the path of the last BatchNorm inside the module at ``path``."""
    return [f"{path}.{n}" for n, m in model.get_submodule(path).named_modules() if isinstance(m, nn.BatchNorm2d)][-1]


FAMILIES: dict[type[nn.Module], Family] = {
    CifarResNet: _resnet,
    CifarWideResNet: _cifar_wrn,
    CifarVGG: _stem_and_stages("2:in", "1"),
    CifarMobileNetV2: _stem_and_stages(None, "layers.2.1"),
    CifarShuffleNetV1: _stem_and_stages("relu:in", "widen.1"),
    CifarShuffleNetV2: _stem_and_stages("relu:in", None),
    MobileNetV1: _stem_and_stages("1.2:in", "1.1"),
    ResNet: _resnet,
    MobileNetV2: _mobile,
    MobileNetV3: _mobile,
    EfficientNet: _mobile,
    VGG: _vgg,
    ShuffleNetV2: _shufflenet_v2,
    RegNet: _regnet,
    DenseNet: _densenet,
    ConvNeXt: _convnext,
    SwinTransformer: _swin,
    VisionTransformer: _vision_transformer,
}
