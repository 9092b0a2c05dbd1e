"""With ``decay_norms_and_biases: false``, the parameters that decay are those that decay in timm."""

from __future__ import annotations

import pytest
import timm
import timm.optim
import torch
from torch import nn

from pipeline.models import pisr, super_resolution
from pipeline.models.cifar_resnet import MODELS as RESNETS
from pipeline.models.create import PROJECT_MODELS, create_model
from pipeline.optim.optimizer import Config, create_optimizer

SPARING = Config(kind="adamw", weight_decay=0.05, decay_norms_and_biases=False)
TIMM = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch16_dinov3": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "beit_base_patch16_224": {},
    "swin_tiny_patch4_window7_224": {},
    "swinv2_tiny_window8_256": {},
    "convnext_tiny": {},
    "convnextv2_atto": {},
    "efficientnet_b0": {},
    "levit_128s": {},
    "resnet18": {},
}
PAIRS = {
    "vit_b_16": "vit_base_patch16_224",
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_v2_t": "swinv2_tiny_window8_256",
    "convnext_tiny": "convnext_tiny",
    "resnet50": "resnet50",
}
"""The same network in torchvision and timm."""


def decayed(network: nn.Module, config: Config = SPARING) -> set[str]:
    """Return the names of the parameters that decay."""
    groups = create_optimizer(config, nn.ModuleDict({"student": network}), network).param_groups
    found = {parameter for group in groups for parameter in group["params"] if group["weight_decay"]}
    return {name for name, parameter in network.named_parameters() if parameter in found}


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, 10, {"scale": 2} if name in {**super_resolution.MODELS, **pisr.MODELS} else None)


@pytest.mark.parametrize("name", TIMM)
def test_the_groups_are_timms(name: str):
    network = on_meta(f"timm/{name}")
    listed = getattr(network, "no_weight_decay", set)()
    groups = timm.optim.param_groups_weight_decay(network, 0.05, no_weight_decay_list=listed)
    theirs = {parameter for group in groups for parameter in group["params"] if group["weight_decay"]}
    assert decayed(network) == {name for name, parameter in network.named_parameters() if parameter in theirs}
    assert (
        decayed(network, SPARING.model_copy(update={"decay_norms_and_biases": True}))
        == dict(network.named_parameters()).keys()
    )


@pytest.mark.parametrize("name", PAIRS)
def test_as_many_numbers_of_torchvisions_networks_decay_as_of_timms(name: str):
    sizes = []
    for network in (on_meta(name), on_meta(f"timm/{PAIRS[name]}")):
        named = dict(network.named_parameters())
        sizes.append(sum(named[each].numel() for each in decayed(network)))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("name", "spared"),
    [
        ("vit_b_16", {"class_token", "encoder.pos_embedding"}),
        ("swin_t", {"features.1.0.attn.relative_position_bias_table"}),
        ("convnext_tiny", {"features.1.0.layer_scale"}),
    ],
)
def test_tokens_and_tables_of_torchvisions_networks_do_not_decay(name: str, spared: set[str]):
    network = on_meta(name)
    assert spared <= dict(network.named_parameters()).keys() - decayed(network)


@pytest.mark.parametrize("name", [*PROJECT_MODELS, "resnet18", "resnet34", "mobilenet_v2", "vgg13_bn", "densenet121"])
def test_of_convolutional_networks_all_but_vectors_decay(name: str):
    network = on_meta(name)
    assert decayed(network) == {name for name, parameter in network.named_parameters() if parameter.ndim > 1}


class Listing(nn.Module):
    """A user's network that lists its own by a pattern and by names of parameters that it has not."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ParameterList([torch.zeros(2, 2), torch.zeros(2, 3)])
        self.weight = nn.Parameter(torch.zeros(2, 2))

    def no_weight_decay(self) -> set[str]:
        """Return them, as timm's networks do."""
        return {"tables.*", "dist_token"}


def test_a_users_network_may_list_its_own():
    assert decayed(Listing()) == {"weight"}


def test_the_groups_of_one_rate_hold_every_parameter_once():
    network = create_model(next(iter(RESNETS)), 10)
    groups = create_optimizer(SPARING, network).param_groups
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(map(id, network.parameters()))
