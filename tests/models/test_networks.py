"""The networks are the literature's: their parameters, their multiply-accumulates, and where their stages lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models import create_model, known_models
from pipeline.models.stages import find_stage, stages
from pipeline.models.weights import load_weights
from pipeline.taps import FeatureTaps, tap_shapes

# name: parameters at 100 classes, MMAC of one 32-pixel image
CIFAR = {
    "cifar_resnet8": (83_892, 12.5),
    "cifar_resnet20": (278_324, 40.8),
    "cifar_resnet32": (472_756, 69.1),
    "cifar_resnet56": (861_620, 125.8),
    "cifar_resnet110": (1_736_564, 253.2),
    "cifar_resnet8x4": (1_233_540, 177.1),
    "cifar_resnet32x4": (7_433_860, 1083.0),
}
# name: parameters at 1,000 classes, GMAC of one 224-pixel image, channels of stages 1 to 4 (56 to 7 pixels wide)
IMAGENET = {
    "resnet18": (11_689_512, 1.814, (64, 128, 256, 512)),
    "resnet34": (21_797_672, 3.664, (64, 128, 256, 512)),
    "resnet50": (25_557_032, 4.089, (256, 512, 1024, 2048)),
    "mobilenet_v1": (4_231_976, 0.569, (128, 256, 512, 1024)),
    "mobilenet_v2": (3_504_872, 0.301, (24, 32, 96, 1280)),
    "efficientnet_b0": (5_288_548, 0.386, (24, 40, 112, 1280)),
}


def on_meta(name: str, num_classes: int) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, num_classes)


def all_shapes(model: nn.Module, image_size: int) -> dict[str, tuple[int, ...]]:
    return tap_shapes(FeatureTaps(model, stages(model), stages(model)), image_size)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, image_size: int) -> float:
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, image_size, image_size, device="meta"))
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


@pytest.mark.parametrize(
    ("name", "widths"), [("cifar_resnet20", (16, 16, 32, 64)), ("cifar_resnet8x4", (32, 64, 128, 256))]
)
def test_the_stages_of_a_cifar_network_lie_at_32_16_and_8_pixels(name: str, widths: tuple[int, ...]):
    shapes = all_shapes(on_meta(name, 100), 32)
    named = zip(("stem", "stage1", "stage2", "stage3"), widths, (32, 32, 16, 8), strict=True)
    expected = {stage: (channels, side, side) for stage, channels, side in named}
    assert {stage: shapes[stage] for stage in expected} == expected
    assert all(shapes[f"{stage}.preact"] == expected[stage] for stage in ("stage1", "stage2", "stage3"))
    assert shapes["embedding"] == (widths[-1],)
    assert shapes["logits"] == (100,)


@pytest.mark.parametrize("name", IMAGENET)
def test_the_stages_of_an_imagenet_network_lie_at_56_to_7_pixels(name: str):
    shapes = all_shapes(on_meta(name, 1000), 224)
    widths = IMAGENET[name][2]
    for number, (channels, side) in enumerate(zip(widths, (56, 28, 14, 7), strict=True), start=1):
        assert shapes[f"stage{number}"] == shapes[f"stage{number}.preact"] == (channels, side, side)
    assert shapes["embedding"] == (widths[-1],)
    assert shapes["logits"] == (1000,)


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


def test_known_models_are_classifiers_of_torchvision_and_our_own():
    assert {"resnet50", "swin_t", "mobilenet_v1", "cifar_resnet32x4"} <= set(known_models())
    assert not {"fcn_resnet50", "raft_small"} & set(known_models())


def tiny_factory(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


def a_number(num_classes: int) -> int:
    return num_classes


def test_a_users_factory_is_called_with_the_number_of_classes():
    assert create_model(f"{__name__}:tiny_factory", 7)(torch.zeros(1, 3, 8, 8)).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.at_all:factory", "no model factory at 'nowhere.at_all:factory'"),
        (f"{__name__}:missing", "missing"),
        (f"{__name__}:a_number", "returned a int, expected a torch.nn.Module"),
    ],
)
def test_a_factory_that_gives_no_network_is_refused(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        create_model(name, 7)


def test_last_is_the_deepest_stage_of_each_network():
    deepest = {"cifar_resnet8": "layer3", "resnet18": "layer4", "mobilenet_v1": "stage4"}
    for name, path in deepest.items():
        assert find_stage(stages(on_meta(name, 10)), "last") == path
    assert find_stage({"stage9": "a", "stage10": "b", "stage10.preact": "c"}, "last.preact") == "c"


def test_an_unknown_network_with_an_obvious_head_has_embedding_and_logits_only():
    assert set(stages(on_meta("densenet121", 10))) == {"embedding", "logits"}
    assert stages(tiny_factory(num_classes=3)) == {}


def test_an_unknown_stage_is_refused_with_what_there_is_and_what_to_write():
    with pytest.raises(
        ValueError,
        match=r"^the network has no stage 'stage4': it has stem, stage1,.*stages: \{stage4: <module path>\}$",
    ):
        find_stage(stages(on_meta("cifar_resnet8", 10)), "stage4")
    with pytest.raises(ValueError, match="no stage 'last': none is known; name it by stages"):
        find_stage({}, "last")
