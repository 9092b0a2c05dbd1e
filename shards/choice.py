"""Choose images of a split at random: a few of them, or a share that is set aside for validation."""

from __future__ import annotations

import numpy as np

from shards.plan import ImageItem, permutation


def choose(items: list[ImageItem], count: int, seed: int, split: str) -> list[ImageItem]:
    """Choose ``count`` images of a split at random, as evenly over the classes as they allow."""
    items = sorted(items)  # the folder's own order differs between file systems
    order, turns = _turns(items, seed, f"{split} subset")
    return [items[place] for place in order[np.argsort(turns, kind="stable")][:count]]


def set_aside(items: list[ImageItem], share: float, seed: int) -> tuple[list[ImageItem], list[ImageItem]]:
    """Part a set's images into those to train with and ``share`` of every class, at random, to validate with.

    A class of a few images gives one; a class of one image none.
    """
    items = sorted(items)
    order, turns = _turns(items, seed, "val share")
    labels = np.array([item.label for item in items], np.int64)
    counts = np.bincount(labels)
    given = np.minimum(np.maximum(np.round(counts * share), 1), counts - 1)
    aside = np.zeros(len(items), np.bool_)
    aside[order] = turns < given[labels[order]]
    parted = list(zip(items, aside.tolist(), strict=True))
    return [item for item, out in parted if not out], [item for item, out in parted if out]


def _turns(items: list[ImageItem], seed: int, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a random order of the items, and which each is in it among those of its class."""
    order = permutation(len(items), seed, purpose)
    labels = np.array([items[place].label for place in order])
    by_class = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[by_class], labels[by_class])
    turn = np.empty_like(by_class)
    turn[by_class] = np.arange(len(items)) - first
    return order, turn
