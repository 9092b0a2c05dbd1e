"""A network without its head is the same network up to the features, and its logits have no classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.builders.model_spec import ModelSpec
from pipeline.features.taps import FeatureTaps
from pipeline.models import create_model
from pipeline.models.foreign_names import foreign_names
from pipeline.models.headless import without_head
from pipeline.models.stages import stages
from pipeline.models.weights import load_weights, weights_sha256

# A network of each construction of a head, and the names of the weights that are the head's.
HEADS = {
    "cifar_resnet8": ["fc.weight", "fc.bias"],
    "resnet18": ["fc.weight", "fc.bias"],
    "mobilenet_v2": ["classifier.1.weight", "classifier.1.bias"],
    "mobilenet_v3_small": ["classifier.3.weight", "classifier.3.bias"],
    "squeezenet1_1": ["classifier.1.weight", "classifier.1.bias"],
    "shufflenet_v2_x0_5": ["fc.weight", "fc.bias"],
    "convnext_tiny": ["classifier.2.weight", "classifier.2.bias"],
    "swin_t": ["head.weight", "head.bias"],
    "timm/resnet18": ["fc.weight", "fc.bias"],
    "timm/regnetx_002": ["head.fc.weight", "head.fc.bias"],
    "timm/vit_tiny_patch16_224": ["head.weight", "head.bias"],
}


def network(name: str, classes: int = 7) -> nn.Module:
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    return create_model(name, classes).eval()


def headless(name: str, *taps: str, classes: int = 10) -> FeatureTaps:
    return ModelSpec("teacher", name, frozenset(), frozenset(taps), headless=True).build(classes)


def saved(path: Path, state: Mapping[str, Tensor]) -> str:
    save_file(dict(state), path)
    return str(path)


@pytest.mark.parametrize("name", HEADS)
def test_the_weights_of_a_complete_network_of_other_classes_load_without_the_head(name: str, tmp_path: Path):
    whole = network(name)
    size = 224 if "vit" in name else 64
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    wanted = {"last", "embedding"} & {"last", *stages(whole)}
    source = saved(tmp_path / "whole.safetensors", whole.state_dict())
    without = headless(name, *wanted).eval()
    note = load_weights(without.model, source, name)
    assert note == f"{source}: head: none leaves out {', '.join(sorted(HEADS[name]))}"
    with torch.no_grad():
        found, expected = without(images), FeatureTaps(whole, stages(whole), wanted)(images)
    assert found.logits_BK.shape == (2, 0)
    assert all(torch.equal(found.features[tap], expected.features[tap]) for tap in wanted)
    assert without.model.state_dict().keys() == whole.state_dict().keys() - set(HEADS[name])


def test_weights_that_were_saved_without_a_head_load_as_they_are(tmp_path: Path):
    state = network("resnet18").state_dict()
    trunk = {name: value for name, value in state.items() if not name.startswith("fc.")}
    without = headless("resnet18")
    assert load_weights(without.model, saved(tmp_path / "trunk.safetensors", trunk), "resnet18") == ""
    assert torch.equal(without.model.state_dict()["conv1.weight"], state["conv1.weight"])


def test_the_head_is_left_out_under_the_names_of_well_known_code_too(tmp_path: Path):
    whole = network("cifar_vgg8")
    state = whole.state_dict()
    renamed = {foreign: state[name] for foreign, name in foreign_names(whole, state).items()}
    assert {"classifier.weight", "block0.0.weight"} <= renamed.keys()
    torch.save({"model": renamed}, tmp_path / "foreign.pt")
    without = headless("cifar_vgg8")
    note = load_weights(without.model, str(tmp_path / "foreign.pt"), "cifar_vgg8")
    assert "head: none leaves out fc.bias, fc.weight" in note
    assert all(torch.equal(value, state[name]) for name, value in without.model.state_dict().items())


def test_weights_with_the_names_of_their_authors_load_into_a_headless_network_of_timm(tmp_path: Path):
    """DINOv2's own files have no head, and a token that timm's networks do not have."""
    state = network("timm/vit_tiny_patch16_224").state_dict()
    published = {name: value for name, value in state.items() if not name.startswith("head.")}
    source = saved(tmp_path / "dino.safetensors", published | {"mask_token": torch.zeros(1, 192)})
    without = headless("timm/vit_tiny_patch16_224")
    load_weights(without.model, source, "timm/vit_tiny_patch16_224")
    assert without.model.state_dict().keys() == published.keys()
    assert all(torch.equal(value, state[name]) for name, value in without.model.state_dict().items())


def test_weights_of_another_trunk_are_refused(tmp_path: Path):
    source = saved(tmp_path / "other.safetensors", network("cifar_resnet20").state_dict())
    with pytest.raises(ValueError, match="weights of another architecture than cifar_resnet8"):
        load_weights(headless("cifar_resnet8").model, source, "cifar_resnet8")


def test_the_digest_is_that_of_the_trunk_whatever_the_classes(tmp_path: Path):
    state = network("cifar_resnet8", 7).state_dict()
    trunk = {name: value for name, value in state.items() if not name.startswith("fc.")}
    sources = [saved(tmp_path / f"{n}.safetensors", part) for n, part in enumerate((state, trunk))]
    digests = {weights_sha256(source, "cifar_resnet8", n, headless={}) for source in sources for n in (5, 10)}
    assert len(digests) == 1
    assert weights_sha256(sources[0], "cifar_resnet8", 7) not in digests


def test_a_network_whose_last_layer_is_not_known_must_name_it():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(
        ValueError, match=r"^head: none: no last linear layer .* under stages: \{logits: <module path>\}"
    ):
        without_head(model, stages(model))
    with pytest.raises(ValueError, match=r"^head: none: Sequential has no module 'fc': "):
        without_head(model, {"logits": "fc"})
    assert without_head(model, {"stage1": "0", "logits": "1"}) == {"stage1": "0"}
    assert model(torch.zeros(2, 3, 2, 2)).shape == (2, 0)


def test_a_network_that_returns_logits_all_the_same_is_refused():
    spec = ModelSpec("teacher", "cifar_resnet8", frozenset(), frozenset(), headless=True)
    whole = FeatureTaps(network("cifar_resnet8"), {}, ())  # as one whose named layer is not that of its logits
    with pytest.raises(
        ValueError, match=r"^teacher.model: cifar_resnet8 still returns \[7\] without its head; name its "
    ):
        spec.probe(whole, 32)


def test_a_class_activation_map_needs_a_head():
    with pytest.raises(ValueError, match=r"^teacher.stages: tap 'cam': \w+ has no known average of a map before one"):
        headless("resnet18", "cam")
