"""The one optimizer of the student and of the losses' auxiliary modules: its parameter groups and its learning rate."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor, nn

from pipeline.frozen_model import FrozenModel


class Config(FrozenModel):
    """The recipe's ``optimizer``. The learning rate stands in ``schedule``."""

    kind: Literal["sgd"] = "sgd"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 0.0
    decay_norms_and_biases: bool = True
    """False leaves weight decay off normalisation layers' parameters and off every bias."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Config:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: true needs momentum above 0")
        return self


def create_optimizer(config: Config, module: nn.Module) -> torch.optim.SGD:
    """Return SGD over every trainable parameter of ``module``.

    Fused, because that step takes a ``found_inf`` flag on the device and then leaves weights and momentum alone.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    undecayed = undecayed_parameters(module)
    smallest_decayed = 0 if config.decay_norms_and_biases else 2  # dimensions: norms and biases have one
    decays = [parameter.ndim >= smallest_decayed and parameter not in undecayed for parameter in parameters]
    decayed = [parameter for parameter, decay in zip(parameters, decays, strict=True) if decay]
    spared = [parameter for parameter, decay in zip(parameters, decays, strict=True) if not decay]
    groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=0.0,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )


def allocate_momentum(optimizer: Any) -> None:
    """Give SGD, once it is prepared, momentum of zeros.

    The fused step allocates it without filling it, and a first step that is skipped would leave it so. Only after
    ``prepare`` do the groups hold what is stepped: under ZeRO-1 and 2 this rank's part of the parameters.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def undecayed_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that no weight decay may touch: a module names its own in an attribute ``undecayed``."""
    return {own.get_parameter(name) for own in module.modules() for name in getattr(own, "undecayed", ())}


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Give every parameter group the rate of this step, in float32 on every device.

    A GPU's fused step reads a rate that is a tensor, as a captured step needs it, in float32, and a number in float64:
    they would be two runs.
    """
    rounded = np.float32(rate).item()
    kept = optimizer.param_groups[0]["lr"]
    if isinstance(kept, Tensor):
        kept.fill_(rounded)
        return
    for group in optimizer.param_groups:
        group["lr"] = rounded


def move_learning_rate_to(device: torch.device, optimizer: Any) -> None:
    """Keep the rate of all parameter groups in one tensor on the device, where a captured step reads it."""
    rate = torch.zeros((), dtype=torch.float32, device=device)
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Return the optimizer's state for a checkpoint, its rate a number wherever it is kept."""
    state = optimizer.state_dict()
    groups = [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]
    return {**state, "param_groups": groups}
