"""A parameter's rate is the schedule's times that of its pattern, and decay is grouped as ever."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pipeline.optim.optimizer import (
    Config,
    allocate_state,
    create_optimizer,
    move_learning_rate_to,
    optimizer_state,
    set_learning_rate,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)).double()


CONFIG = {"momentum": 0.9, "weight_decay": 0.1, "decay_norms_and_biases": False}


def step(module: nn.Module, optimizer: torch.optim.SGD, rate: float) -> None:
    set_learning_rate(optimizer, rate)
    for number, parameter in enumerate(module.parameters()):
        parameter.grad = torch.full_like(parameter, 0.5 + number)
    optimizer.step()


def test_two_steps_are_those_of_an_optimizer_of_each_rate():
    module, reference = network(), network()
    optimizer = create_optimizer(Config(**CONFIG, rates={"3.*": 10.0, "1": 0.5}), module)
    allocate_state(optimizer)
    named = dict(reference.named_parameters())
    own = {name: 10.0 if name.startswith("3.") else 0.5 if name.startswith("1.") else 1.0 for name in named}
    plain = {
        name: torch.optim.SGD([x], lr=0.1, momentum=0.9, weight_decay=0.1 if x.ndim > 1 else 0.0)
        for name, x in named.items()
    }
    for rate in (0.1, 0.2):
        step(module, optimizer, rate)
        for number, (name, parameter) in enumerate(named.items()):
            plain[name].param_groups[0]["lr"] = torch.tensor(rate * own[name], dtype=torch.float32).item()
            parameter.grad = torch.full_like(parameter, 0.5 + number)
            plain[name].step()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-12, atol=0)


def test_each_group_has_one_rate_and_one_decay_and_each_parameter_one_group():
    module = network()
    groups = create_optimizer(Config(**CONFIG, rates={"3.*": 10.0}), module).param_groups
    assert [(group.get("multiplier", 1.0), group["weight_decay"]) for group in groups] == [
        (1.0, 0.1),
        (1.0, 0.0),
        (10.0, 0.1),
        (10.0, 0.0),
    ]
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(map(id, module.parameters()))


def test_the_order_of_the_patterns_changes_nothing():
    shapes = []
    for rates in ({"3": 10.0, "0": 2.0}, {"0": 2.0, "3": 10.0}):
        groups = create_optimizer(Config(rates=rates), network()).param_groups
        shapes.append([[tuple(parameter.shape) for parameter in group["params"]] for group in groups])
    assert shapes[0] == shapes[1]


def test_without_rates_the_groups_are_as_they_were():
    groups = create_optimizer(Config(**CONFIG), network()).param_groups
    assert len(groups) == 2
    assert all("multiplier" not in group for group in groups)


def test_rates_in_tensors_are_the_same_numbers():
    numbers, tensors = network(), network()
    optimizers = [create_optimizer(Config(**CONFIG, rates={"3": 10.0}), module) for module in (numbers, tensors)]
    move_learning_rate_to(torch.device("cpu"), optimizers[1])
    assert len({id(group["lr"]) for group in optimizers[1].param_groups}) == 2
    for optimizer in optimizers:
        set_learning_rate(optimizer, 0.3)
    rates = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]
    assert rates[0] == rates[1]
    assert rates[0][2] == pytest.approx(3.0, rel=1e-7)


def test_a_state_that_is_loaded_back_keeps_the_rates():
    module = network()
    optimizer = create_optimizer(Config(**CONFIG, rates={"3": 10.0}), module)
    step(module, optimizer, 0.1)
    again = copy.deepcopy(module)
    other = create_optimizer(Config(**CONFIG, rates={"3": 10.0}), again)
    other.load_state_dict(copy.deepcopy(optimizer_state(optimizer)))
    step(module, optimizer, 0.2)
    step(again, other, 0.2)
    for one, two in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
