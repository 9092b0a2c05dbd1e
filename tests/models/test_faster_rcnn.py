"""Faster R-CNN: its parts are torchvision's, and what it learns from is chosen by each image's own draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import boxes_of
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn, fasterrcnn_resnet50_fpn_v2
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.image_list import ImageList

from pipeline.features.names import tap_names
from pipeline.features.taps import FeatureTaps, tap_shapes
from pipeline.models import box_sampling, create_model
from pipeline.models.box_sampling import sample_labels
from pipeline.models.headless import without_head
from pipeline.models.plain_faster_rcnn import LEARNT_REGIONS
from pipeline.models.stages import stages
from pipeline.tasks._boxes import BOXES, CLASSES, CROWD, DETECTIONS, DRAWS

SAME: dict[str, Any] = {
    "image_mean": [0.0, 0.0, 0.0],
    "image_std": [1.0, 1.0, 1.0],
    "min_size": 64,
    "max_size": 96,
    "box_score_thresh": 0.05,
    "box_nms_thresh": 0.5,
    "box_detections_per_img": 100,
}
REGIONS = ("roi.boxes", "roi.class", "roi.box", "roi.targets")


def tapped(model: nn.Module, *wanted: str) -> FeatureTaps:
    return FeatureTaps(model, stages(model), wanted)


def network(name: str = "plain_fasterrcnn", classes: int = 5) -> Any:
    """Return a detector with scores far above those of a fresh one, and regions of many sizes."""
    draw = torch.Generator().manual_seed(2)
    torch.manual_seed(0)
    model: Any = create_model(name, classes, {"width": 4, "channels": 8} if name[0] == "p" else None)
    for layer in (model.rpn.head.cls_logits, model.rpn.head.bbox_pred):
        nn.init.normal_(layer.weight, std=0.05, generator=draw)
    for layer in (model.roi_heads.box_predictor.cls_score, model.roi_heads.box_predictor.bbox_pred):
        nn.init.normal_(layer.weight, std=0.5, generator=draw)
    return model


def plain(*wanted: str) -> FeatureTaps:
    return tapped(network(), *wanted)


def torchvisions(ours: Any, **options: Any) -> Any:
    """Return torchvision's network with the same parts."""
    parts = {"rpn_anchor_generator": ours.rpn.anchor_generator, "rpn_head": ours.rpn.head}
    heads = {f"box_{name}": getattr(ours.roi_heads, f"box_{name}") for name in ("roi_pool", "head", "predictor")}
    return FasterRCNN(ours.backbone, **parts, **heads, **SAME, **options)


def images(rows: int = 2, height: int = 64, width: int = 96) -> Tensor:
    return torch.randn(rows, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "factory"),
    [("fasterrcnn_resnet50", fasterrcnn_resnet50_fpn), ("fasterrcnn_resnet50_v2", fasterrcnn_resnet50_fpn_v2)],
)
def test_the_state_is_that_of_torchvisions_with_a_background(name: str, factory: Any):
    with torch.device("meta"):
        ours, theirs = create_model(name, 5), factory(weights=None, weights_backbone=None, num_classes=6)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("name", ["plain_fasterrcnn", "fasterrcnn_resnet18"])
def test_it_finds_what_torchvisions_finds_with_the_same_parts(name: str):
    ours = network(name).eval()
    with torch.no_grad():
        outputs = tapped(ours, DETECTIONS, *REGIONS)(images())
        expected = torchvisions(ours).eval()(list(images()))
    for rows_N6, each in zip(outputs.features[DETECTIONS], expected, strict=True):
        count = len(each["scores"])
        assert count > 20
        assert torch.equal(rows_N6[:count, :4], each["boxes"])
        assert torch.equal(rows_N6[:count, 4], each["scores"])
        assert torch.equal(rows_N6[:count, 5].long() + 1, each["labels"])  # without the background
        assert rows_N6[count:].tolist() == [[0, 0, 0, 0, 0, -1]] * (100 - count)
    assert outputs.logits.shape == (2, 1000, 5)
    assert torch.equal(outputs.logits, outputs.features["roi.class"][..., 1:])
    assert (outputs.features["roi.targets"] == -1).all()


def test_maps_and_regions_of_both_stages_are_those_of_torchvisions_parts():
    model = network().eval()
    names = tap_names(stages(model))
    with torch.no_grad():
        found = tapped(model, *(name for name in names if name.startswith(("fpn.", "rpn.", "roi."))))(images()).features
        levels = model.backbone(images())
        objectness, deltas = model.rpn.head(list(levels.values()))
        proposals, _ = model.rpn(ImageList(images(), [(64, 96)] * 2), levels)
        pooled = model.roi_heads.box_roi_pool(levels, proposals, [(64, 96)] * 2)
        classes, boxes = model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
    for number, name in enumerate(("p3", "p4", "p5")):
        assert torch.equal(found[f"fpn.{name}"], list(levels.values())[number])
        assert torch.equal(found[f"rpn.class.{name}"], objectness[number])
        assert torch.equal(found[f"rpn.box.{name}"], deltas[number])
    counts = [len(each) for each in proposals]
    assert 100 < min(counts) < max(counts) < 1000
    for image, count in enumerate(counts):
        assert torch.equal(found["roi.boxes"][image, :count], proposals[image])
        assert torch.equal(found["roi.class"][image, :count], classes.split(counts)[image])
        assert torch.equal(found["roi.box"][image, :count], boxes.split(counts)[image])
        assert not any(found[f"roi.{kind}"][image, count:].any() for kind in ("boxes", "class", "box"))


