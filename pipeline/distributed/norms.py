"""Batch normalisation for auxiliary networks, which are always in training mode and keep no running averages."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.distributed.collectives import standardize_columns

NormFactory = Callable[[int], nn.Module]
"""A function that makes the normalisation of so many channels."""


class RankNorm(nn.BatchNorm2d):
    """Batch normalisation over the rows of this rank only."""

    def __init__(self, width: int) -> None:
        super().__init__(width, track_running_stats=False)

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised, scaled and shifted map. Raises ValueError if a channel has a single value."""
        # torch refuses this, too, but its message does not say what to change.
        if input[:, 0].numel() < 2:
            raise ValueError(
                "a BatchNorm that is trained with the student got one value a channel; each rank needs at least 2 "
                "rows: raise batch"
            )
        return super().forward(input)


def batch_norm(width: int, stat_scope: str) -> nn.Module:
    """Return a BatchNorm of ``width`` channels over the rows of all ranks (``global``) or of this rank (``rank``)."""
    return BatchNorm(width) if stat_scope == "global" else RankNorm(width)


class BatchNorm(nn.Module):
    """Batch normalisation over the rows of all ranks, on any device and backend; it keeps no running averages."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the normalised, scaled and shifted map."""
        x_BHWC = x_BCHW.movedim(1, -1)
        normal_BHWC = standardize_columns(x_BHWC.flatten(0, -2), self.eps).view(x_BHWC.shape)
        return (normal_BHWC * self.weight + self.bias).movedim(-1, 1)
