"""The optimizer, which trains the student and the losses' auxiliary modules: parameter groups and learning rate."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor, nn

from pipeline.features.patterns import rate_multipliers
from pipeline.frozen_model import FrozenModel
from pipeline.optim.decay import spared_parameters, undecayed_parameters
from pipeline.optim.kinds import KEYS, TIMM, check_keys, make_optimizer

MULTIPLIER = "multiplier"
"""Key of a parameter group with the multiplier of its learning rate; a group without it has 1."""


class Config(FrozenModel):
    """The recipe's ``optimizer`` section. The learning rate is in ``schedule``."""

    kind: str = "sgd"
    """Optimizer of torch (``sgd``, ``adamw``, ``adam``, ``nadam``, ``radam``, ``rmsprop``, …) or ``timm/<name>``."""
    momentum: float | None = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD; of another optimizer that has one, its own default."""
    nesterov: bool | None = False
    """Whether the momentum is that of Nesterov; of another optimizer than SGD, its own default."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], ...] | None = None
    """Factors of the moving averages of Adam and its kin; default: the optimizer's own."""
    eps: PositiveFloat | None = None
    """Number that Adam and its kin add to a denominator; default: the optimizer's own."""
    weight_decay: NonNegativeFloat = 0.0
    """Factor of the L2 penalty on the parameters, or of the decay where the optimizer decouples it, as AdamW does."""
    decay_norms_and_biases: bool = True
    """Whether weight decay also applies to biases, parameters of normalisation layers, tokens and position tables."""
    arguments: dict[str, bool | int | float | str | tuple[float, ...]] | None = None
    """More keyword arguments of the optimizer, such as ``{amsgrad: true}`` of ``adam``."""
    rates: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})
    """Multiplier of the learning rate by pattern of the student's parameters: ``{"fc.*": 10.0}``; others have 1."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_are_those_of_sgd(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("kind", "sgd") != "sgd":
            return {"momentum": None, "nesterov": None, **given}
        return given

    @model_validator(mode="after")
    def _keys_belong_to_the_optimizer(self) -> Config:
        if not self.kind.startswith(TIMM):  # timm may not be installed where a recipe is only read
            check_keys(self.kind, self.keys, self.arguments or {})
        return self

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Config:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: true needs momentum above 0; raise momentum, or set nesterov: false")
        return self

    @property
    def keys(self) -> dict[str, Any]:
        """Return the arguments of the optimizer that have keys of their own."""
        given = {key: getattr(self, key) for key in KEYS if getattr(self, key) is not None}
        return {**given, "weight_decay": self.weight_decay}


def check_optimizer(config: Config) -> None:
    """Raise ValueError, in one line, if the optimizer cannot be made with the recipe's arguments."""
    # Without arguments, torch's are known to be right. torch needs seconds to import what its first optimizer needs.
    if config.arguments or config.kind.startswith(TIMM):
        _make(config, [{"params": [nn.Parameter(torch.zeros(2, 2))]}], rate=1.0)


def create_optimizer(
    config: Config, module: nn.Module, student: nn.Module | None = None, rate: float = 1.0
) -> torch.optim.Optimizer:
    """Return the optimizer of every trainable parameter of ``module``, in groups of one rate and one weight decay.

    ``student`` is the network in it whose parameters the patterns of ``config.rates`` are for. ``rate`` is the largest
    learning rate of the run, which some of timm's optimizers read; every step sets its own.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    network = module if student is None else student
    undecayed = undecayed_parameters(module)
    if not config.decay_norms_and_biases:
        undecayed |= spared_parameters(module, network)
    multipliers = rate_multipliers(network, config.rates)
    groups: list[dict[str, Any]] = []
    # That of most comes first; a run without ``rates`` has the groups that it always had.
    for multiplier in sorted({1.0, *multipliers.values()}, key=lambda multiplier: (multiplier != 1.0, multiplier)):
        same = [parameter for parameter in parameters if multipliers.get(parameter, 1.0) == multiplier]
        decayed = [parameter for parameter in same if parameter not in undecayed]
        not_decayed = [parameter for parameter in same if parameter in undecayed]
        own = {} if multiplier == 1.0 else {MULTIPLIER: multiplier}
        groups += [{"params": decayed, **own}, {"params": not_decayed, "weight_decay": 0.0, **own}]
    return _make(config, [group for group in groups if group["params"]], rate)


def _make(config: Config, groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
    return make_optimizer(config.kind, groups, rate, config.keys, config.arguments or {})


def allocate_state(optimizer: Any) -> None:
    """Create the state of a fused optimizer, filled with zeros. To be called after ``Accelerator.prepare``.

    A fused step of SGD creates it uninitialised, and a skipped first step would leave it so. DeepSpeed only loads a
    state that exists. Only after ``prepare`` do the groups hold the tensors of the step: under ZeRO-1 and 2, this
    rank's part of the parameters. Other optimizers create their state in their first step, which the host skips.
    """
    for group in optimizer.param_groups:
        if not group.get("fused"):
            continue
        names = ["momentum_buffer"] if group.get("momentum") else []
        if "betas" in group:
            names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        for parameter in group["params"]:
            if "betas" in group:
                optimizer.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in names:
                optimizer.state[parameter][name] = torch.zeros_like(parameter)


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


def allow_capture(optimizer: Any) -> None:
    """Tell a fused optimizer that its next steps are captured, which torch's Adam otherwise refuses.

    Not earlier: a step that is not captured would warn of it.
    """
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Return the optimizer's state for a checkpoint, which does not depend on whether the steps are a CUDA graph."""
    state = optimizer.state_dict()
    groups = [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]
    for group in groups:
        if "capturable" in group:
            group["capturable"] = False
    return {**state, "param_groups": groups}
