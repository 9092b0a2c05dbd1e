"""The networks are the literature's: their parameters, their multiply-accumulates, and what they are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.shufflenetv2 import InvertedResidual

from pipeline.features.taps import FeatureTaps
from pipeline.models import create_model, known_models, pisr, super_resolution
from pipeline.models.cifar_mobilenet_v2 import LinearBottleneck
from pipeline.models.cifar_shufflenet_v2 import ShuffleUnitV2
from pipeline.models.create import PROJECT_MODELS
from pipeline.models.stages import stages
from pipeline.models.weights import load_weights

# name: parameters at 100 classes, MMAC of one 32-pixel image
CIFAR = {
    "cifar_resnet8": (83_892, 12.5),
    "cifar_resnet20": (278_324, 40.8),
    "cifar_resnet32": (472_756, 69.1),
    "cifar_resnet56": (861_620, 125.8),
    "cifar_resnet110": (1_736_564, 253.2),
    "cifar_resnet8x4": (1_233_540, 177.1),
    "cifar_resnet32x4": (7_433_860, 1083.0),
    "cifar_resnet50": (23_705_252, 1298.0),
    "cifar_wrn_16_1": (180_916, 26.7),
    "cifar_wrn_16_2": (703_284, 101.1),
    "cifar_wrn_40_1": (569_780, 83.3),
    "cifar_wrn_40_2": (2_255_156, 327.6),
    "cifar_vgg8": (3_965_028, 96.2),
    "cifar_vgg13": (9_462_180, 284.9),
    "cifar_mobilenet_v2": (812_836, 6.5),
    "cifar_shufflenet_v1": (949_258, 38.7),
    "cifar_shufflenet_v2": (1_355_528, 44.5),
}
# name: parameters at 1,000 classes, GMAC of one 224-pixel image
IMAGENET = {
    "resnet18": (11_689_512, 1.814),
    "resnet34": (21_797_672, 3.664),
    "resnet50": (25_557_032, 4.089),
    "mobilenet_v1": (4_231_976, 0.569),
    "mobilenet_v2": (3_504_872, 0.301),
    "efficientnet_b0": (5_288_548, 0.386),
}
# name: parameters at 19 classes, GMAC of an image of 512 × 1024 pixels with the auxiliary head
SEGMENTATION = {
    "fcn_resnet50": (35_320_678, 296.1),
    "fcn_resnet101": (54_312_806, 451.3),
    "deeplabv3_resnet50": (42_003_046, 346.5),
    "deeplabv3_resnet101": (60_995_174, 501.7),
    "deeplabv3_mobilenet_v3_large": (11_028_792, 19.7),
    "lraspp_mobilenet_v3_large": (3_221_198, 3.9),
    "deeplabv3_resnet18": (13_459_494, 114.4),
    "deeplabv3_resnet34": (23_567_654, 199.0),
    "deeplabv3_mobilenet_v2": (3_233_171, 26.6),
    "pspnet_resnet18": (12_770_854, 107.2),
    "pspnet_resnet34": (22_879_014, 191.7),
    "plain_fpn": (344_419, 2.8),
}
# Parameters for 80 and for 91 classes, and for 80 the GMAC of backbone and pyramid, and of the whole.
DETECTION = {
    "retinanet_resnet18": (20_820_276, 21_048_471, 53.0, 197.8),
    "retinanet_resnet34": (30_928_436, 31_156_631, 92.7, 237.4),
    "retinanet_resnet50": (33_839_924, 34_068_119, 104.6, 249.4),
    "retinanet_resnet50_v2": (37_970_740, 38_198_935, 105.8, 250.5),
    "retinanet_resnet101": (52_832_052, 53_060_247, 184.2, 328.9),
    "retinanet_resnext101_64x4d": (91_738_164, 91_966_359, 348.3, 493.0),
    "fcos_resnet18": (19_277_717, 19_303_072, 53.0, 163.1),
    "fcos_resnet34": (29_385_877, 29_411_232, 92.7, 202.8),
    "fcos_resnet50": (32_297_365, 32_322_720, 104.6, 214.7),
    "fcos_resnet101": (51_289_493, 51_314_848, 184.2, 294.3),
    "fcos_resnext101_64x4d": (90_195_605, 90_220_960, 348.3, 458.4),
    "plain_retinanet": (480_520, 499_594, 3.1, 6.6),
    "fasterrcnn_resnet18": (28_688_356, 28_739_606, 93.6, 161.0),
    "fasterrcnn_resnet34": (38_796_516, 38_847_766, 133.2, 200.7),
    "fasterrcnn_resnet50": (41_757_156, 41_808_406, 148.5, 215.9),
    "fasterrcnn_resnet50_v2": (43_661_028, 43_712_278, 148.5, 383.3),
    "fasterrcnn_resnet101": (60_749_284, 60_800_534, 228.0, 295.5),
    "fasterrcnn_resnext101_64x4d": (99_655_396, 99_706_646, 392.1, 459.6),
    "plain_fasterrcnn": (596_195, 602_645, 3.1, 3.6),
}
# Those with a stem of three convolutions, as the published tables of Cityscapes have it.
DEEP_STEM = {"deeplabv3_resnet18": (13_607_974, 129.4), "pspnet_resnet18": (12_919_334, 122.1)}


def on_meta(name: str, num_classes: int, arguments: dict[str, Any] | None = None) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, num_classes, arguments)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, height: int, width: int | None = None) -> float:
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, height, width or height, device="meta"))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", CIFAR)
def test_a_cifar_network_has_the_published_size(name: str):
    model = on_meta(name, 100)
    assert count(model) == CIFAR[name][0]
    assert macs(model, 32) / 1e6 == pytest.approx(CIFAR[name][1], abs=0.05)


@pytest.mark.parametrize("name", IMAGENET)
def test_an_imagenet_network_has_the_published_size(name: str):
    model = on_meta(name, 1000)
    assert count(model) == IMAGENET[name][0]
    assert macs(model, 224) / 1e9 == pytest.approx(IMAGENET[name][1], abs=0.0005)


def test_the_swin_transformer_has_the_published_size():
    assert count(on_meta("swin_t", 1000)) == 28_288_354


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        *((name, {}, size) for name, size in SEGMENTATION.items()),
        *((name, {"stem": "deep"}, size) for name, size in DEEP_STEM.items()),
    ],
)
def test_a_segmentation_network_has_the_published_size(name: str, arguments: dict[str, Any], size: tuple[int, float]):
    model = on_meta(name, 19, arguments).eval()
    assert count(model) == size[0]
    with_aux = FeatureTaps(model, stages(model), {"aux"} & stages(model).keys())
    assert macs(with_aux, 512, 1024) / 1e9 == pytest.approx(size[1], abs=0.05)


@pytest.mark.parametrize("name", DETECTION)
def test_a_detector_has_the_published_size(name: str):
    parameters, of_coco, of_pyramid, of_all = DETECTION[name]
    model = on_meta(name, 80).eval()
    outputs = 90 if "fasterrcnn" in name else 91  # which has a background of its own
    assert (count(model), count(on_meta(name, outputs))) == (parameters, of_coco)
    for wanted, expected in (((), of_all), (("fpn.p3",), of_pyramid)):
        assert macs(FeatureTaps(model, stages(model), wanted), 800, 1344) / 1e9 == pytest.approx(expected, abs=0.05)
        model = on_meta(name, 80).eval()


@pytest.mark.parametrize(("arguments", "parameters"), [({"width": 16}, 350_470), ({"width": 4, "depth": 1}, 60_474)])
def test_the_networks_of_the_detection_demo_are_small(arguments: dict[str, Any], parameters: int):
    assert count(on_meta("plain_retinanet", 5, arguments)) == parameters


@pytest.mark.parametrize(("arguments", "parameters"), [({"width": 16}, 343_574), ({"width": 4, "depth": 1}, 9_658)])
def test_the_networks_of_the_segmentation_demo_are_small(arguments: dict[str, Any], parameters: int):
    assert count(on_meta("plain_fpn", 6, arguments)) == parameters


def test_every_network_of_ours_is_in_the_tables():
    others = SEGMENTATION.keys() | DETECTION.keys() | super_resolution.MODELS.keys() | pisr.MODELS.keys()
    assert PROJECT_MODELS.keys() == CIFAR.keys() | {"mobilenet_v1"} | others


@pytest.mark.parametrize("name", CIFAR)
def test_a_cifar_network_takes_images_of_64_pixels_too(name: str):
    assert on_meta(name, 7)(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", CIFAR)
def test_a_cifar_network_activates_by_plain_relu_alone(name: str):
    modules = list(on_meta(name, 10).modules())
    assert any(type(module) is nn.ReLU for module in modules)
    assert not any(isinstance(module, (nn.ReLU6, nn.SiLU, nn.Hardswish)) for module in modules)


def test_a_wide_networks_shortcut_is_a_bare_convolution_and_only_where_the_width_changes():
    shortcuts = {
        name: [path for path, _ in on_meta(name, 10).named_modules() if path.endswith("shortcut")]
        for name in ("cifar_wrn_16_1", "cifar_wrn_16_2")
    }
    assert shortcuts["cifar_wrn_16_1"] == ["layer2.0.shortcut", "layer3.0.shortcut"]
    assert shortcuts["cifar_wrn_16_2"] == ["layer1.0.shortcut", "layer2.0.shortcut", "layer3.0.shortcut"]
    assert isinstance(on_meta("cifar_wrn_16_2", 10).get_submodule("layer2.0.shortcut"), nn.Conv2d)


def test_the_first_shuffle_unit_does_not_divide_the_stems_channels():
    convolutions = [m for m in on_meta("cifar_shufflenet_v1", 10).modules() if isinstance(m, nn.Conv2d)]
    pointwise = [m.groups for m in convolutions[1:] if m.kernel_size == (1, 1)]
    assert pointwise == [1, *[3] * 31]


def test_the_second_shuffle_network_computes_what_torchvisions_units_do():
    torch.manual_seed(0)
    ours = ShuffleUnitV2(8, 8, stride=1)
    torchvisions = InvertedResidual(8, 8, stride=1)
    torchvisions.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 8, 5, 5).relu()
    assert torch.equal(ours(x), torchvisions(x))


def test_a_mobile_bottleneck_adds_its_input_only_where_the_shape_stays():
    blocks = [m for m in on_meta("cifar_mobilenet_v2", 10).modules() if isinstance(m, LinearBottleneck)]
    pattern = [1, 2, 3, 4, 3, 3, 1]  # blocks by row of the paper's table; the first of each changes the width
    assert [block.residual for block in blocks] == [place > 0 for count in pattern for place in range(count)]


@pytest.mark.parametrize("name", ["cifar_vgg8", "cifar_mobilenet_v2"])
def test_the_head_of_the_plain_networks_starts_nearly_flat(name: str):
    torch.manual_seed(0)
    head = create_model(name, 100).get_submodule("fc")
    assert isinstance(head, nn.Linear)
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert head.bias.abs().max() == 0


def test_mobilenet_v1_is_thirteen_separable_blocks_with_batchnorm_and_plain_relu_after_each_convolution():
    leaves = [module for module in on_meta("mobilenet_v1", 10).modules() if not list(module.children())]
    convolutions = [module for module in leaves if isinstance(module, nn.Conv2d)]
    assert [module.groups > 1 for module in convolutions] == [False] + [True, False] * 13
    for convolution in convolutions:
        after = leaves[leaves.index(convolution) + 1 :][:2]
        assert [type(module) for module in after] == [nn.BatchNorm2d, nn.ReLU]


def test_convolutions_start_with_variance_two_over_fan_out():
    torch.manual_seed(0)
    convolution = create_model("cifar_resnet8x4", 10).get_submodule("layer3.0.conv2")
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.weight.var().item() == pytest.approx(2 / (256 * 9), rel=0.02)


@pytest.mark.shared
@pytest.mark.parametrize("depth", [20, 56])
def test_published_cifar_weights_load(published_cifar_weights: Path, depth: int):
    model = create_model(f"cifar_resnet{depth}", 100)
    path = published_cifar_weights / f"cifar100_resnet{depth}.pt"
    load_weights(model, str(path), f"cifar_resnet{depth}")
    saved = torch.load(path, weights_only=True)
    assert list(saved) == list(model.state_dict())
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())


def test_a_misspelt_model_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"^there is no model 'resnet_50'; did you mean .*resnet50"):
        create_model("resnet_50", 10)


def test_known_models_are_classifiers_and_segmenters_of_torchvision_and_our_own():
    assert {"resnet50", "swin_t", "mobilenet_v1", "cifar_resnet32x4"} <= set(known_models())
    assert {"fcn_resnet50", *torchvision.models.list_models(torchvision.models.segmentation)} <= set(known_models())
    assert "raft_small" not in known_models()


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_a_network_with_auxiliary_heads_trains_without_them(name: str):
    with torch.device("meta"):
        logits = create_model(name, 10).train()(torch.empty(2, 3, 299, 299))
    assert logits.shape == (2, 10)


def tiny_factory(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


def a_number(num_classes: int) -> int:
    return num_classes


def of_depth(depth: int) -> nn.Module:
    return nn.Linear(depth, depth)


def test_a_users_factory_is_called_with_the_number_of_classes():
    assert create_model(f"{__name__}:tiny_factory", 7)(torch.zeros(1, 3, 8, 8)).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.at_all:factory", "no model factory at 'nowhere.at_all:factory'"),
        (f"{__name__}:missing", "missing"),
        (f"{__name__}:a_number", "returned a int, expected a torch.nn.Module"),
        (
            f"{__name__}:of_depth",
            r":of_depth' is called as of_depth\(num_classes=7\), which fails: missing .* 'depth'$",
        ),
        (
            f"{__name__}:CIFAR",
            r":CIFAR' is called as CIFAR\(num_classes=7\), which fails: .* is not a callable object$",
        ),
    ],
)
def test_a_factory_that_gives_no_network_is_refused(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        create_model(name, 7)
