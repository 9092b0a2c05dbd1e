"""Batch normalisation of auxiliary networks, which never leave training and so keep no running averages."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.distributed.collectives import standardize_columns

NormFactory = Callable[[int], nn.Module]
"""Makes a normalisation of that many channels."""


class RankNorm(nn.BatchNorm2d):
    """A BatchNorm of this rank's rows."""

    def __init__(self, width: int) -> None:
        super().__init__(width, track_running_stats=False)

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised, scaled and shifted map. Raises ValueError where a channel has a single value."""
        if input[:, 0].numel() < 2:
            raise ValueError(
                "a BatchNorm that learns with the student sees a single value; at least 2 rows a rank are needed: "
                "raise batch"
            )
        return super().forward(input)


def batch_norm(width: int, stat_scope: str) -> nn.Module:
    """Return a BatchNorm of that many channels over all ranks' rows (``global``), or this rank's (``rank``)."""
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
