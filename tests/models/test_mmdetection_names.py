"""Weights of mmdetection's RetinaNet and Faster R-CNN are read under its names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.models import create_model
from pipeline.models.weights import load_weights

NAME = "retinanet_resnet18"
ARGUMENTS = {"p6_from": "c5"}
Shapes = dict[str, tuple[int, ...]]


def drawn_state(layers: Shapes) -> dict[str, torch.Tensor]:
    """Return random weights of mmdetection's ResNet and of other layers, each with a bias, by its names."""
    backbone = create_model("resnet18", 2).state_dict()
    drawn = {key: torch.rand_like(x.float()).to(x.dtype) for key, x in backbone.items() if "fc" not in key}
    state = {f"backbone.{key}": x for key, x in drawn.items()}
    for name, shape in layers.items():
        state |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
    return state


def mmdetection_state(classes: int) -> dict[str, torch.Tensor]:
    """Return random weights by mmdetection's names, as its ResNet, FPN and RetinaHead of nine anchors have them."""
    layers: Shapes = {
        **{f"neck.lateral_convs.{i}.conv": (256, 128 * 2**i, 1, 1) for i in range(3)},
        **{f"neck.fpn_convs.{i}.conv": (256, 256, 3, 3) for i in (0, 1, 2, 4)},
        "neck.fpn_convs.3.conv": (256, 512, 3, 3),
        **{f"bbox_head.{kind}_convs.{i}.conv": (256, 256, 3, 3) for kind in ("cls", "reg") for i in range(4)},
        "bbox_head.retina_cls": (9 * classes, 256, 3, 3),
        "bbox_head.retina_reg": (9 * 4, 256, 3, 3),
    }
    return drawn_state(layers)


def two_stage_state(classes: int, *, boxes: int) -> dict[str, torch.Tensor]:
    """Return random weights as mmdetection's FPN, RPNHead and Shared2FCBBoxHead have them, with that many boxes."""
    layers: Shapes = {
        **{f"neck.lateral_convs.{i}.conv": (256, 64 * 2**i, 1, 1) for i in range(4)},
        **{f"neck.fpn_convs.{i}.conv": (256, 256, 3, 3) for i in range(4)},
        "rpn_head.rpn_conv": (256, 256, 3, 3),
        "rpn_head.rpn_cls": (3, 256, 1, 1),
        "rpn_head.rpn_reg": (12, 256, 1, 1),
        "roi_head.bbox_head.shared_fcs.0": (1024, 256 * 49),
        "roi_head.bbox_head.shared_fcs.1": (1024, 1024),
        "roi_head.bbox_head.fc_cls": (classes + 1, 1024),
        "roi_head.bbox_head.fc_reg": (4 * boxes, 1024),
    }
    return drawn_state(layers)


def test_a_checkpoint_of_mmdetection_fills_every_tensor(tmp_path: Path):
    theirs = mmdetection_state(3)
    torch.save({"meta": {"epoch": 24}, "state_dict": theirs}, tmp_path / "retinanet.pth")
    model = create_model(NAME, 3, ARGUMENTS)
    load_weights(model, str(tmp_path / "retinanet.pth"), NAME, arguments=ARGUMENTS)
    ours = model.state_dict()
    assert len(ours) == len(theirs)
    for name, foreign in {
        "backbone.body.layer3.1.conv2.weight": "backbone.layer3.1.conv2.weight",
        "backbone.fpn.inner_blocks.2.0.bias": "neck.lateral_convs.2.conv.bias",
        "backbone.fpn.layer_blocks.0.0.weight": "neck.fpn_convs.0.conv.weight",
        "backbone.fpn.extra_blocks.p6.weight": "neck.fpn_convs.3.conv.weight",
        "backbone.fpn.extra_blocks.p7.weight": "neck.fpn_convs.4.conv.weight",
        "head.classification_head.conv.3.0.weight": "bbox_head.cls_convs.3.conv.weight",
        "head.regression_head.conv.0.0.bias": "bbox_head.reg_convs.0.conv.bias",
        "head.classification_head.cls_logits.weight": "bbox_head.retina_cls.weight",
        "head.regression_head.bbox_reg.bias": "bbox_head.retina_reg.bias",
    }.items():
        assert torch.equal(ours[name], theirs[foreign]), name


def test_of_a_faster_rcnn_the_background_comes_to_the_front(tmp_path: Path):
    theirs = two_stage_state(3, boxes=3)
    torch.save({"state_dict": theirs}, tmp_path / "faster_rcnn.pth")
    model = create_model("fasterrcnn_resnet18", 3)
    load_weights(model, str(tmp_path / "faster_rcnn.pth"), "fasterrcnn_resnet18")
    ours = model.state_dict()
    assert len(ours) == len(theirs)
    for name, foreign in {
        "backbone.body.layer3.1.conv2.weight": "backbone.layer3.1.conv2.weight",
        "backbone.fpn.inner_blocks.3.0.bias": "neck.lateral_convs.3.conv.bias",
        "backbone.fpn.layer_blocks.0.0.weight": "neck.fpn_convs.0.conv.weight",
        "rpn.head.conv.0.0.weight": "rpn_head.rpn_conv.weight",
        "rpn.head.cls_logits.bias": "rpn_head.rpn_cls.bias",
        "rpn.head.bbox_pred.weight": "rpn_head.rpn_reg.weight",
        "roi_heads.box_head.fc6.weight": "roi_head.bbox_head.shared_fcs.0.weight",
        "roi_heads.box_head.fc7.bias": "roi_head.bbox_head.shared_fcs.1.bias",
    }.items():
        assert torch.equal(ours[name], theirs[foreign]), name
    for kind in ("weight", "bias"):
        scores, boxes = (ours[f"roi_heads.box_predictor.{name}.{kind}"] for name in ("cls_score", "bbox_pred"))
        assert torch.equal(scores[1:], theirs[f"roi_head.bbox_head.fc_cls.{kind}"][:-1])
        assert torch.equal(scores[0], theirs[f"roi_head.bbox_head.fc_cls.{kind}"][-1])
        assert torch.equal(boxes[4:], theirs[f"roi_head.bbox_head.fc_reg.{kind}"])


def test_a_head_with_one_box_for_all_classes_is_refused_in_one_line(tmp_path: Path):
    torch.save(two_stage_state(3, boxes=1), tmp_path / "cascade.pth")
    with pytest.raises(
        ValueError, match=r"another architecture .*bbox_pred\.weight: \(4, 1024\), expected \(16, 1024\)"
    ):
        load_weights(create_model("fasterrcnn_resnet18", 3), str(tmp_path / "cascade.pth"), "fasterrcnn_resnet18")
