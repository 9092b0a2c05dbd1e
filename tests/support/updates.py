"""The update that ends a step, as ``Step`` makes it, of a module whose gradients a test gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from pipeline.optim.guard import FiniteGuard
from pipeline.optim.optimizer import Config, allocate_state, create_optimizer, set_learning_rate
from pipeline.training.step import Step
from pipeline.training.timer import StepTimer


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a network with parameters of four, two and one dimensions."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 6)).to(dtype)


class Updates:
    """A module with its optimizer; a call is the end of a global batch."""

    def __init__(self, config: Config, module: nn.Module, rate: float = 0.1) -> None:
        self.module, self.rate, self.number = module, rate, 0
        self.optimizer = create_optimizer(config, module, rate=rate)
        allocate_state(self.optimizer)
        plain = {"deepspeed_plugin": None, "sync_gradients": True, "unscale_gradients": lambda: None}
        accelerator: Any = SimpleNamespace(**plain, unwrap_model=lambda x: x)
        inner = self.optimizer
        wrapped = SimpleNamespace(optimizer=inner, scaler=None, step=inner.step, zero_grad=inner.zero_grad)
        device = torch.device("cpu")
        guard, timer = FiniteGuard(device), StepTimer(device, by_ddp=False)
        guard.watch({"total": torch.ones(())}, 0)
        self.step = Step(accelerator, module, None, wrapped, (), None, guard, timer)

    def __call__(self, spoiled: float = 0.0) -> None:
        """Update by the next gradients; ``spoiled`` is added to one number of one of them."""
        self.number += 1
        set_learning_rate(self.optimizer, self.rate / self.number)
        set_gradients(self.module, self.number)
        next(self.module.parameters()).grad.flatten()[0] += spoiled  # type: ignore[union-attr]
        self.step._update(self.number)


def set_gradients(module: nn.Module, number: int) -> None:
    """Give every parameter the gradient of that step."""
    generator = torch.Generator().manual_seed(number)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
