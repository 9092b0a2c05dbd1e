"""The exponential moving average of the student's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.frozen_model import FrozenModel


class Config(FrozenModel):
    """The recipe's ``ema`` section."""

    decay: float = Field(gt=0, lt=1)
    """Share of the old average that a step keeps."""
    warmup: bool = False
    """True to keep less at first: at step t, counted from 1, at most (1 + t) / (10 + t)."""


class EMA:
    """The moving averages of a network's weights: average ← decay · average + (1 − decay) · weight.

    With a warm-up, the decay of step t is min(decay, (1 + t) / (10 + t)), as in TensorFlow's ExponentialMovingAverage.
    Buffers are not averaged. The averages are stored in the tensors ``into``, by parameter name. The default is copies
    of the network's weights.
    """

    def __init__(self, config: Config, network: nn.Module, into: dict[str, Tensor] | None = None) -> None:
        self.config = config
        self.network = network
        self.averages = into or {name: weight.detach().clone() for name, weight in network.named_parameters()}

    @torch.no_grad()
    def update(self, step: int | Tensor) -> None:
        """Update the averages after optimizer ``step`` of the network, counted from 1; a captured one is a tensor."""
        weights = [parameter.detach() for parameter in self.network.parameters()]
        averages = list(self.averages.values())
        # One call for all tensors: on a GPU, a kernel launch per parameter would cost more than the arithmetic.
        if not self.config.warmup:
            torch._foreach_lerp_(averages, weights, 1 - self.config.decay)  # pyright: ignore[reportPrivateImportUsage]
            return
        # On the device also outside a graph, so that both compute the same bits.
        t = step if isinstance(step, Tensor) else torch.full((), step, device=averages[0].device)
        share = 1 - torch.clamp((1 + t.double()) / (10 + t.double()), max=self.config.decay)
        changes = torch._foreach_sub(weights, averages)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(changes, share.to(averages[0].dtype))  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(averages, changes)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the network's weights by the averages inside the context."""
        weights = [parameter.detach().clone() for parameter in self.network.parameters()]
        self._write(list(self.averages.values()))
        try:
            yield
        finally:
            self._write(weights)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        """Copy ``values`` into the network's parameters."""
        for parameter, value in zip(self.network.parameters(), values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name."""
        return self.averages

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the averages."""
        for name, average in self.averages.items():
            average.copy_(state[name])
