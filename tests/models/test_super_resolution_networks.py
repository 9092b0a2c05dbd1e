"""Networks that enlarge images: their published sizes, what they compute, and their taps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.bicubic import bicubic_upscaled
from pipeline.features.taps import FeatureTaps
from pipeline.models.arguments import ArgumentError
from pipeline.models.create import create_model
from pipeline.models.stages import stages
from pipeline.models.super_resolution import DIV2K_MEAN, EDSR, FSRCNN, RCAN

SMALL = {"features": 8, "blocks": 3}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "arguments", "millions"),
    [
        ("edsr_baseline", {"scale": 2}, 1.37),
        ("edsr_baseline", {"scale": 3}, 1.55),
        ("edsr_baseline", {"scale": 4}, 1.52),
        ("edsr", {"scale": 2}, 40.73),
        ("edsr", {"scale": 3}, 43.68),
        ("edsr", {"scale": 4}, 43.09),
        ("rcan", {"scale": 4}, 15.59),
        ("rcan", {"scale": 4, "blocks": 6}, 5.17),
    ],
)
def test_networks_have_the_published_number_of_parameters(name: str, arguments: dict[str, Any], millions: float):
    with torch.device("meta"):
        assert round(count(create_model(name, 1, arguments)) / 1e6, 2) == millions


def test_fsrcnn_of_the_luma_has_the_published_number_of_weights():
    network = FSRCNN(scale=3, colours=1)
    weights = sum(each.numel() for each in network.parameters() if each.ndim > 1)
    assert weights == 12_464
    assert round(count(network) / 1000, 1) == 12.6


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("fsrcnn", {"features": 8}), ("edsr_baseline", SMALL), ("rcan", {**SMALL, "groups": 2, "reduction": 4})],
)
def test_an_image_of_any_size_becomes_larger(name: str, arguments: dict[str, Any], scale: int, residual: bool):
    network = create_model(name, 1, {**arguments, "scale": scale, "residual": residual}).eval()
    images = torch.rand(2, 3, 7, 10)
    with torch.no_grad():
        large = network(images)
        for parameter in network.parameters():
            parameter.zero_()
        empty = network(images)
    assert large.shape == (2, 3, 7 * scale, 10 * scale)
    if residual:
        torch.testing.assert_close(empty, bicubic_upscaled(images, scale))
    elif name != "fsrcnn":
        torch.testing.assert_close(empty, torch.tensor(DIV2K_MEAN)[:, None, None].expand_as(empty))


def conv(x: Tensor, layer: nn.Module) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.kernel_size[0] // 2)


def test_edsr_computes_what_its_paper_says():
    torch.manual_seed(0)
    network = EDSR(scale=4, **SMALL, residual_scale=0.1).double()
    mean = torch.tensor(DIV2K_MEAN).double()[:, None, None]
    images = torch.rand(1, 3, 6, 5).double()
    first = x = conv(255 * (images - mean), network.head)
    for block in network.body:
        x = x + 0.1 * conv(conv(x, block.get_submodule("conv1")).relu(), block.get_submodule("conv2"))
    x = conv(x, network.body_conv) + first
    for step in network.upsampler:
        x = F.pixel_shuffle(conv(x, step.get_submodule("0")), 2)
    torch.testing.assert_close(network(images), conv(x, network.tail) / 255 + mean, rtol=1e-6, atol=1e-6)


def test_a_block_of_rcan_weighs_its_channels_by_their_means():
    torch.manual_seed(0)
    block = RCAN(scale=2, features=8, groups=1, blocks=1, reduction=4).body[0].get_submodule("blocks.0").double()
    x = torch.rand(2, 8, 5, 6).double()
    y = conv(conv(x, block.get_submodule("conv1")).relu(), block.get_submodule("conv2"))
    hidden = conv(y.mean((2, 3), keepdim=True), block.get_submodule("attention.1")).relu()
    weights = conv(hidden, block.get_submodule("attention.3")).sigmoid()
    torch.testing.assert_close(block(x), x + weights * y)


@pytest.mark.parametrize(
    ("name", "arguments", "paths"),
    [
        ("edsr_baseline", {}, {"stem": "head", "stage1": "body.4", "stage2": "body.10", "stage3": "stage3"}),
        ("rcan", {}, {"stem": "head", "stage1": "body.2", "stage2": "body.6", "stage3": "stage3"}),
        ("edsr_baseline", {"blocks": 1}, {"stem": "head", "stage1": "body.0", "stage2": "body.0", "stage3": "stage3"}),
    ],
)
def test_stages_are_the_thirds_of_the_body(name: str, arguments: dict[str, Any], paths: dict[str, str]):
    with torch.device("meta"):
        assert stages(create_model(name, 1, {"scale": 2, **arguments})) == paths


def test_taps_have_the_size_of_the_small_image_and_the_last_is_after_the_skip():
    taps = FeatureTaps(model := EDSR(scale=2, **SMALL), stages(model), ["stage1", "stage3"])
    images = torch.rand(1, 3, 6, 5)
    outputs = taps(images)
    assert {name: map_BCHW.shape for name, map_BCHW in outputs.features.items()} == {
        "stage1": (1, 8, 6, 5),
        "stage3": (1, 8, 6, 5),
    }
    large = model.tail(model.upsampler(outputs.features["stage3"])) / 255 + model.mean_C11
    torch.testing.assert_close(outputs.logits, large)
    fsrcnn = FSRCNN(scale=2)
    assert FeatureTaps(fsrcnn, stages(fsrcnn), ["expanding"])(images).features["expanding"].shape == (1, 56, 6, 5)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("edsr", {"scale": 5}, "edsr cannot be built with .*: scale: expected 2, 3, 4 or 8, got 5"),
        ("rcan", {"scale": 2, "reduction": 65}, "reduction: expected 1 to 64, the features, got 65"),
        ("fsrcnn", {"scale": 2, "width": 2}, "fsrcnn takes no argument 'width'; it takes scale, features"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_one_line(name: str, arguments: dict[str, Any], message: str):
    with pytest.raises(ArgumentError, match=message):
        create_model(name, 1, arguments)