def work_of(taps: FeatureTaps, **options: Any) -> tuple[int, int, tuple[int, ...]]:
    """Return how often the first and the second stage ran, and the shape of the logits."""
    model: Any = taps.model
    ran: list[nn.Module] = []
    with register_module_forward_pre_hook(lambda module, _args: ran.append(module)), torch.no_grad():
        logits = taps(images(), **options).logits
    return ran.count(model.rpn.head), ran.count(model.roi_heads.box_head), tuple(logits.shape)


def test_a_stage_runs_only_where_something_reads_what_it_computes():
    for wanted in (["fpn.p3"], ["backbone.stage2"], ["fpn.p5", "stage4.preact"]):
        assert work_of(plain(*wanted).eval()) == (0, 0, (2, 0))
    for wanted in (["rpn.class"], ["rpn.box.p4", "fpn.p3"], ["anchors"]):
        assert work_of(plain(*wanted).eval()) == (1, 0, (2, 0))
    for wanted in ([], ["roi.boxes"], ["rpn.class", "roi.class"], [DETECTIONS]):
        assert work_of(plain(*wanted).eval()) == (1, 1, (2, 1000, 5))
    assert work_of(plain("fpn.p3").train(), targets=boxes_of(2)) == (1, 1, (2, LEARNT_REGIONS, 5))


def test_training_without_a_batchs_boxes_is_one_line():
    with pytest.raises(ValueError, match=r"^Faster R-CNN chooses .* by a batch's boxes; in training give targets$"):
        plain("fpn.p3").train()(images())


def test_a_tap_does_not_change_the_others_and_nothing_is_drawn_from_torchs_generators():
    names = tap_names(stages(plain().model))
    for mode in (True, False):
        with torch.no_grad():
            together = plain(*names).train(mode)(images(), boxes_of(2))
            for name in names:
                found = plain(name).train(mode)(images(), boxes_of(2)).features[name]
                assert torch.equal(found, together.features[name]), name
            assert together.features[DETECTIONS].shape == (2, 0 if mode else 100, 6)
        taps = plain(*names).train(mode)
        before = torch.get_rng_state()
        taps(images(), boxes_of(2))
        assert torch.equal(torch.get_rng_state(), before)


