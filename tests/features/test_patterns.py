"""Patterns are for parameters by name, or for all in a module, and each must be for some."""

from __future__ import annotations

import pytest
from torch import nn

from pipeline.features.patterns import freeze, frozen_norms, matches, rate_multipliers
from pipeline.models import create_model


def frozen(*patterns: str) -> set[str]:
    model = create_model("resnet18", 5)
    freeze(model, patterns)
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("conv1", "conv1.weight", True),
        ("conv1.weight", "conv1.weight", True),
        ("layer1", "layer1.0.conv1.weight", True),
        ("layer1.*", "layer1.0.conv1.weight", True),
        ("*.bias", "fc.bias", True),
        ("layer[12].*", "layer2.0.bn1.bias", True),
        ("conv1", "layer1.0.conv1.weight", False),
        ("layer1", "layer10.weight", False),
        ("Conv1", "conv1.weight", False),
    ],
)
def test_a_pattern_is_a_name_or_the_path_of_a_module(pattern: str, name: str, expected: bool):
    assert matches(name, pattern) == expected


def test_frozen_parameters_are_those_of_the_patterns_and_no_other():
    names = [name for name, _ in create_model("resnet18", 5).named_parameters()]
    assert frozen() == set()
    assert frozen("layer1.*", "conv1") == {n for n in names if n.startswith("layer1.")} | {"conv1.weight"}
    assert frozen("*.bias") == {name for name in names if name.endswith(".bias")}


def test_norms_are_frozen_with_their_module_and_not_with_a_parameter_alone():
    model = create_model("resnet18", 5)
    assert frozen_norms(model, ["layer1.0", "bn1"]) == ["bn1", "layer1.0.bn1", "layer1.0.bn2"]
    assert frozen_norms(model, ["*.weight", "*.bias"]) == []


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layer5.*", r"^'layer5\.\*' is the name or path of no parameter; did you mean 'layer\d'\?$"),
        ("zzz", r"^'zzz' is the name or path of no parameter; the first is conv1\.weight$"),
        ("*", "^every parameter of the network is frozen; leave some to train$"),
    ],
)
def test_a_pattern_for_nothing_and_one_for_everything_are_refused(pattern: str, message: str):
    with pytest.raises(ValueError, match=message):
        frozen(pattern)


def test_rates_are_those_of_the_patterns():
    model = create_model("resnet18", 5)
    found = rate_multipliers(model, {"fc": 10.0, "layer4.*": 2.0})
    named = {name: found[parameter] for name, parameter in model.named_parameters() if parameter in found}
    assert {name: rate for name, rate in named.items() if rate == 10.0} == {"fc.weight": 10.0, "fc.bias": 10.0}
    assert {name.partition(".")[0] for name, rate in named.items() if rate == 2.0} == {"layer4"}


def test_rates_that_overlap_or_are_for_what_does_not_train_are_refused():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"^'1' and '\*\.bias' are both for 1\.bias; give it one of them$"):
        rate_multipliers(model, {"1": 10.0, "*.bias": 2.0})
    freeze(model, ["0"])
    with pytest.raises(ValueError, match=r"^'0\.\*' is the name or path of no parameter that trains; the first is "):
        rate_multipliers(model, {"0.*": 2.0})
