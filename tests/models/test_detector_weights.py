"""Weights of detectors: torchvision's of COCO, a backbone's of ImageNet, of other classes, without heads, frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from pipeline.batch import Batch
from pipeline.builders.model_spec import ModelSpec
from pipeline.builders.student import student_spec
from pipeline.config.recipe import StudentConfig
from pipeline.errors import RecipeError
from pipeline.features.taps import FeatureTaps
from pipeline.models import create_model, published
from pipeline.models.coco_weights import EPS, NAMES, fitted_classes, without_eps
from pipeline.models.published import published_normalization
from pipeline.models.segmentation import backbone_network
from pipeline.models.stages import stages
from pipeline.models.weights import head_tensors, load_weights
from pipeline.tasks._boxes import DETECTIONS
from pipeline.teachers.frozen import Teacher

SMALL: dict[str, Any] = {"width": 2, "depth": 1, "channels": 4}
CATEGORIES = torchvision.models.get_model_weights("fcos_resnet50_fpn").COCO_V1.meta["categories"]


def small(classes: int, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return create_model("plain_retinanet", classes, SMALL)


def saved(path: Path, content: dict[str, Tensor]) -> str:
    save_file(dict(content), path)
    return str(path)


def test_torchvisions_weights_of_coco_are_known_with_what_they_expect():
    for name in NAMES:
        assert published_normalization(name, "COCO_V1") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert backbone_network(name) == "resnet50"
    assert published_normalization("retinanet_resnet18", "COCO_V1") is None
    assert backbone_network("retinanet_resnext101_64x4d") == "resnext101_64x4d"


def number_of_categories(name: str) -> int:
    """Return how many classes a network of all of torchvision's categories has here; 0 is Faster R-CNN's own."""
    return 90 if name.startswith("fasterrcnn") else 91


@pytest.mark.parametrize("name", NAMES)
def test_torchvisions_weights_of_coco_fit(name: str, monkeypatch: pytest.MonkeyPatch):
    classes = number_of_categories(name)
    with torch.device("meta"):
        whole = create_model(name, classes).state_dict()
    state = {key: torch.ones(value.shape) for key, value in whole.items() if not key.endswith("num_batches_tracked")}
    monkeypatch.setattr(published, "load_state_dict_from_url", lambda *_args, **_keys: state)
    if name == "fasterrcnn_resnet50":  # published before this layer became one of a list
        state = {key.replace("rpn.head.conv.0.0.", "rpn.head.conv."): value for key, value in state.items()}
    with torch.device("meta"):
        model = create_model(name, classes)
    model.to_empty(device="cpu")
    assert load_weights(model, "COCO_V1", name) == ""
    assert all((value == 1).all() for key, value in model.state_dict().items() if ".norm" not in key and "cls_" in key)


def test_a_network_of_80_classes_takes_the_rows_of_the_categories_with_objects():
    model, anchors = small(80), 6
    rows = torch.arange(91.0).repeat(anchors)
    state = {"head.classification_head.cls_logits.bias": rows, "head.regression_head.bbox_reg.bias": torch.ones(24)}
    fitted = fitted_classes(state, model, "fcos_resnet50", "COCO_V1")
    found_AK = fitted["head.classification_head.cls_logits.bias"].view(anchors, 80)
    named = [CATEGORIES[int(row)] for row in found_AK[2]]
    assert (named[0], named[11], named[-1]) == ("person", "stop sign", "toothbrush")
    assert not {"N/A", "__background__"} & set(named)
    assert (found_AK == found_AK[0]).all()
    assert fitted["head.regression_head.bbox_reg.bias"] is state["head.regression_head.bbox_reg.bias"]
    assert fitted_classes(state, small(91), "fcos_resnet50", "COCO_V1") is state


def test_of_two_stages_the_background_stays_in_front_of_the_80_classes():
    torch.manual_seed(0)
    model: Any = create_model("plain_fasterrcnn", 80, SMALL)
    scores, boxes = (f"roi_heads.box_predictor.{name}.bias" for name in ("cls_score", "bbox_pred"))
    rpn = {"rpn.head.cls_logits.bias": torch.ones(6)}
    state = {scores: torch.arange(91.0), boxes: torch.arange(4 * 91.0), **rpn}
    fitted = fitted_classes(state, model, "fasterrcnn_resnet50", "COCO_V1")
    named = [CATEGORIES[int(row)] for row in fitted[scores]]
    assert (named[0], named[1], named[12], named[-1]) == ("__background__", "person", "stop sign", "toothbrush")
    assert len(named) == 81
    assert "N/A" not in named
    assert torch.equal(fitted[boxes].view(81, 4)[:, 0], 4 * fitted[scores])
    assert fitted["rpn.head.cls_logits.bias"] is rpn["rpn.head.cls_logits.bias"]


def test_weights_of_two_stages_with_other_classes_are_refused_and_all_but_their_rows_can_be_taken(tmp_path: Path):
    other, model = (create_model("plain_fasterrcnn", classes, SMALL) for classes in (4, 3))
    source = saved(tmp_path / "w.safetensors", other.state_dict())
    with pytest.raises(ValueError, match=r"the weights have 4 classes, the network and the shards have 3; .*head=new"):
        load_weights(model, source, "plain_fasterrcnn", arguments=SMALL)
    rows = head_tensors("plain_fasterrcnn", 3, SMALL)
    assert rows == {
        f"roi_heads.box_predictor.{layer}.{kind}" for layer in ("cls_score", "bbox_pred") for kind in ("weight", "bias")
    }
    load_weights(model, source, "plain_fasterrcnn", arguments=SMALL, left_out=rows)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]) == (key not in rows), key


def test_a_batchnorm_computes_what_torchvisions_computed_without_eps():
    frozen = FrozenBatchNorm2d(3, eps=0.0)
    values = {"weight": [1.0, -0.5, 2.0], "bias": [0.1, 0.2, 0.3], "running_mean": [1.0, 2.0, 3.0]}
    state = {key: torch.tensor(value) for key, value in values.items()} | {"running_var": torch.tensor([1e-6, 1e-3, 4])}
    frozen.load_state_dict(state)
    norm = nn.Sequential(nn.BatchNorm2d(3, eps=EPS)).eval()
    norm.load_state_dict(without_eps({f"0.{key}": x for key, x in state.items()}, "retinanet_resnet50"), strict=False)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(norm(x), frozen(x), rtol=1e-5, atol=1e-4)
    assert without_eps(state, "fcos_resnet50") is state


def test_a_classification_network_fills_the_backbone_below_the_pyramid(tmp_path: Path):
    weights = torchvision.models.resnet18(weights=None).state_dict()
    model = create_model("retinanet_resnet18", 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_weights(model, saved(tmp_path / "w.safetensors", weights), "retinanet_resnet18", part="backbone")
    for key, value in model.state_dict().items():
        of_body = key.startswith("backbone.body.")
        assert torch.equal(value, weights[key.removeprefix("backbone.body.")] if of_body else before[key])


def test_weights_of_other_classes_are_refused_and_all_but_their_rows_can_be_taken(tmp_path: Path):
    other, model = small(4), small(3, seed=2)
    source = saved(tmp_path / "w.safetensors", other.state_dict())
    with pytest.raises(ValueError, match=r"the weights have 4 classes, the network and the shards have 3; .*head=new"):
        load_weights(model, source, "plain_retinanet", arguments=SMALL)
    rows = head_tensors("plain_retinanet", 3, SMALL)
    assert rows == {f"head.classification_head.cls_logits.{kind}" for kind in ("weight", "bias")}
    load_weights(model, source, "plain_retinanet", arguments=SMALL, left_out=rows)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]) == (key not in rows), key


def test_a_teacher_without_heads_has_the_pyramid_of_the_whole(tmp_path: Path):
    whole = small(9).eval()
    taps = frozenset({"fpn.p3", "fpn.p4", "stage4"})
    spec = ModelSpec("teacher", "plain_retinanet", frozenset(), taps, '{"channels": 4, "depth": 1, "width": 2}')
    without = spec._replace(headless=True).build(5).eval()
    note = load_weights(without.model, saved(tmp_path / "w.safetensors", whole.state_dict()), "plain_retinanet")
    assert "head: none leaves out head.classification_head" in note
    images = torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        found, expected = without(images), FeatureTaps(whole, stages(whole), taps)(images)
    assert found.logits.shape == (2, 0)
    assert all(torch.equal(found.features[tap], expected.features[tap]) for tap in taps)
    assert spec._replace(headless=True).probe(without, (32, 64))["logits"] == (0,)
    for tap in ("anchors", "head.class.p3", DETECTIONS):
        with pytest.raises(RecipeError, match=f"^teacher.stages: the network has no stage '{tap}'"):
            spec._replace(headless=True, taps=frozenset({tap})).build(5)


def freeze_norms(module: nn.Module) -> nn.Module:
    """Replace the BatchNorms by torchvision's frozen ones, with statistics of their own."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            norm = FrozenBatchNorm2d(child.num_features)
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                tensor.normal_(1.0, 0.3)
            norm.running_var.uniform_(0.5, 1.5)
            setattr(module, name, norm)
        freeze_norms(child)
    return module