def frozen_norms(model: nn.Module) -> nn.Module:
    """Return the model in training, whose BatchNorms do not mix the images of a batch."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def test_an_image_learns_from_the_same_anchors_and_regions_in_any_batch():
    taps, targets = plain("rpn.targets", "roi.targets", "roi.boxes"), boxes_of(4)
    frozen_norms(taps)
    sampler: Any = taps.model.get_submodule("roi_heads").fg_bg_sampler
    sampler.batch_size_per_image = 64  # of more regions
    with torch.no_grad():
        together, again = (taps(images(4), targets).features for _ in range(2))
        order = [2, 0, 3]
        others = taps(images(4)[order], {name: x[order] for name, x in targets.items()}).features
        redrawn = taps(images(4), {**targets, DRAWS: targets[DRAWS] + 100}).features
    for name, values in together.items():
        assert torch.equal(values, again[name])
        assert torch.equal(values[order], others[name])
        assert not torch.equal(values, redrawn[name])


def test_regions_have_the_label_and_the_box_of_the_object_they_overlap_by_half():
    taps, targets = plain("rpn.targets", "roi.targets", "roi.boxes", "anchors").train(), boxes_of(3)
    with torch.no_grad():
        found = taps(images(3), targets).features
    anchors_B = (found["rpn.targets"], 256, 128)
    regions_B = (found["roi.targets"], LEARNT_REGIONS, LEARNT_REGIONS // 4)
    for image in range(3):
        wanted_N = (targets[CLASSES][image] >= 0) & ~targets[CROWD][image]
        objects_N4, classes_N = targets[BOXES][image][wanted_N], targets[CLASSES][image][wanted_N]
        for learnt, size, positives in (anchors_B, regions_B):
            labels_P = learnt[image, :, 4]
            assert (labels_P >= 0).sum() <= size
            assert (labels_P > 0).sum() <= positives
            assert (labels_P == 0).any()
            assert (labels_P > 0).any() == bool(len(objects_N4))
        for box_4, target_5 in zip(found["roi.boxes"][image], found["roi.targets"][image], strict=True):
            if target_5[4] < 0 or not len(objects_N4):
                assert target_5[4] <= 0
                continue
            overlaps = [iou(box_4.tolist(), each) for each in objects_N4.tolist()]
            best = overlaps.index(max(overlaps))
            assert target_5[4] == (classes_N[best] + 1 if max(overlaps) >= 0.5 else 0)
            assert target_5[4] == 0 or torch.equal(target_5[:4], objects_N4[best])


def iou(a: list[float], b: list[float]) -> float:
    width, height = (max(0.0, min(a[n + 2], b[n + 2]) - max(a[n], b[n])) for n in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


@pytest.mark.parametrize(("positives", "negatives"), [(40, 300), (3, 300), (40, 5), (0, 9), (0, 0)])
def test_the_choice_is_torchvisions_with_torchs_generator_seeded(positives: int, negatives: int):
    labels = torch.tensor([7] * positives + [0] * negatives + [-1] * 20)
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]
    before = torch.get_rng_state()
    found = sample_labels(labels, 12345, 64, 0.25)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(12345)
    (of_objects,), (of_ground,) = BalancedPositiveNegativeSampler(64, 0.25)([labels])
    assert torch.equal(found > 0, of_objects.bool())
    assert torch.equal(found == 0, of_ground.bool())
    assert ((found == labels) | (found == -1)).all()


def test_the_names_of_targets_are_those_of_the_task():
    assert box_sampling.OBJECT_TARGETS == (BOXES, CLASSES, CROWD, DRAWS)


@pytest.mark.parametrize("name", ["plain_fasterrcnn", "fasterrcnn_resnet50_v2"])
def test_heads_keep_float32_in_a_network_of_bfloat16(name: str):
    model = create_model(name, 5, {"width": 4, "channels": 8} if name[0] == "p" else None).to(torch.bfloat16)
    kinds = {key: x.dtype for key, x in model.state_dict().items() if x.is_floating_point()}
    for key, kind in kinds.items():
        assert kind == (torch.float32 if key.startswith(("rpn.", "roi_heads.")) else torch.bfloat16), key


def test_stages_compute_in_float32_under_autocast_and_in_a_network_of_bfloat16():
    taps = plain("rpn.class", "fpn.p3", "anchors", "roi.class", "roi.boxes", DETECTIONS).eval()
    with torch.no_grad():
        exact = taps(images())
        with torch.autocast("cpu", torch.bfloat16):
            auto = taps(images())
        half = taps.to(torch.bfloat16)(images().bfloat16())
    for found in (auto, half):
        assert found.features.pop("fpn.p3").dtype == torch.bfloat16
        assert {x.dtype for x in (found.logits, *found.features.values())} == {torch.float32}
        assert torch.equal(found.features["anchors"], exact.features["anchors"])
        torch.testing.assert_close(found.features["rpn.class.p3"], exact.features["rpn.class.p3"], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50", "fasterrcnn_resnet50_v2"])
def test_taps_have_their_shapes_without_weights(name: str):
    with torch.device("meta"):
        model = create_model(name, 80)
    named = stages(model)
    shapes = tap_shapes(FeatureTaps(model, named, tap_names(named)), (128, 256))
    sides = {"p2": (32, 64), "p3": (16, 32), "p4": (8, 16), "p5": (4, 8), "p6": (2, 4)}
    total = 3 * sum(height * width for height, width in sides.values())
    for level, size in sides.items():
        assert shapes[f"fpn.{level}"] == (256, *size)
        assert shapes[f"rpn.class.{level}"] == (3, *size)
        assert shapes[f"rpn.box.{level}"] == (12, *size)
    assert (shapes["anchors"], shapes["rpn.targets"]) == ((total, 4), (total, 5))
    assert (shapes["roi.boxes"], shapes["roi.targets"]) == ((1000, 4), (1000, 5))
    assert (shapes["roi.class"], shapes["roi.box"]) == ((1000, 81), (1000, 4 * 81))
    assert (shapes["logits"], shapes[DETECTIONS]) == ((1000, 80), (100, 6))
    assert shapes["backbone.stage4"] == shapes["stage4"] == (2048, 4, 8)


def test_without_its_heads_the_pyramid_stays():
    whole, model = network().eval(), network().eval()
    left = without_head(model, stages(model))
    assert {name for name in left if name.startswith(("fpn", "rpn", "roi", "anchors", DETECTIONS))} == {
        *("fpn.p3", "fpn.p4", "fpn.p5")
    }
    with torch.no_grad():
        found, expected = tapped(model, "fpn")(images()), tapped(whole, "fpn")(images())
    assert found.logits.shape == (2, 0)
    assert all(torch.equal(found.features[name], x) for name, x in expected.features.items())


@pytest.mark.parametrize("tap", ["head.class", "head.box"])
def test_maps_of_one_stage_are_refused_in_one_line(tap: str):
    with pytest.raises(ValueError, match=rf"no stage '{tap}', because it is no detector of one stage; those of two"):
        plain(tap)
