"""What weight decay alone does to the parameters of a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.losses._base import Loss
from pipeline.optim.optimizer import Config, create_optimizer, set_learning_rate


def decay_alone(loss: Loss, config: Config, rate: float = 0.1) -> dict[str, Tensor]:
    """Take a step with gradients of zero, and return the parameters before it, by name."""
    optimizer = create_optimizer(config, torch.nn.ModuleDict({"losses": loss}))
    before = {name: parameter.detach().clone() for name, parameter in loss.named_parameters()}
    for parameter in loss.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_learning_rate(optimizer, rate)
    optimizer.step()
    return before
