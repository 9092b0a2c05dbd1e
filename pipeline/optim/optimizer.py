"""The optimizer, which trains the student and the losses' auxiliary modules: parameter groups and learning rate."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor, nn

from pipeline.features.patterns import rate_multipliers
from pipeline.frozen_model import FrozenModel
from pipeline.optim.decay import spared_parameters, undecayed_parameters

MULTIPLIER = "multiplier"
"""Key of a parameter group with the multiplier of its learning rate; a group without it has 1."""


class Config(FrozenModel):
    """The recipe's ``optimizer`` section. The learning rate is in ``schedule``."""

    kind: Literal["sgd"] = "sgd"
    """The optimizer; SGD is the only one."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD."""
    nesterov: bool = False
    """Whether the momentum is that of Nesterov."""
    weight_decay: NonNegativeFloat = 0.0
    """Factor of the L2 penalty on the parameters."""
    decay_norms_and_biases: bool = True
    """Whether weight decay also applies to biases, parameters of normalisation layers, tokens and position tables."""
    rates: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})
    """Multiplier of the learning rate by pattern of the student's parameters: ``{"fc.*": 10.0}``; others have 1."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Config:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: true needs momentum above 0; raise momentum, or set nesterov: false")
        return self


def create_optimizer(config: Config, module: nn.Module, student: nn.Module | None = None) -> torch.optim.SGD:
    """Return SGD over every trainable parameter of ``module``, in groups of one rate and one weight decay.

    ``student`` is the network in it whose parameters the patterns of ``config.rates`` are for.
    It is fused, because a fused step reads a ``found_inf`` flag on the device and skips the update where it is set.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    network = module if student is None else student
    undecayed = undecayed_parameters(module)
    if not config.decay_norms_and_biases:
        undecayed |= spared_parameters(module, network)
    multipliers = rate_multipliers(network, config.rates)
    groups: list[dict[str, Any]] = []
    # That of most comes first; a run without ``rates`` has the groups that it always had.
    for rate in sorted({1.0, *multipliers.values()}, key=lambda rate: (rate != 1.0, rate)):
        same = [parameter for parameter in parameters if multipliers.get(parameter, 1.0) == rate]
        decayed = [parameter for parameter in same if parameter not in undecayed]
        not_decayed = [parameter for parameter in same if parameter in undecayed]
        own = {} if rate == 1.0 else {MULTIPLIER: rate}
        groups += [{"params": decayed, **own}, {"params": not_decayed, "weight_decay": 0.0, **own}]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=0.0,  # every step sets its own rate
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )


def allocate_momentum(optimizer: Any) -> None:
    """Create the momentum buffers of SGD, filled with zeros. To be called after ``Accelerator.prepare``.

    A fused step creates them uninitialised, and a skipped first step would leave them so. Only after ``prepare`` do the
    groups hold the tensors of the step: under ZeRO-1 and 2, this rank's part of the parameters.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Set the rate of this step in every parameter group, times the group's multiplier, rounded to float32."""
    # A captured step needs the rate in a tensor, which the fused step reads in float32; a Python number is read in
    # float64. Without the rounding, a run with a CUDA graph and one without would differ.
    filled: set[int] = set()
    for group in optimizer.param_groups:
        rounded, current = np.float32(rate * group.get(MULTIPLIER, 1.0)).item(), group["lr"]
        if not isinstance(current, Tensor):
            group["lr"] = rounded
        elif id(current) not in filled:  # groups of one multiplier share a tensor
            current.fill_(rounded)
            filled.add(id(current))


def move_learning_rate_to(device: torch.device, optimizer: Any) -> None:
    """Replace the rates of the parameter groups by tensors on the device, one a multiplier, for a captured step."""
    rates: dict[float, Tensor] = {}
    for group in optimizer.param_groups:
        multiplier = group.get(MULTIPLIER, 1.0)
        group["lr"] = rates.setdefault(multiplier, torch.zeros((), dtype=torch.float32, device=device))


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Return the optimizer's state for a checkpoint, with the learning rate as a number."""
    state = optimizer.state_dict()
    groups = [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]
    return {**state, "param_groups": groups}
