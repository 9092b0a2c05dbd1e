"""Images without labels behind those with labels, for training on both.

They have their own epochs, and their own draws of order and augmentation. Shape suffixes: N rows of an epoch, B of a
batch, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.batch import Batch
from pipeline.data import augment
from pipeline.data.config import Config
from pipeline.data.requests import BatchSampler

SEED_OFFSET = 2**63
"""What is added to the seeds of the labelled images. Recipes have smaller ones, so that no two lists share draws."""
_COPIES_VIEWS = 2**20
"""Distance between the views of two copies of an image in one epoch, which then have different crops."""


@dataclass(frozen=True)
class UnlabelledSampler(BatchSampler):
    """The sampler of images of which some are in an epoch several times, each time in another view."""

    def _rows_and_views(self, order: NDArray[np.int64], epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return order, epoch + _COPIES_VIEWS * augment.occurrences(order)


def config_of_unlabelled(config: Config) -> Config:
    """Return the settings with which a recipe's images without labels are read: its own, with another seed."""
    assert config.unlabelled is not None
    changed = {"path": config.unlabelled.path, "seed": config.seed + SEED_OFFSET, "holdout": None, "unlabelled": None}
    return config.model_copy(update=changed)


def append_unlabelled(batch: Batch, unlabelled: Batch) -> Batch:
    """Return a batch of the rows of both, labelled ones first; the others get the label −1.

    A labelled row has zeros in ``extra``.
    """
    labels_B = torch.full_like(unlabelled.labels_B, -1)
    extra = {
        name: torch.cat([rows.new_zeros((len(batch.labels_B), *rows.shape[1:])), rows])
        for name, rows in unlabelled.extra.items()
    }
    return Batch(
        torch.cat([batch.images_BCHW, unlabelled.images_BCHW]),
        torch.cat([batch.labels_B, labels_B]),
        torch.cat([batch.ids_B, unlabelled.ids_B]),
        extra,
        batch.targets,
    )