def test_frozen_norms_of_a_teacher_are_folded_and_its_pyramid_stays_within_rounding():
    model = freeze_norms(small(5)).eval()
    batch = Batch(torch.randn(2, 3, 64, 96), torch.zeros(2).long(), torch.zeros(2).long(), {})
    with torch.no_grad():
        expected = model.backbone(batch.images_BCHW)
    taps = FeatureTaps(model, stages(model), ["fpn.p3", "fpn.p4"])
    options: dict[str, Any] = {"image_size": (64, 96), "dtype": torch.float32, "device": torch.device("cpu")}
    found = Teacher(taps, batch=2, **options)(batch)
    assert not any(isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d) for module in model.modules())
    assert found.logits.shape == (2, 0)
    for value, level in zip(found.features.values(), expected.values(), strict=True):
        torch.testing.assert_close(value, level, rtol=1e-5, atol=1e-5)
        assert not value.is_inference()


def test_folding_may_exchange_boxes_of_nearly_equal_scores():
    model = small(5).eval()
    nn.init.zeros_(model.head.classification_head.cls_logits.bias)
    nn.init.normal_(model.head.regression_head.bbox_reg.weight)
    taps = FeatureTaps(model, stages(model), [DETECTIONS, "fpn.p3"])
    options: dict[str, Any] = {"image_size": (64, 96), "dtype": torch.float32, "device": torch.device("cpu")}
    batch = Batch(torch.randn(1, 3, 64, 96), torch.zeros(1).long(), torch.zeros(1).long(), {})
    found = Teacher(taps, batch=1, **options)(batch).features[DETECTIONS]
    assert (found[..., 5] >= 0).all()


