"""The boxes from which a detector of two stages learns: objects of a batch, and a choice of anchors or proposals.

Torchvision draws the choice from torch's default generators. Here each image has draws of its own, among the batch's
targets. So the choice is the same in any batch, on any number of ranks and on any device.

N objects of an image, P anchors or proposals of an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

OBJECT_TARGETS = ("boxes_BN4", "classes_BN", "crowd_BN", "draws_B2")
"""Names of the targets that are read, which ``pipeline.tasks._boxes`` explains."""


class Objects(NamedTuple):
    """What a detector of two stages learns of an image."""

    boxes_N4: Tensor
    labels_N: Tensor
    """int64, the class, counted from 1: 0 is the background."""
    seeds: tuple[int, int]
    """Seeds of the choice of anchors, and of proposals."""


def objects_of(targets: Mapping[str, Tensor], dtype: torch.dtype) -> list[Objects]:
    """Return the objects of each image of a batch with these targets, without padding and crowds."""
    found = []
    *columns, draws_B2 = (targets[name] for name in OBJECT_TARGETS)
    for boxes_N4, classes_N, crowd_N, seeds in zip(*columns, draws_B2.tolist(), strict=True):
        wanted_N = (classes_N >= 0) & ~crowd_N
        found.append(Objects(boxes_N4[wanted_N].to(dtype), classes_N[wanted_N] + 1, (seeds[0], seeds[1])))
    return found


def sample_labels(labels_P: Tensor, seed: int, size: int, positive_fraction: float) -> Tensor:
    """Return the labels with −1 in place of those that are not chosen.

    Labels from 1 on are positive, 0 is negative, and −1 is neither. At most ``positive_fraction`` of ``size`` are
    positive, and negative ones fill the rest, each of a kind with equal probability.
    """
    generator = torch.Generator().manual_seed(seed)  # of the CPU: a GPU's own would draw other numbers
    positive_P, negative_P = (torch.where(mask_P)[0] for mask_P in (labels_P >= 1, labels_P == 0))
    positives = min(len(positive_P), int(size * positive_fraction))
    negatives = min(len(negative_P), size - positives)
    chosen_P = torch.zeros_like(labels_P, dtype=torch.bool)
    for places_P, count in ((positive_P, positives), (negative_P, negatives)):
        order_P = torch.randperm(len(places_P), generator=generator, device="cpu")
        chosen_P[places_P[order_P[:count].to(places_P.device)]] = True
    return labels_P.where(chosen_P, -1)
