"""Segmentation networks: their pieces are torchvision's, their taps are at the known resolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook

from pipeline.features.names import tap_names
from pipeline.features.taps import FeatureTaps, tap_shapes
from pipeline.models import create_model
from pipeline.models.arguments import ArgumentError
from pipeline.models.segmentation_heads import PyramidPooling
from pipeline.models.segmenter import Segmenter
from pipeline.models.stages import stages

TORCHVISIONS = torchvision.models.list_models(torchvision.models.segmentation)
# name, arguments: (channels, ratio of the image's width to the map's) of stage 1, …, stage 4, decode and logits
MAPS = {
    "deeplabv3_resnet50": ({}, [(256, 4), (512, 8), (1024, 8), (2048, 8), (256, 8), (7, 8)]),
    "fcn_resnet50": ({"output_stride": 16}, [(256, 4), (512, 8), (1024, 16), (2048, 16), (512, 16), (7, 16)]),
    "deeplabv3_mobilenet_v3_large": ({}, [(24, 4), (40, 8), (112, 16), (960, 16), (256, 16), (7, 16)]),
    "lraspp_mobilenet_v3_large": ({}, [(24, 4), (40, 8), (112, 16), (960, 16), (128, 8), (7, 8)]),
    "deeplabv3_resnet18": ({"stem": "deep"}, [(64, 4), (128, 8), (256, 8), (512, 8), (128, 8), (7, 8)]),
    "deeplabv3_resnet34": ({"output_stride": 16}, [(64, 4), (128, 8), (256, 16), (512, 16), (128, 16), (7, 16)]),
    "pspnet_resnet18": ({"width": 0.25}, [(16, 4), (32, 8), (64, 8), (128, 8), (32, 8), (7, 8)]),
    "deeplabv3_mobilenet_v2": ({}, [(24, 4), (32, 8), (96, 8), (320, 8), (128, 8), (7, 8)]),
    "plain_fpn": ({}, [(16, 2), (32, 4), (64, 8), (128, 16), (64, 4), (7, 4)]),
}
SMALL: list[tuple[str, dict[str, Any]]] = [
    ("deeplabv3_resnet18", {"width": 0.125}),
    ("pspnet_resnet18", {"width": 0.125, "stem": "deep"}),
    ("deeplabv3_mobilenet_v2", {"width": 0.25, "aux": True}),
    ("deeplabv3_mobilenet_v3_large", {}),
    ("lraspp_mobilenet_v3_large", {}),
    ("plain_fpn", {"width": 4}),
]


def small(name: str, arguments: dict[str, Any], *wanted: str) -> FeatureTaps:
    torch.manual_seed(0)
    model = create_model(name, 7, arguments)
    return FeatureTaps(model, stages(model), wanted)


def images(height: int = 64, width: int = 96) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", TORCHVISIONS)
def test_a_network_of_torchvisions_is_torchvisions_without_the_enlargement(name: str):
    torch.manual_seed(0)
    plain = torchvision.models.get_model(
        name,
        weights=None,
        weights_backbone=None,
        num_classes=5,
        **({} if name.startswith("lraspp") else {"aux_loss": True}),
    )
    ours = create_model(name, 5)
    ours.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(plain.state_dict())
    taps = FeatureTaps(ours, stages(ours), {"aux"} & stages(ours).keys()).eval()
    with torch.no_grad():
        expected, found = plain.eval()(images()), taps(images())
    maps = {"out": found.logits, **found.features}
    assert maps.keys() == expected.keys()
    for key, value in maps.items():
        enlarged = F.interpolate(value, (64, 96), mode="bilinear", align_corners=False)
        assert torch.equal(enlarged, expected[key])


@pytest.mark.parametrize("name", MAPS)
def test_the_taps_of_a_segmentation_network_lie_at_these_resolutions(name: str):
    arguments, maps = MAPS[name]
    with torch.device("meta"):
        model = create_model(name, 7, arguments)
    named = stages(model)
    shapes = tap_shapes(FeatureTaps(model, named, tap_names(named)), (64, 128))
    expected = {f"stage{n}": maps[n - 1] for n in range(1, 5)} | {"decode": maps[4], "logits": maps[5]}
    assert {key: shapes[key] for key in expected} == {k: (c, 64 // s, 128 // s) for k, (c, s) in expected.items()}
    assert ("aux" in named) == (model.aux_classifier is not None)
    for number in range(1, 5):
        assert shapes[f"stage{number}.preact"] == shapes[f"stage{number}"]
        norm = model.get_submodule(named[f"stage{number}.norm"])
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.num_features == maps[number - 1][0]


@pytest.mark.parametrize(("name", "arguments"), SMALL)
def test_decode_is_what_the_last_convolution_reads_and_logits_what_it_returns(name: str, arguments: dict[str, Any]):
    taps = small(name, arguments, "decode", "logits", "stage2").eval()
    with torch.no_grad():
        outputs = taps(images())
    assert torch.equal(outputs.features["logits"], outputs.logits)
    classifier = taps.model.classifier
    if name.startswith("lraspp"):
        low = classifier.low_classifier(taps.model.backbone(images())["low"])
        answer = classifier.high_classifier(outputs.features["decode"]) + low
    else:
        answer = classifier[-1](outputs.features["decode"])
    torch.testing.assert_close(answer, outputs.logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "arguments"), [SMALL[0], SMALL[1], SMALL[-1]])
def test_a_stage_of_a_segmentation_network_is_its_pre_activation_activated(name: str, arguments: dict[str, Any]):
    features = small(name, arguments, "all", "all.preact")(images()).features
    assert (features["stage4.preact"] < 0).any()
    for stage in ("stage1", "stage2", "stage3", "stage4"):
        assert torch.equal(features[stage], features[f"{stage}.preact"].relu())


def test_the_auxiliary_head_runs_only_where_a_tap_reads_it():
    for wanted in ((), ("stage3",), ("aux",)):
        taps = small("deeplabv3_resnet18", {"width": 0.125}, *wanted)
        ran: list[nn.Module] = []
        with register_module_forward_pre_hook(lambda module, _args, ran=ran: ran.append(module)):
            for mode in (True, False):
                assert taps.train(mode)(images()).features.keys() == set(wanted)
        assert ran.count(taps.model.classifier) == 2
        assert ran.count(taps.model.aux_classifier) == (2 if "aux" in wanted else 0)


def test_reading_the_auxiliary_head_does_not_change_the_logits():
    logits = []
    for wanted in ((), ("aux",)):
        taps = small("deeplabv3_resnet18", {"width": 0.125}, *wanted)
        torch.manual_seed(3)
        logits.append(taps(images()).logits)  # with dropout
    assert torch.equal(*logits)


def test_the_losses_of_both_heads_reach_all_parameters():
    for name, arguments in SMALL:
        taps = small(name, arguments, *({"aux"} & stages(create_model(name, 7, arguments)).keys()))
        outputs = taps(images())
        (outputs.logits.square().mean() + sum(value.square().mean() for value in outputs.features.values())).backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in taps.parameters())


@pytest.mark.parametrize(
    ("stride", "expected"),
    [(8, {"layer3": [1, 2, 2, 2], "layer4": [2, 4, 4, 4]}), (16, {"layer3": [1, 1, 1, 1], "layer4": [1, 2, 2, 2]})],
)
def test_only_the_first_convolution_after_a_removed_stride_keeps_the_dilation_before(
    stride: int, expected: dict[str, list[int]]
):
    backbone = create_model("deeplabv3_resnet18", 7, {"output_stride": stride, "width": 0.1}).backbone
    for layer in ("layer1", "layer2", "layer3", "layer4"):
        found = [m for m in backbone[layer].modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert [convolution.dilation[0] for convolution in found] == expected.get(layer, [1, 1, 1, 1])


@pytest.mark.parametrize(("stride", "expected"), [(8, [1] * 7 + [2] * 7 + [4] * 3), (16, [1] * 14 + [2] * 3)])
def test_a_mobile_network_is_dilated_in_the_same_way(stride: int, expected: list[int]):
    model = create_model("deeplabv3_mobilenet_v2", 7, {"output_stride": stride, "width": 0.25})
    depthwise = [m for m in model.backbone.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert [m.dilation[0] for m in depthwise] == expected


def test_the_stages_before_the_first_dilation_are_those_of_torchvisions_network():
    torch.manual_seed(0)
    classification = torchvision.models.resnet18(weights=None).eval()
    ours = create_model("deeplabv3_resnet18", 7).eval()
    ours.backbone.load_state_dict({k: v for k, v in classification.state_dict().items() if not k.startswith("fc.")})
    taps = [FeatureTaps(model, stages(model), ["stem", "stage1", "stage2"]) for model in (classification, ours)]
    with torch.no_grad():
        theirs, found = (each(images()).features for each in taps)
    assert all(torch.equal(found[name], theirs[name]) for name in ("stem", "stage1", "stage2"))


def test_dilation_gives_the_classification_networks_values_at_every_second_pixel():
    """Where nothing is downsampled between, a dilated stage holds the strided one in its pixels of even numbers."""
    torch.manual_seed(0)
    strided, dilated = (
        create_model("deeplabv3_resnet18", 7, {"output_stride": stride, "width": 0.125}).eval().double()
        for stride in (16, 8)
    )
    dilated.load_state_dict(strided.state_dict())
    taps = [FeatureTaps(model, stages(model), ["stage3"]) for model in (strided, dilated)]
    with torch.no_grad():
        small_map, large = (each(images(128, 128).double()).features["stage3"] for each in taps)
    torch.testing.assert_close(large[:, :, ::2, ::2], small_map)


def test_the_pyramid_pools_are_means_of_bins_enlarged_between_their_centres():
    torch.manual_seed(0)
    pyramid = PyramidPooling(8).eval().double()
    x = torch.randn(2, 8, 7, 12, dtype=torch.float64)
    found = pyramid(x)
    assert torch.equal(found[:, :8], x)
    for number, size in enumerate((1, 2, 3, 6)):
        bins = torch.stack([torch.stack([mean(x, i, j, size) for j in range(size)], -1) for i in range(size)], -2)
        small_map = pyramid.pools[number][1:](bins)
        rows, columns = (torch.linspace(0, size - 1, length).double().tolist() for length in (7, 12))
        for i, j in ((0, 0), (3, 5), (6, 11), (2, 8)):
            expected = between(small_map, rows[i], columns[j])
            torch.testing.assert_close(found[:, 8 + 2 * number : 10 + 2 * number, i, j], expected, rtol=1e-6, atol=1e-7)


def mean(x: Tensor, row: int, column: int, size: int) -> Tensor:
    """Return the mean of the bin of a pool: all pixels that it touches."""
    ends = [(n * each // size, -((-(n + 1) * each) // size)) for n, each in ((row, x.shape[2]), (column, x.shape[3]))]
    return x[:, :, slice(*ends[0]), slice(*ends[1])].mean((2, 3))


def between(x: Tensor, row: float, column: float) -> Tensor:
    """Return the value of a map at a point between its pixels."""
    top, left = int(row), int(column)
    bottom, right = min(top + 1, x.shape[2] - 1), min(left + 1, x.shape[3] - 1)
    down, along = row - top, column - left
    above = (1 - along) * x[:, :, top, left] + along * x[:, :, top, right]
    below = (1 - along) * x[:, :, bottom, left] + along * x[:, :, bottom, right]
    return (1 - down) * above + down * below


def test_the_plain_networks_head_adds_up_three_stages():
    taps = small("plain_fpn", {"width": 4}, "stage2", "stage3", "stage4").eval()
    summed: list[Tensor] = []
    taps.model.get_submodule("classifier.0").register_forward_hook(lambda _m, _a, output: summed.append(output))
    with torch.no_grad():
        features = taps(images()).features
        laterals = taps.model.get_submodule("classifier.0.laterals")
        maps = [laterals[number](features[f"stage{number + 2}"]) for number in range(3)]
    expected = sum(value.repeat_interleave(2**n, 2).repeat_interleave(2**n, 3) for n, value in enumerate(maps))
    torch.testing.assert_close(summed[0], expected)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("deeplabv3_resnet18", {"stem": "wide"}, "stem must be plain or deep, got 'wide'$"),
        ("pspnet_resnet34", {"output_stride": 4}, "output_stride must be 8 or 16, got 4$"),
        ("deeplabv3_resnet101", {"output_stride": 32}, "output_stride must be 8 or 16, got 32$"),
        ("deeplabv3_mobilenet_v2", {"width": 0}, "width must be positive, got 0$"),
        ("plain_fpn", {"depth": 0}, "width and depth must be at least 1, got 16 and 0$"),
        ("deeplabv3_resnet18", {"depth": 3}, "takes no argument 'depth'; it takes stem, output_stride, aux, width$"),
        ("deeplabv3_resnet50", {"stem": "deep"}, "takes no argument 'stem'; it takes output_stride, aux$"),
        ("lraspp_mobilenet_v3_large", {"aux": True}, "takes no argument 'aux'; it takes none$"),
    ],
)
def test_an_argument_that_a_segmentation_network_does_not_take_ends_in_one_line(
    name: str, arguments: dict[str, Any], message: str
):
    with torch.device("meta"), pytest.raises(ArgumentError, match=message) as caught:
        create_model(name, 7, arguments)
    assert "\n" not in str(caught.value)


def test_a_network_without_an_auxiliary_head_has_no_tap_of_it():
    model = create_model("deeplabv3_resnet18", 7, {"aux": False, "width": 0.1})
    assert isinstance(model, Segmenter)
    with pytest.raises(ValueError, match=r"^the network has no stage 'aux': it has stem, stage1, .*, decode, logits; "):
        FeatureTaps(model, stages(model), ["aux"])
