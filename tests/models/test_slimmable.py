"""A network whose first channels are a network: what both answer, what is left of it, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.features.taps import FeatureTaps
from pipeline.models.create import create_model
from pipeline.models.slimmable import Slimmable, exported_network
from pipeline.models.stages import stages

PAIRS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("edsr_baseline", {"scale": 2, "features": 6, "blocks": 3, "residual_scale": 0.1}, {"features": 24}),
    ("edsr_baseline", {"scale": 3, "features": 4, "blocks": 2, "residual": True}, {"features": 12}),
    ("edsr", {"scale": 4, "features": 8, "blocks": 2}, {"features": 32}),
    ("rcan", {"scale": 4, "features": 8, "groups": 2, "blocks": 2, "reduction": 4}, {"features": 16}),
    ("fsrcnn", {"scale": 2, "features": 8, "shrunk": 3}, {"features": 24, "shrunk": 7}),
]
of_every_pair = pytest.mark.parametrize(("name", "arguments", "within"), PAIRS)


def slimmable(name: str, arguments: dict[str, Any], within: dict[str, Any]) -> Slimmable:
    torch.manual_seed(0)
    with torch.device("meta"):
        part = create_model(name, 1, arguments)
    return Slimmable(create_model(name, 1, {**arguments, **within}), part)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@of_every_pair
def test_the_part_that_is_left_is_a_plain_network_with_the_same_output_bit_for_bit(
    name: str, arguments: dict[str, Any], within: dict[str, Any], dtype: torch.dtype, layout: torch.memory_format
):
    network = slimmable(name, arguments, within).to(dtype).to(memory_format=layout)  # type: ignore[call-overload]
    plain = create_model(name, 1, arguments).to(dtype).to(memory_format=layout)  # type: ignore[call-overload]
    plain.load_state_dict(exported_network(network).state_dict(), strict=True)
    images = torch.rand(2, 3, 9, 14).to(dtype).to(memory_format=layout)
    assert torch.equal(network(images), plain(images))
    assert network(images).std() > 0.01


@of_every_pair
def test_the_tap_full_is_the_whole_networks_image(name: str, arguments: dict[str, Any], within: dict[str, Any]):
    network = slimmable(name, arguments, within)
    taps = FeatureTaps(network, stages(network), ["full"])
    images = torch.rand(2, 3, 9, 14)
    outputs = taps(images)
    assert torch.equal(outputs.features["full"], network.whole(images))
    assert not torch.allclose(outputs.features["full"], outputs.logits)


def test_the_whole_network_runs_only_if_its_image_is_tapped():
    network, ran = slimmable(*PAIRS[0]), []
    network.whole.register_forward_hook(lambda *_: ran.append(True))
    network(torch.rand(1, 3, 6, 6))
    assert not ran
    FeatureTaps(network, stages(network), ["full"])(torch.rand(1, 3, 6, 6))
    assert ran == [True]


def test_both_train_one_set_of_weights_and_the_part_reaches_its_own_channels_alone():
    network = slimmable(*PAIRS[0])
    assert [*network.state_dict()] == [f"whole.{name}" for name in network.whole.state_dict()]
    network(torch.rand(1, 3, 6, 6)).mean().backward()
    weight = network.whole.get_submodule("upsampler.0.0").get_parameter("weight")
    assert weight.grad is not None
    assert weight.grad[: 4 * 6, :6].abs().min() > 0
    assert not weight.grad[4 * 6 :].any()
    assert not weight.grad[:, 6:].any()


def test_what_is_left_does_not_change_when_training_goes_on():
    network = slimmable(*PAIRS[0])
    left = exported_network(network)
    before = {name: x.clone() for name, x in left.state_dict().items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert all(torch.equal(x, before[name]) for name, x in left.state_dict().items())
    plain = nn.Conv2d(3, 3, 1)
    assert exported_network(plain) is plain


@pytest.mark.parametrize(
    ("arguments", "within", "message"),
    [
        ({"features": 8}, {"features": 4}, "head.weight is 8 × 3 × 3 × 3 and 4 × 3 × 3 × 3 in the student"),
        ({"features": 4, "blocks": 2}, {"blocks": 3}, "only one of both networks has body.2.conv1.bias"),
    ],
)
def test_a_network_that_is_no_part_of_the_other_is_refused(
    arguments: dict[str, Any], within: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        slimmable("edsr_baseline", {"scale": 2, "blocks": 2, **arguments}, within)


def test_a_network_that_enlarges_nothing_is_refused():
    with pytest.raises(ValueError, match="a CifarResNet is no network of super-resolution; remove within"):
        Slimmable(create_model("cifar_resnet8", 2), create_model("cifar_resnet8", 2))
