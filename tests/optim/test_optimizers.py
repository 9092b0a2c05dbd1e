from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from pipeline.optim.optimizer import (
    Config,
    allocate_state,
    create_optimizer,
    set_learning_rate,
)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_norms_and_biases_can_be_spared_weight_decay():
    optimizer = create_optimizer(Config(weight_decay=0.1, decay_norms_and_biases=False), network())
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert sorted(p.ndim for p in decayed["params"]) == [2, 4]
    assert all(p.ndim == 1 for p in spared["params"])
    assert len(spared["params"]) == 4


def test_every_trainable_parameter_is_in_exactly_one_group():
    module = network()
    module[0].weight.requires_grad_(False)
    for decay in (True, False):
        optimizer = create_optimizer(Config(weight_decay=0.1, decay_norms_and_biases=decay), module)
        ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(ids) == sorted(id(p) for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_step_is_the_textbook_sgd(nesterov: bool):
    parameter = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    module = nn.ParameterList([parameter])
    optimizer = create_optimizer(Config(momentum=0.9, nesterov=nesterov, weight_decay=0.01), module)
    weight, momentum, rate = [1.0, -2.0], [0.0, 0.0], torch.tensor(0.1).item()  # 0.1 in float32
    for gradient in ([0.5, 1.0], [-0.25, 2.0]):
        set_learning_rate(optimizer, 0.1)
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        for i in range(2):
            slope = gradient[i] + 0.01 * weight[i]
            momentum[i] = 0.9 * momentum[i] + slope
            weight[i] -= rate * (slope + 0.9 * momentum[i] if nesterov else momentum[i])
    assert parameter.tolist() == pytest.approx(weight, rel=1e-12)


def test_found_inf_leaves_weights_and_momentum_alone():
    module = network()
    optimizer = create_optimizer(Config(momentum=0.9, weight_decay=0.1), module)
    set_learning_rate(optimizer, 0.1)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    weights = [p.detach().clone() for p in module.parameters()]
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in module.parameters()]
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(module.parameters(), weights, strict=True))
    assert all(
        torch.equal(optimizer.state[p]["momentum_buffer"], m) for p, m in zip(module.parameters(), momenta, strict=True)
    )


def test_a_first_step_that_is_skipped_leaves_momentum_at_zero():
    module = network()
    optimizer = create_optimizer(Config(momentum=0.9), module)
    allocate_state(optimizer)
    set_learning_rate(optimizer, 0.1)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert all(not optimizer.state[p]["momentum_buffer"].any() for p in module.parameters())


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ValidationError, match="needs momentum"):
        Config(momentum=0, nesterov=True)