def test_stem_first_stage_and_norms_of_a_student_can_be_frozen_as_torchvision_does():
    patterns = ("backbone.body.conv1", "backbone.body.layer1", "backbone.body.*bn*", "backbone.body.*.downsample.1")
    with torch.device("meta"):
        taps = student_spec(StudentConfig(model="retinanet_resnet18", freeze=patterns), frozenset()).build(3).train()
        theirs = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, trainable_layers=3
        )
    trained = {name for name, parameter in taps.model.named_parameters() if parameter.requires_grad}
    expected = {
        f"backbone.body.{name}" for name, parameter in theirs.body.named_parameters() if parameter.requires_grad
    }
    assert {name for name in trained if name.startswith("backbone.body")} == expected
    assert not any(module.training for module in taps.modules() if isinstance(module, nn.BatchNorm2d))


@pytest.mark.parametrize("task", ["classification", "multilabel", "segmentation"])
def test_a_detector_in_a_recipe_of_another_task_is_one_line(task: str):
    spec = ModelSpec("student", "plain_retinanet", frozenset(), frozenset())
    network = spec.build(3)
    spec.check_task(network, "detection")
    with pytest.raises(RecipeError, match=f"^student.model: plain_retinanet is a detector, and this is task: {task}; "):
        spec.check_task(network, task)


def test_a_classifier_in_a_recipe_of_detection_is_one_line():
    spec = ModelSpec("student", "resnet18", frozenset(), frozenset({"anchors", "regression", DETECTIONS}))
    with (
        torch.device("meta"),
        pytest.raises(RecipeError, match=r"^student.stages: the network has no stage 'anchors', because it is no det"),
    ):
        spec.build(3)
