"""The module paths of the canonical stages, for each family of networks. ``pipeline.models.stages`` explains stages.

A family is a function from a network to the module path of each stage, and an entry of ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torchvision.models import (
    VGG,
    AlexNet,
    ConvNeXt,
    DenseNet,
    EfficientNet,
    GoogLeNet,
    Inception3,
    MaxVit,
    MNASNet,
    MobileNetV2,
    MobileNetV3,
    RegNet,
    ResNet,
    ShuffleNetV2,
    SqueezeNet,
    SwinTransformer,
    VisionTransformer,
)
from torchvision.models.resnet import Bottleneck
from torchvision.ops import Conv2dNormActivation

from pipeline.models.cifar_mobilenet_v2 import CifarMobileNetV2
from pipeline.models.cifar_resnet import CifarResNet
from pipeline.models.cifar_shufflenet_v1 import CifarShuffleNetV1
from pipeline.models.cifar_shufflenet_v2 import CifarShuffleNetV2
from pipeline.models.cifar_vgg import CifarVGG
from pipeline.models.cifar_wrn import CifarWideResNet
from pipeline.models.detector import Detector
from pipeline.models.mobilenet_v1 import MobileNetV1
from pipeline.models.segmenter import Segmenter
from pipeline.models.super_resolution import Enlarger

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
    return {"stem": "maxpool" if isinstance(model, ResNet) else "relu"} | _residual_stages(model) | head(model)


def _residual_stages(model: nn.Module, prefix: str = "") -> Paths:
    """Return the paths of the stages of a ResNet, whose own path is ``prefix``, with a dot at its end."""
    # A block calls one ReLU module several times. The last call follows the sum, so its input is ``.preact``.
    found: Paths = {}
    for number in range(1, 5):
        if hasattr(model.get_submodule(prefix.rstrip(".")), f"layer{number}"):
            last = _children(model, f"{prefix}layer{number}")[-1]
            norm = "bn3" if isinstance(model.get_submodule(last), Bottleneck) else "bn2"
            found |= stage_entry(number, f"{prefix}layer{number}", f"{last}.relu:in", f"{last}.{norm}")
    return found


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


def _mnasnet(model: nn.Module) -> Paths:
    """Return the paths of linear bottlenecks, and of the last activated convolution, which is averaged."""
    layers = _children(model, "layers")
    stacks = [path for path in layers if isinstance(model.get_submodule(path), nn.Sequential)]
    halving = [number for number, path in enumerate(layers) if path in stacks and _halves(model.get_submodule(path))]
    found = {"stem": layers[halving[0] - 1], "map": layers[-1]}
    for number, start in enumerate(halving[1:], start=1):
        found |= stage_entry(number, layers[start - 1], norm=_last_norm(model, layers[start - 1]))
    return found | stage_entry(4, layers[-1], f"{layers[-1]}:in", layers[-2]) | head(model)


def _alexnet(model: nn.Module) -> Paths:
    """Return the paths of the maps before each pool, and of the last pool."""
    # The head flattens the last map, so nothing is averaged for a linear layer: there is no ``map``.
    found = {"stem": "features.1"}
    for number, relu in enumerate(("features.1", "features.4", "features.11"), start=1):
        found |= stage_entry(number, relu, f"{relu}:in")
    return found | stage_entry(4, "features.12") | head(model)


def _squeezenet(model: nn.Module) -> Paths:
    """Return the paths of the last fire module before each pool; the image is halved four times only."""
    layers = _children(model, "features")
    pools = [number for number, path in enumerate(layers) if isinstance(model.get_submodule(path), nn.MaxPool2d)]
    found = {"stem": layers[pools[0] - 1], "logits": "classifier"}
    for number, end in enumerate((*pools[1:], len(layers)), start=1):
        fire = layers[end - 1]
        halves = [f"{fire}.{name}_activation:in" for name in ("expand1x1", "expand3x3")]
        found |= stage_entry(number, fire, "|".join(halves))
    return found


def _googlenet(model: nn.Module) -> Paths:
    """Return the paths of the last inception module before each pool; a branch ends in BatchNorm and ReLU."""
    norms = {name: "|".join(f"{name}.{branch}.bn:copy" for branch in _BRANCHES) for name in _ENDS}
    found = {"stem": "conv1"} | stage_entry(1, "conv3", "conv3.bn:copy", "conv3.bn")
    for number, name in enumerate(_ENDS, start=2):
        found |= stage_entry(number, name, norms[name])
    return found | head(model)


def _inception(model: nn.Module) -> Paths:
    """Return the paths of the last inception module before each that halves the map."""
    found = {"stem": "Conv2d_2b_3x3"} | stage_entry(1, "Conv2d_4a_3x3", "Conv2d_4a_3x3.bn:copy", "Conv2d_4a_3x3.bn")
    for number, (name, branches) in enumerate(_MIXED.items(), start=2):
        found |= stage_entry(number, name, "|".join(f"{name}.{branch}.bn:copy" for branch in branches.split()))
    return found | head(model)


_BRANCHES, _ENDS = ("branch1", "branch2.1", "branch3.1", "branch4.1"), ("inception3b", "inception4e", "inception5b")
_MIXED = {
    "Mixed_5d": "branch1x1 branch5x5_2 branch3x3dbl_3 branch_pool",
    "Mixed_6e": "branch1x1 branch7x7_3 branch7x7dbl_5 branch_pool",
    "Mixed_7c": "branch1x1 branch3x3_2a branch3x3_2b branch3x3dbl_3a branch3x3dbl_3b branch_pool",
}
"""The last module of each stage of Inception v3, with the last convolutions of its branches in their order."""


def _maxvit(model: nn.Module) -> Paths:
    # A multilayer head follows the average, so no ``map`` is averaged for the last linear layer.
    found = {"stem": "stem"}
    for number, block in enumerate(_children(model, "blocks"), start=1):
        found |= stage_entry(number, block)
    return found | head(model)


def _shufflenet_v2(model: nn.Module) -> Paths:
    """Return the paths of torchvision's ShuffleNetV2.

    A stage's last activation is of half of the channels, so ``.preact`` has that half only.
    """
    found = {"stem": "conv1", "map": "conv5"} | stage_entry(1, "maxpool")
    for number in (2, 3):
        last = _children(model, f"stage{number}")[-1]
        found |= stage_entry(number, f"stage{number}", f"{last}.branch2.7:in", f"{last}.branch2.6")
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


def _segmenter(model: nn.Module) -> Paths:
    """Return the paths of a backbone's stages, of ``decode``, the input of the last convolution, and of the heads."""
    if hasattr(model.backbone, "layer1"):
        found = {"stem": "backbone.maxpool"} | _residual_stages(model, "backbone.")
    elif hasattr(model.backbone, "stage1"):
        found = _plain_stages(model, "backbone.")
    else:
        found = _mobile_backbone(model)
    layers = _children(model, "classifier")
    first = len(layers) - 1
    # Taken before dropout, so that losses compare features without its noise.
    while isinstance(model.get_submodule(layers[first - 1]), nn.Dropout):
        first -= 1
    # LRASPP adds up the answers of its two last convolutions; the deeper one is the last.
    logits = layers[-1] if isinstance(model.classifier, nn.Sequential) else "classifier"
    aux = {} if model.aux_classifier is None else {"aux": "aux_classifier"}
    return found | {"decode": f"{layers[first]}:in", "logits": logits} | aux


