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


class EMA:
    """The moving averages of a network's weights: average ← decay · average + (1 − decay) · weight.

    Buffers are not averaged. The averages are stored in the tensors ``into``, by parameter name. The default is copies
    of the network's weights.
    """

    def __init__(self, config: Config, network: nn.Module, into: dict[str, Tensor] | None = None) -> None:
        self.decay = config.decay
        self.network = network
        self.averages = into or {name: weight.detach().clone() for name, weight in network.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages after an optimizer step of the network."""
        weights = [parameter.detach() for parameter in self.network.parameters()]
        averages = list(self.averages.values())
        # One call for all tensors: on a GPU, a kernel launch per parameter would cost more than the arithmetic.
        torch._foreach_lerp_(averages, weights, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]

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
