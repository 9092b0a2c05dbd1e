"""Weights of mmdetection's RetinaNet are read under its names."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.models import create_model
from pipeline.models.weights import load_weights

NAME = "retinanet_resnet18"
ARGUMENTS = {"p6_from": "c5"}


def mmdetection_state(classes: int) -> dict[str, torch.Tensor]:
    """Return random weights by mmdetection's names, as its ResNet, FPN and RetinaHead of nine anchors have them."""
    backbone = create_model("resnet18", 2).state_dict()
    convolutions = {
        **{f"neck.lateral_convs.{i}.conv": (256, 128 * 2**i, 1) for i in range(3)},
        **{f"neck.fpn_convs.{i}.conv": (256, 256, 3) for i in (0, 1, 2, 4)},
        "neck.fpn_convs.3.conv": (256, 512, 3),
        **{f"bbox_head.{kind}_convs.{i}.conv": (256, 256, 3) for kind in ("cls", "reg") for i in range(4)},
        "bbox_head.retina_cls": (9 * classes, 256, 3),
        "bbox_head.retina_reg": (9 * 4, 256, 3),
    }
    drawn = {key: torch.rand_like(x.float()).to(x.dtype) for key, x in backbone.items() if "fc" not in key}
    state = {f"backbone.{key}": x for key, x in drawn.items()}
    for name, (out, channels, side) in convolutions.items():
        state |= {f"{name}.weight": torch.randn(out, channels, side, side), f"{name}.bias": torch.randn(out)}
    return state


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
