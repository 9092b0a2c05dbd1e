"""The exponential moving average of the student's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.frozen_model import FrozenModel


class Config(FrozenModel):
    """The recipe's ``ema``."""

    decay: float = Field(gt=0, lt=1)


class EMA:
    """Averages of a network's weights: average ← decay · average + (1 − decay) · weight. Buffers stay its own.

    They are kept in the tensors ``into``, by parameter name, or in copies of the network's weights.
    """

    def __init__(self, config: Config, network: nn.Module, into: dict[str, Tensor] | None = None) -> None:
        self.decay = config.decay
        self.network = network
        self.averages = into or {name: weight.detach().clone() for name, weight in network.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Follow the network by one step."""
        weights = [parameter.detach() for parameter in self.network.parameters()]
        averages = list(self.averages.values())
        torch._foreach_lerp_(averages, weights, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the network for a while."""
        own = [parameter.detach().clone() for parameter in self.network.parameters()]
        self._write(list(self.averages.values()))
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.network.parameters(), values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name."""
        return self.averages

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the averages."""
        for name, average in self.averages.items():
            average.copy_(state[name])
