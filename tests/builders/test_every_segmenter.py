"""Every segmentation network is built from a recipe, with all its taps, as student and as teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.builders.meta import probe
from pipeline.builders.model_spec import ModelSpec
from pipeline.builders.student import student_spec
from pipeline.builders.summary import summarize
from pipeline.config.recipe import StudentConfig, load_recipe
from pipeline.errors import RecipeError
from pipeline.features.names import tap_names
from pipeline.models import create_model, plain_fpn, segmentation
from pipeline.models.stages import stages

NETWORKS = [*segmentation.MODELS, *plain_fpn.MODELS]


def taps_of(name: str) -> frozenset[str]:
    with torch.device("meta"):
        return frozenset(tap_names(stages(create_model(name, 5))))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_segmentation_network_has_taps_of_all_stages_and_of_its_heads(name: str):
    taps = taps_of(name)
    assert {"stage1", "stage2", "stage3", "stage4", "decode", "logits"} <= taps
    summary, _ = probe(student_spec(StudentConfig(model=name), taps | {"last"}), 5, (64, 96))
    assert summary.shapes.keys() == taps | {"last"}
    assert summary.shapes["logits"][0] == 5
    assert summary.shapes["last"] == summary.shapes["stage4"]
    assert summary.macs > 0


@pytest.mark.parametrize("name", [name for name in NETWORKS if not name.startswith("lraspp")])
def test_a_segmentation_network_without_its_head_is_a_teacher_of_features(name: str):
    taps = taps_of(name) - {"logits", "aux"}
    summary, _ = probe(ModelSpec("teacher", name, frozenset(), taps, headless=True), 5, (64, 96))
    assert summary.shapes["logits"] == (0,)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("deeplabv3_resnet18", {"stem": 3}, r"^student.arguments: .*stem must be plain or deep, got 3$"),
        ("deeplabv3_resnet181", {}, r"^student.model: there is no model .*; did you mean deeplabv3_resnet18 or "),
    ],
)
def test_a_mistake_in_the_recipe_is_one_line(model: str, arguments: dict[str, Any], message: str):
    spec = ModelSpec("student", model, frozenset(), frozenset(), json.dumps(arguments))
    with pytest.raises(RecipeError, match=message) as caught:
        probe(spec, 5, 64)
    assert "\n" not in str(caught.value)


def test_a_layer_of_a_backbone_can_be_frozen():
    config = StudentConfig(model="pspnet_resnet18", arguments={"width": 0.125}, freeze=("backbone.layer1", "*.bn1"))
    taps = student_spec(config, frozenset()).build(5)
    trained = [name for name, parameter in taps.model.named_parameters() if parameter.requires_grad]
    assert not any(name.startswith("backbone.layer1") or ".bn1." in name for name in trained)
    assert not taps.train().model.get_submodule("backbone.layer1.0.bn2").training


def test_a_network_whose_norms_do_more_than_normalise_is_not_synchronised():
    config = StudentConfig(model="timm/efficientnet_b0", sync_batchnorm=True)
    with pytest.raises(RecipeError, match=r"^student\.sync_batchnorm: a BatchNormAct2d cannot be synchronised, only"):
        student_spec(config, frozenset()).build(5)


@pytest.mark.parametrize(
    ("model", "told"), [("timm/efficientnet_b0", "a BatchNormAct2d cannot"), ("vit_b_16", "VisionTransformer has no")]
)
def test_a_student_that_cannot_be_synchronised_is_refused_by_check(tmp_path: Path, model: str, told: str):
    data = {"path": "nowhere", "size": 224, "classes": 5, "mean": [0.5] * 3, "std": [0.25] * 3}
    strategy = {"epochs": 1, "batch": 2, "schedule": {"kind": "constant", "rate": 0.1}}
    student = {"model": model, "sync_batchnorm": True}
    recipe = {"data": data, "student": student, "losses": {"ce": {}}, **strategy}
    (tmp_path / "ce.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match=f"student.sync_batchnorm: {told}"):
        summarize(load_recipe(tmp_path / "ce.yaml"))
