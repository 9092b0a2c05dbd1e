"""Random choices of images: a subset of a split, or a share that is set aside for validation."""

from __future__ import annotations

import numpy as np

from shards.plan import ImageItem, permutation
from shards.read import rarest_class


def choose(items: list[ImageItem], count: int, seed: int, split: str) -> list[ImageItem]:
    """Return ``count`` images of a split, chosen at random and as evenly over the classes as possible."""
    items = sorted(items)  # the order in which a folder is listed differs between file systems
    order, ranks = _shuffle(items, seed, f"{split} subset")
    # All first images of the classes come before all second ones, so any prefix is balanced.
    return [items[index] for index in order[np.argsort(ranks, kind="stable")][:count]]


def set_aside(items: list[ImageItem], share: float, seed: int) -> tuple[list[ImageItem], list[ImageItem]]:
    """Split images into a training and a validation list; the latter gets ``share`` of every class, at random.

    A small class gives at least one image to validation. A class with a single image gives none.
    """
    items = sorted(items)
    order, ranks = _shuffle(items, seed, "val share")
    labels = _classes_of(items)
    counts = np.bincount(labels)
    val_counts = np.minimum(np.maximum(np.round(counts * share), 1), counts - 1)
    is_val = np.zeros(len(items), np.bool_)
    is_val[order] = ranks < val_counts[labels[order]]
    flagged = list(zip(items, is_val.tolist(), strict=True))
    return [item for item, val in flagged if not val], [item for item, val in flagged if val]


def _classes_of(items: list[ImageItem]) -> np.ndarray:
    """Return the class of each image over which choices are even, int64 [N]: of several classes, the rarest."""
    targets = [item.targets for item in items if item.targets is not None]
    if not targets:
        return np.array([item.label for item in items], np.int64)
    return rarest_class(np.frombuffer(b"".join(targets), np.uint8).reshape(len(items), -1))


def _shuffle(items: list[ImageItem], seed: int, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a random order of the items, and for each position in it the rank of that item within its class."""
    order = permutation(len(items), seed, purpose)
    labels = _classes_of(items)[order]
    by_class = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[by_class], labels[by_class])
    ranks = np.empty_like(by_class)
    ranks[by_class] = np.arange(len(items)) - first
    return order, ranks