def _detector(model: nn.Module) -> Paths:
    """Return the paths of a backbone's stages, under both of their names, and of pyramid, heads and boxes."""
    assert isinstance(model, Detector)
    body = "backbone.body."
    if hasattr(model.get_submodule("backbone.body"), "layer1"):
        found = {"stem": f"{body}maxpool"} | _residual_stages(model, body)
    else:
        found = _plain_stages(model, body)
    of_backbone = {f"backbone.{name}": path for name, path in found.items() if "." not in name and name != "stem"}
    return found | of_backbone | model.tap_paths()


def _enlarger(model: nn.Module) -> Paths:
    """Return the paths of a network of super-resolution."""
    assert isinstance(model, Enlarger)
    return model.tap_paths()


def _plain_stages(model: nn.Module, prefix: str) -> Paths:
    """Return the paths of stages of convolution, BatchNorm and ReLU in the module whose path is ``prefix``."""
    found: Paths = {}
    for number in range(1, 5):
        last = _children(model, f"{prefix}stage{number}")[-1]
        found |= stage_entry(number, f"{prefix}stage{number}", f"{last}.2:in", f"{last}.1")
    return found


def _mobile_backbone(model: nn.Module) -> Paths:
    """Return the paths of the stages of a MobileNetV2 or V3 in which dilation replaces the last strides."""
    blocks = _children(model, "backbone")
    # Torchvision marks the blocks that halve the map in the classification network.
    halving = [number for number, path in enumerate(blocks) if getattr(model.get_submodule(path), "_is_cn", False)]
    found = {"stem": blocks[0]}
    for number, start in enumerate([*halving[1:], len(blocks)], start=1):
        end = blocks[start - 1]
        activation = f"{end}.2:in" if isinstance(model.get_submodule(end), Conv2dNormActivation) else None
        found |= stage_entry(number, end, activation, _last_norm(model, end))
    return found


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
    Segmenter: _segmenter,
    Detector: _detector,
    Enlarger: _enlarger,
    MobileNetV1: _stem_and_stages("1.2:in", "1.1"),
    ResNet: _resnet,
    MobileNetV2: _mobile,
    MobileNetV3: _mobile,
    EfficientNet: _mobile,
    VGG: _vgg,
    AlexNet: _alexnet,
    SqueezeNet: _squeezenet,
    GoogLeNet: _googlenet,
    Inception3: _inception,
    MNASNet: _mnasnet,
    MaxVit: _maxvit,
    ShuffleNetV2: _shufflenet_v2,
    RegNet: _regnet,
    DenseNet: _densenet,
    ConvNeXt: _convnext,
    SwinTransformer: _swin,
    VisionTransformer: _vision_transformer,
}
