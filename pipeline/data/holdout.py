"""Training images that are held out for validation, so that hyper-parameters are not chosen on the test images.

The choice is a pure function of (seed, id) and the labels. A cache of the whole split stays valid, because ids and
pixels do not change. N is the number of samples of the training split.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.data import augment
from pipeline.frozen_model import FrozenModel
from shards.manifest import Manifest
from shards.read import SplitReader


class Holdout(FrozenModel):
    """Training images that are not trained on; they replace the validation images."""

    share: float = Field(gt=0, lt=1)
    """Share of each class, rounded; at least one image, and never all. An image of several classes counts as one of
    its rarest."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the choice."""


def held_out(
    ids_N: NDArray, labels_N: NDArray[np.int64], holdout: Holdout, classes: Sequence[str]
) -> NDArray[np.bool_]:
    """Return a mask [N] of the rows of a sample table that are held out; ``classes`` are the names of the classes.

    Raises ValueError, one line, if a class has a single image.
    """
    sizes_K = np.bincount(labels_N)
    if (sizes_K == 1).any():
        label = int((sizes_K == 1).argmax())
        raise ValueError(
            f"data.holdout: the class {classes[label]!r} has only one training image, so none can be held out; "
            "add images, or remove the class"
        )
    counts_K = np.clip(np.rint(holdout.share * sizes_K), np.minimum(sizes_K, 1), np.maximum(sizes_K - 1, 0))
    order_N = np.lexsort([augment.holdout_keys(ids_N, seed=holdout.seed), labels_N])
    firsts_K = np.cumsum(sizes_K) - sizes_K
    mask_N = np.zeros(len(labels_N), np.bool_)
    mask_N[order_N] = np.arange(len(labels_N)) - firsts_K[labels_N[order_N]] < counts_K[labels_N[order_N]]
    return mask_N


def source_split(holdout: Holdout | None, split: str) -> str:
    """Return the split of the shards that ``train`` or ``val`` reads."""
    return "train" if holdout else split


def used_rows(reader: SplitReader, holdout: Holdout | None, split: str) -> NDArray[np.int64]:
    """Return the rows of the reader's sample table that ``train`` or ``val`` uses, in storage order."""
    if holdout is None:
        return np.arange(len(reader.samples))
    classes = (*reader.manifest.classes, "none")  # the last one is of images without any class
    return np.flatnonzero(held_out(reader.samples["id"], reader.strata, holdout, classes) == (split == "val"))


def training_images(path: str, manifest: Manifest, holdout: Holdout | None) -> int:
    """Return the number of images that a run trains on; ``path`` is the folder of the shards."""
    if holdout is None:
        return manifest.splits["train"].samples
    return len(used_rows(SplitReader(Path(path), "train", manifest), holdout, "train"))
