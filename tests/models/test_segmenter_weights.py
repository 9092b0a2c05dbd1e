"""Weights of segmentation networks: whole, of other classes, and a backbone's from a classification network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.builders.model_spec import ModelSpec
from pipeline.features.taps import FeatureTaps
from pipeline.models import create_model, published
from pipeline.models.published import published_normalization
from pipeline.models.stages import stages
from pipeline.models.weights import head_tensors, load_weights, weights_sha256

# name, arguments, the classification network with its backbone, and the prefix of the backbone's tensors in it
BACKBONES = [
    ("deeplabv3_resnet18", {}, "resnet18", ""),
    ("pspnet_resnet34", {"output_stride": 16}, "resnet34", ""),
    ("deeplabv3_resnet50", {"aux": False}, "resnet50", ""),
    ("deeplabv3_mobilenet_v2", {}, "mobilenet_v2", "features."),
    ("lraspp_mobilenet_v3_large", {}, "mobilenet_v3_large", "features."),
]
SMALL: dict[str, Any] = {"width": 0.125}


def network(name: str, classes: int = 5, arguments: Mapping[str, Any] | None = None, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(name, classes, arguments)


def saved(path: Path, content: Mapping[str, Tensor]) -> str:
    save_file(dict(content), path)
    return str(path)


@pytest.mark.parametrize(("name", "arguments", "classifier", "prefix"), BACKBONES)
def test_a_classification_network_fills_the_backbone_and_nothing_else(
    tmp_path: Path, name: str, arguments: dict[str, Any], classifier: str, prefix: str
):
    weights = torchvision.models.get_model(classifier, weights=None).state_dict()
    source = saved(tmp_path / "w.safetensors", {f"module.{key}": value for key, value in weights.items()})
    model, fresh = (network(name, 5, arguments, seed=2) for _ in range(2))
    note = load_weights(model, source, name, arguments=arguments, part="backbone")
    assert " other tensors (first module." in note
    for key, value in model.state_dict().items():
        of_backbone = key.startswith("backbone.")
        expected = weights[prefix + key.removeprefix("backbone.")] if of_backbone else fresh.state_dict()[key]
        assert torch.equal(value, expected)


def test_a_published_classification_network_fills_the_backbone(monkeypatch: pytest.MonkeyPatch):
    weights, urls = torchvision.models.resnet18(weights=None).state_dict(), []
    monkeypatch.setattr(published, "load_state_dict_from_url", lambda url, **_keys: urls.append(url) or weights)
    model = network("pspnet_resnet18")
    load_weights(model, "IMAGENET1K_V1", "pspnet_resnet18", part="backbone")
    assert "resnet18" in urls[0]
    assert torch.equal(model.state_dict()["backbone.layer4.1.conv2.weight"], weights["layer4.1.conv2.weight"])


def test_a_segmentation_network_of_other_classes_and_head_fills_the_backbone(tmp_path: Path):
    other, model = network("pspnet_resnet18", 9, SMALL), network("deeplabv3_resnet18", 5, SMALL, seed=2)
    load_weights(model, saved(tmp_path / "w.safetensors", other.state_dict()), "deeplabv3_resnet18", part="backbone")
    assert all(torch.equal(value, other.state_dict()[f"backbone.{key}"]) for key, value in of_backbone(model).items())


def of_backbone(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.get_submodule("backbone").state_dict())


@pytest.mark.parametrize(
    ("name", "arguments", "file", "message"),
    [
        (
            "deeplabv3_resnet18",
            {},
            "resnet34",
            "another architecture than the backbone of deeplabv3_resnet18: .* unexp",
        ),
        ("deeplabv3_resnet34", {}, "resnet18", "another architecture than the backbone of .*: .* keys missing"),
        ("deeplabv3_resnet18", {"stem": "deep"}, "resnet18", "another architecture than the backbone of .*missing"),
        ("deeplabv3_resnet18", SMALL, "resnet18", "another architecture than the backbone of .* of another shape"),
        ("cifar_resnet8", {}, "resnet18", "part: backbone: CifarResNet has no module named backbone; remove part$"),
    ],
)
def test_a_backbone_of_another_architecture_is_refused_in_one_line(
    tmp_path: Path, name: str, arguments: dict[str, Any], file: str, message: str
):
    source = saved(tmp_path / "w.safetensors", torchvision.models.get_model(file, weights=None).state_dict())
    model = network(name, 5, arguments)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(model, source, name, arguments=arguments, part="backbone")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_digest_of_a_backbones_weights_does_not_depend_on_the_rest_of_the_file(tmp_path: Path):
    weights = torchvision.models.resnet18(weights=None).state_dict()
    other = {**weights, "fc.bias": weights["fc.bias"] + 1}
    changed = {**weights, "conv1.weight": weights["conv1.weight"] + 1}
    digests = [
        weights_sha256(saved(tmp_path / f"{n}.safetensors", each), "deeplabv3_resnet18", 5, part="backbone")
        for n, each in enumerate((weights, other, changed))
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("name", ["deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"])
def test_torchvisions_published_segmentation_weights_have_21_classes(monkeypatch: pytest.MonkeyPatch, name: str):
    plain = torchvision.models.get_model(name, weights=None, weights_backbone=None, aux_loss=name[0] == "d")
    monkeypatch.setattr(published, "load_state_dict_from_url", lambda *_args, **_keys: plain.state_dict())
    model = network(name, 21)
    assert load_weights(model, "COCO_WITH_VOC_LABELS_V1", name) == ""
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.state_dict().items())
    assert published_normalization(name, "COCO_WITH_VOC_LABELS_V1") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with pytest.raises(
        ValueError, match=r"the weights have 21 classes, the network and the shards have 19; .*head=new"
    ):
        load_weights(network(name, 19), "COCO_WITH_VOC_LABELS_V1", name)


def test_a_new_head_is_the_last_convolution_of_each_head():
    expected = {f"{head}.weight" for head in ("classifier.5", "aux_classifier.4")}
    assert head_tensors("deeplabv3_resnet18", 5) == expected | {name.replace("weight", "bias") for name in expected}


def test_a_network_without_the_auxiliary_head_takes_weights_that_have_one(tmp_path: Path):
    whole = network("deeplabv3_resnet18", 5, SMALL)
    model = network("deeplabv3_resnet18", 5, {**SMALL, "aux": False}, seed=2)
    load_weights(model, saved(tmp_path / "w.safetensors", whole.state_dict()), "deeplabv3_resnet18")
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["deeplabv3_resnet18", "pspnet_resnet18", "plain_fpn", "deeplabv3_mobilenet_v3_large"])
def test_a_headless_segmentation_network_gives_the_features_of_the_whole(tmp_path: Path, name: str):
    arguments = SMALL if "18" in name else {}
    whole = network(name, 9, arguments).eval()
    spec = ModelSpec(
        "teacher", name, frozenset(), frozenset({"stage4", "decode"}), json.dumps(arguments), headless=True
    )
    without = spec.build(5).eval()
    note = load_weights(without.model, saved(tmp_path / "w.safetensors", whole.state_dict()), name)
    assert "head: none leaves out classifier." in note
    images = torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        found, expected = without(images), FeatureTaps(whole, stages(whole), spec.taps)(images)
    assert found.logits.shape == (2, 0)
    assert all(torch.equal(found.features[tap], expected.features[tap]) for tap in spec.taps)
    assert spec.probe(without, (32, 64))["logits"] == (0,)


def test_a_headless_network_has_no_taps_of_its_heads():
    for tap in ("logits", "aux"):
        spec = ModelSpec("teacher", "deeplabv3_resnet18", frozenset(), frozenset({tap}), headless=True)
        with pytest.raises(ValueError, match=f"teacher.stages: the network has no stage '{tap}'"):
            spec.build(5)


def test_a_head_of_two_last_convolutions_cannot_be_left_out():
    spec = ModelSpec("teacher", "lraspp_mobilenet_v3_large", frozenset(), frozenset(), headless=True)
    with pytest.raises(ValueError, match=r"head: none: the logits at 'classifier' are not those of one convolution; "):
        spec.build(5)
