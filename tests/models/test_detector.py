"""Detectors: their parts are torchvision's, taps are what these compute, and heads run where something reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torchvision.models.detection import (
    FCOS,
    RetinaNet,
    fcos_resnet50_fpn,
    retinanet_resnet50_fpn,
    retinanet_resnet50_fpn_v2,
)

from pipeline.features.names import tap_names
from pipeline.features.taps import FeatureTaps, tap_shapes
from pipeline.models import create_model
from pipeline.models.arguments import ArgumentError
from pipeline.models.stages import stages
from pipeline.tasks._boxes import DETECTIONS

TORCHVISIONS = [
    ("retinanet_resnet50", retinanet_resnet50_fpn),
    ("retinanet_resnet50_v2", retinanet_resnet50_fpn_v2),
    ("fcos_resnet50", fcos_resnet50_fpn),
]
SAME: dict[str, Any] = {
    "image_mean": [0.0, 0.0, 0.0],
    "image_std": [1.0, 1.0, 1.0],
    "min_size": 64,
    "max_size": 96,
    "score_thresh": 0.05,
    "nms_thresh": 0.5,
    "detections_per_img": 100,
}


def tapped(model: nn.Module, *wanted: str) -> FeatureTaps:
    return FeatureTaps(model, stages(model), wanted)


def plain(*wanted: str, classes: int = 5, **arguments: Any) -> FeatureTaps:
    torch.manual_seed(0)
    return tapped(create_model("plain_retinanet", classes, {"width": 4, "channels": 8, **arguments}), *wanted)


def images(rows: int = 2, height: int = 64, width: int = 96) -> Tensor:
    return torch.randn(rows, 3, height, width, generator=torch.Generator().manual_seed(1))


def sure(model: nn.Module) -> nn.Module:
    """Return the detector with scores far above those of a fresh one, and boxes of many sizes."""
    draw = torch.Generator().manual_seed(2)
    heads = (
        model.get_submodule("head.classification_head.cls_logits"),
        model.get_submodule("head.regression_head.bbox_reg"),
    )
    for layer in heads:
        nn.init.normal_(layer.weight, std=0.05, generator=draw)
        nn.init.constant_(layer.bias, -1.0 if layer is heads[0] else 0.5)
    return model


@pytest.mark.parametrize(("name", "factory"), TORCHVISIONS)
def test_the_state_of_a_detector_is_that_of_torchvisions(name: str, factory: Any):
    with torch.device("meta"):
        ours, theirs = create_model(name, 5), factory(weights=None, weights_backbone=None, num_classes=5)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize(("name", "kind"), [("plain_retinanet", RetinaNet), ("fcos_resnet18", FCOS)])
def test_a_detector_finds_what_torchvisions_finds_with_the_same_parts(name: str, kind: Any):
    torch.manual_seed(0)
    ours = sure(create_model(name, 5)).eval()
    theirs = kind(ours.backbone, 5, anchor_generator=ours.anchor_generator, head=ours.head, **SAME).eval()
    with torch.no_grad():
        found, expected = tapped(ours, DETECTIONS)(images()).features[DETECTIONS], theirs(list(images()))
    for rows_N6, each in zip(found, expected, strict=True):
        count = len(each["scores"])
        assert count > 20
        assert torch.equal(rows_N6[:count, :4], each["boxes"])
        assert torch.equal(rows_N6[:count, 4], each["scores"])
        assert torch.equal(rows_N6[:count, 5].long(), each["labels"])
        assert rows_N6[count:].tolist() == [[0, 0, 0, 0, 0, -1]] * (100 - count)
        assert (rows_N6[:, 4].diff() <= 0).all()


def test_the_levels_of_the_pyramid_are_the_backbones():
    torch.manual_seed(0)
    model = create_model("retinanet_resnet18", 3)
    names = [f"fpn.p{number}" for number in range(3, 8)]
    with torch.no_grad():
        features = tapped(model, *names, "backbone.stage4").eval()(images()).features
        expected = model.get_submodule("backbone")(images())
    assert all(torch.equal(features[name], level) for name, level in zip(names, expected.values(), strict=True))
    assert features["backbone.stage4"].shape == (2, 512, 2, 3)


@pytest.mark.parametrize("name", ["plain_retinanet", "fcos_resnet18"])
def test_maps_of_the_heads_are_the_towers_answers_level_by_level(name: str):
    torch.manual_seed(0)
    model = sure(create_model(name, 3))
    taps = tapped(model, *(tap for tap in tap_names(stages(model)) if tap.startswith(("fpn.", "head.")))).eval()
    with torch.no_grad():
        outputs = taps(images())
        classes, boxes = (model.get_submodule(f"head.{kind}_head") for kind in ("classification", "regression"))
        for level in model.levels:
            map_BCHW = outputs.features[f"fpn.{level}"]
            of_classes, tower = classes.cls_logits(classes.conv(map_BCHW)), boxes.conv(map_BCHW)
            of_boxes = boxes.bbox_reg(tower).relu() if name[0] == "f" else boxes.bbox_reg(tower)
            assert torch.equal(outputs.features[f"head.class.{level}"], of_classes)
            assert torch.equal(outputs.features[f"head.box.{level}"], of_boxes)
            if name[0] == "f":
                assert torch.equal(outputs.features[f"head.centre.{level}"], boxes.bbox_ctrness(tower))
        first = outputs.features["head.class.p3"]
        anchors = first.shape[1] // 3
        assert torch.equal(outputs.logits[:, :anchors].flatten(1), first[:, :, 0, 0])


def test_anchors_are_those_of_every_cell_in_the_order_of_the_logits():
    outputs = plain("anchors", "regression").eval()(images())
    anchors_A4 = outputs.features["anchors"][0]
    assert outputs.features["anchors"].shape == outputs.features["regression"].shape == (2, 6 * (96 + 24), 4)
    assert outputs.logits.shape == (2, 6 * (96 + 24), 5)
    centres_A2 = (anchors_A4[:, :2] + anchors_A4[:, 2:]) / 2
    assert centres_A2[::6][:13].tolist() == [*([8.0 * column, 0.0] for column in range(12)), [0.0, 8.0]]
    assert centres_A2[6 * 96 :: 6][:3].tolist() == [[0.0, 0.0], [16.0, 0.0], [32.0, 0.0]]
    # Ratios are of height and width; sides are rounded to pixels.
    sides = [(right - left, bottom - top) for left, top, right, bottom in anchors_A4[:6].tolist()]
    assert sides == [(20, 14), (26, 18), (16, 16), (22, 22), (14, 20), (18, 26)]


def heads_that_ran(taps: FeatureTaps) -> tuple[int, tuple[int, ...]]:
    """Return how often the head ran, and the shape of the logits."""
    ran: list[nn.Module] = []
    with register_module_forward_pre_hook(lambda module, _args: ran.append(module)), torch.no_grad():
        logits = taps(images()).logits
    return ran.count(taps.model.get_submodule("head")), tuple(logits.shape)


def test_heads_run_only_where_something_reads_what_they_compute():
    for wanted in (["fpn.p3"], ["backbone.stage2"], ["fpn.p3", "stage4.preact"]):
        assert heads_that_ran(plain(*wanted).eval()) == (0, (2, 0))
    for wanted in ([], ["head.class.p4"], ["anchors"], ["regression", "fpn.p3"], [DETECTIONS]):
        assert heads_that_ran(plain(*wanted).eval()) == (1, (2, 720, 5))
    assert heads_that_ran(plain("fpn.p3").train()) == (1, (2, 720, 5))


def test_a_tap_does_not_change_the_others():
    names = tap_names(stages(plain().model))
    with torch.no_grad():
        together = plain(*names).eval()(images())
        for name in names:
            assert torch.equal(plain(name).eval()(images()).features[name], together.features[name]), name


def test_a_forward_draws_nothing_and_in_training_finds_nothing():
    taps = plain(DETECTIONS, "head.class.p3", "anchors")
    for mode in (True, False):
        before = torch.get_rng_state()
        found = taps.train(mode)(images()).features[DETECTIONS]
        assert torch.equal(torch.get_rng_state(), before)
        assert found.shape == (2, 0 if mode else 100, 6)


def test_heads_compute_in_float32_under_autocast_and_in_a_network_of_bfloat16():
    taps = plain("head.class.p3", "fpn.p3", "anchors", "regression", DETECTIONS).eval()
    with torch.no_grad():
        exact = taps(images())
        with torch.autocast("cpu", torch.bfloat16):
            auto = taps(images())
        weights = taps.model.get_submodule("head").state_dict()
        taps.to(torch.bfloat16)
        half = taps(images().bfloat16())
    assert all(torch.equal(value, weights[key]) for key, value in taps.model.get_submodule("head").state_dict().items())
    for found in (auto, half):
        assert found.features.pop("fpn.p3").dtype == torch.bfloat16
        assert {x.dtype for x in (found.logits, *found.features.values())} == {torch.float32}
        assert torch.equal(found.features["anchors"], exact.features["anchors"])
        torch.testing.assert_close(found.logits, exact.logits, rtol=0.02, atol=0.02)
    assert taps.double()(images().double()).logits.dtype == torch.float64


@pytest.mark.parametrize("name", ["retinanet_resnet50", "fcos_resnet101", "plain_retinanet"])
def test_taps_have_their_shapes_without_weights(name: str):
    with torch.device("meta"):
        model = create_model(name, 80)
    named = stages(model)
    shapes = tap_shapes(FeatureTaps(model, named, tap_names(named)), (128, 256))
    sides = {"p3": (16, 32), "p4": (8, 16), "p5": (4, 8), "p6": (2, 4), "p7": (1, 2)}
    anchors = {"retinanet_resnet50": 9, "fcos_resnet101": 1, "plain_retinanet": 6}[name]
    levels = ["p3", "p4"] if name == "plain_retinanet" else list(sides)
    total = anchors * sum(height * width for height, width in map(sides.get, levels))
    for level in levels:
        assert shapes[f"fpn.{level}"] == (32 if name == "plain_retinanet" else 256, *sides[level])
        assert shapes[f"head.class.{level}"] == (80 * anchors, *sides[level])
        assert shapes[f"head.box.{level}"] == (4 * anchors, *sides[level])
        assert shapes.get(f"head.centre.{level}") == ((1, *sides[level]) if name[0] == "f" else None)
    assert shapes["logits"] == (total, 80)
    assert shapes["anchors"] == (total, 4)
    assert shapes["regression"] == (total, 5 if name[0] == "f" else 4)
    assert shapes[DETECTIONS] == (100, 6)
    for number in range(1, 5):
        assert shapes[f"backbone.stage{number}"] == shapes[f"stage{number}"] == shapes[f"stage{number}.preact"]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("retinanet_resnet18", {"p6_from": "p4"}, "p6_from must be p5 or c5, got 'p4'$"),
        ("fcos_resnet18", {"width": 2}, "takes no argument 'width'; it takes p6_from$"),
        ("retinanet_resnet50_v2", {"p6_from": "p5"}, "takes no argument 'p6_from'; it takes none$"),
        ("plain_retinanet", {"depth": 0}, "width and depth must be at least 1, got 16 and 0$"),
    ],
)
def test_an_argument_that_a_detector_does_not_take_ends_in_one_line(name: str, arguments: dict[str, Any], message: str):
    with torch.device("meta"), pytest.raises(ArgumentError, match=message) as caught:
        create_model(name, 7, arguments)
    assert "\n" not in str(caught.value)
