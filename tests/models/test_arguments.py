"""A recipe's arguments reach the factory of a network, and those that it does not take end in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import authors_names
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from pipeline.models import create_model
from pipeline.models.arguments import ArgumentError
from pipeline.models.weights import head_tensors, load_weights, weights_sha256
from pipeline.network_arguments import Arguments


def own_factory(num_classes: int, width: int, *, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, width, bias), nn.Linear(width, num_classes))


def open_factory(num_classes: int, **keys: Any) -> nn.Module:
    return own_factory(num_classes, **keys)


OWN, OPEN = f"{__name__}:own_factory", f"{__name__}:open_factory"


def values(model: nn.Module, kind: str, attribute: str) -> set[float]:
    return {getattr(module, attribute) for module in model.modules() if type(module).__name__ == kind}


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_torchvisions_networks_take_those_of_builder_and_class():
    assert values(create_model("mobilenet_v3_small", 5, {"dropout": 0.35}), "Dropout", "p") == {0.35}
    narrow, plain = (create_model("mobilenet_v3_small", 5, each) for each in ({"width_mult": 0.5}, {}))
    assert size(narrow) < 0.5 * size(plain)
    with torch.device("meta"):
        vit = create_model("vit_b_16", 5, {"image_size": 32})
        assert vit(torch.empty(1, 3, 32, 32)).shape == (1, 5)


def test_timms_networks_take_their_own():
    pytest.importorskip("timm")
    keys = {"img_size": 32, "drop_path_rate": 0.1}
    model = create_model("timm/vit_tiny_patch16_224", 5, keys).eval()
    assert max(values(model, "DropPath", "drop_prob")) == pytest.approx(0.1)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


def test_the_projects_networks_take_depth_and_widths():
    assert size(create_model("cifar_resnet8", 5, {"depth": 20})) == size(create_model("cifar_resnet20", 5))


@pytest.mark.parametrize("name", [OWN, OPEN])
def test_a_users_factory_takes_its_own(name: str):
    assert size(create_model(name, 5, {"width": 2, "bias": False})) == 12 * 2 + 2 * 5 + 5


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet18", {"width": 3}, r"resnet18 takes no argument 'width'; it takes .*groups, width_per_group, .*"),
        ("convnext_tiny", {"drop_path": 0.1}, r".* takes no argument 'drop_path'; it takes .*stochastic_depth_prob.*"),
        ("cifar_resnet8", {"width": 3}, r"cifar_resnet8 takes no argument 'width'; it takes depth, widths"),
        ("mobilenet_v1", {"width": 3}, r"mobilenet_v1 takes no argument 'width'; it takes none"),
        (OWN, {"width": 3, "height": 3}, r".*:own_factory' takes no argument 'height'; it takes width, bias"),
        ("timm/resnet18", {"img_size": 32}, r"timm/resnet18 cannot be built with \{\"img_size\": 32\}: .*'img_size'"),
        ("resnet18", {"replace_stride_with_dilation": [1]}, r"resnet18 cannot be built with .*: .*3-element tuple.*"),
        ("cifar_resnet8", {"depth": "x"}, r"cifar_resnet8 cannot be built with \{\"depth\": \"x\"\}: .*"),
    ],
)
def test_what_a_factory_does_not_take_ends_in_one_line(name: str, arguments: dict[str, Any], message: str):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    with pytest.raises(ArgumentError, match=f"^{message}$") as caught:
        create_model(name, 5, arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [{"wdth": 3}, {"width": "a"}])
def test_what_a_factory_passes_on_and_fails_with_ends_in_one_line(arguments: dict[str, Any]):
    with pytest.raises(ArgumentError, match=r"^'.*:open_factory' cannot be built with \{[^\n]*$"):
        create_model(OPEN, 2, arguments)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        create_model(OPEN, 2)  # a bug of the factory


def test_an_unknown_network_is_still_told_as_such():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="there is no model 'timm/resnet1888'"):
        create_model("timm/resnet1888", 5, {"img_size": 32})


@pytest.mark.parametrize("name", ["num_classes", "weights", "pretrained", "checkpoint_path", "features_only"])
def test_what_the_recipe_gives_elsewhere_cannot_be_an_argument(name: str):
    with pytest.raises(ValidationError, match=f"{name} cannot be given here; "):
        TypeAdapter(Arguments).validate_python({name: 3})


def test_arguments_are_plain_values():
    check = TypeAdapter(Arguments).validate_python
    assert check({"a": [1, {"b": 0.5}], "c": True}) == {"a": [1, {"b": 0.5}], "c": True}
    assert check({}) is None
    with pytest.raises(ValidationError, match="a: expected numbers, texts, true, false, lists or mappings, got "):
        check({"a": {1, 2}})


def test_weights_fit_the_network_of_those_arguments_and_are_digested_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = {"depth": 14}
    model, path = create_model("cifar_resnet8", 10, arguments), tmp_path / "w.pt"
    torch.save(model.state_dict(), path)
    os.utime(path, (1e9, 1e9))  # old enough to be remembered
    digests = {weights_sha256(str(path), "cifar_resnet8", 10, arguments=arguments) for _ in range(2)}
    assert len(digests) == 1
    # Neither without them nor with others is it what was remembered.
    for others in (None, {"depth": 20}):
        with pytest.raises(ValueError, match="weights of another architecture"):
            weights_sha256(str(path), "cifar_resnet8", 10, arguments=others)
    assert head_tensors("cifar_resnet8", 10, arguments) == {"fc.weight", "fc.bias"}


def test_timm_converts_weights_for_the_network_with_them(tmp_path: Path):
    pytest.importorskip("timm")
    name, arguments = "timm/convnext_atto", {"kernel_sizes": 3}
    torch.manual_seed(0)
    weights = create_model(name, 7, arguments).state_dict()
    assert weights["stages.0.blocks.0.conv_dw.weight"].shape[-1] == 3  # not 7
    torch.save({authors_names.convnext(key): value for key, value in weights.items()}, tmp_path / "w.pt")
    model = create_model(name, 7, arguments)
    load_weights(model, str(tmp_path / "w.pt"), name, arguments=arguments)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_timm_publishes_weights_for_the_network_with_them(monkeypatch: pytest.MonkeyPatch):
    timm = pytest.importorskip("timm")
    name, arguments = "timm/vit_tiny_patch16_224", {"img_size": 32}
    model, asked = create_model(name, 7, arguments), []

    def create(short: str, *, pretrained: bool, **keys: object) -> nn.Module:
        asked.append((short, pretrained, keys))
        return model

    fresh = create_model(name, 7, arguments)
    monkeypatch.setattr(timm, "create_model", create)
    load_weights(fresh, "augreg_in21k", name, arguments=arguments)
    assert asked == [("vit_tiny_patch16_224.augreg_in21k", True, arguments)]
    assert torch.equal(fresh.state_dict()["head.weight"], model.state_dict()["head.weight"])
