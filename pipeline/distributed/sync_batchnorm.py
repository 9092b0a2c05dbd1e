"""Batch normalisation of a student over the rows of all ranks, for batches of few rows a rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.distributed.collectives import all_reduce_sum, standardize_columns, world_size
from pipeline.distributed.launcher import read_launch


class SyncedBatchNorm(nn.BatchNorm2d):
    """What torch's SyncBatchNorm computes on GPUs, on CPUs.

    On one rank, and in evaluation mode, it computes what BatchNorm2d does, to the bit.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised, scaled and shifted map [B, C, H, W]."""
        if world_size() == 1 or not self.training:
            return super().forward(input)
        x_BHWC = input.movedim(1, -1)
        rows_RC = x_BHWC.flatten(0, -2)
        self._track(rows_RC.detach().double())  # bfloat16, as of autocast, could not even count the rows
        normal_BHWC = standardize_columns(rows_RC, self.eps).view(x_BHWC.shape)
        return (normal_BHWC * self.weight + self.bias).movedim(-1, 1).to(input.dtype)

    def _track(self, rows_RC: Tensor) -> None:
        """Update the running averages by the mean and the unbiased variance of the rows of all ranks."""
        rows = rows_RC.new_full((1,), len(rows_RC))
        count, sums_C = all_reduce_sum(torch.cat([rows, rows_RC.sum(0)])).tensor_split([1])
        mean_C = sums_C / count
        variance_C = all_reduce_sum((rows_RC - mean_C).square().sum(0)) / (count - 1)
        for average, value in ((self.running_mean, mean_C), (self.running_var, variance_C)):
            average.lerp_(value.to(average.dtype), self.momentum or 0.0)  # type: ignore[union-attr]
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]


def synchronize_batchnorms(model: nn.Module) -> None:
    """Replace every BatchNorm2d of a network by one over the rows of all ranks, with the same parameters.

    Raises ValueError if ``check_batchnorms`` does.
    """
    check_batchnorms(model)
    if not read_launch().on_cpu:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                setattr(module, name, _synced(child))


def check_batchnorms(model: nn.Module) -> None:
    """Raise ValueError for a network without BatchNorm, or with one of another kind, which may compute more."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no BatchNorm to synchronise; remove sync_batchnorm")
    for norm in norms:
        _check_norm(norm)


def _check_norm(norm: _BatchNorm) -> None:
    # timm's BatchNormAct2d ends in an activation, which torch's SyncBatchNorm would leave out.
    if type(norm) is not nn.BatchNorm2d:
        raise ValueError(f"a {type(norm).__name__} cannot be synchronised, only BatchNorm2d; remove sync_batchnorm")
    if not norm.affine or not norm.track_running_stats or norm.momentum is None:
        raise ValueError("a BatchNorm without scale, shift or running averages cannot be synchronised")


def _synced(norm: Any) -> SyncedBatchNorm:
    synced = SyncedBatchNorm(norm.num_features, norm.eps, norm.momentum)
    synced.weight, synced.bias = norm.weight, norm.bias
    synced.running_mean, synced.running_var = norm.running_mean, norm.running_var
    synced.num_batches_tracked = norm.num_batches_tracked
    synced.training = norm.training
    return synced
