"""The pixels of a map of logits as rows, with the class of each.   B batch, K classes, R rows, one for each pixel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.distributed.collectives import all_reduce_mean, world_size
from pipeline.tasks._masks import MASK, masks_at
from shards.manifest import IGNORED_VALUE


class LabelledPixels(NamedTuple):
    """The logits and classes of pixels; pixels without a class have equal logits, so that they add nothing."""

    student_RK: Tensor
    teacher_RK: Tensor
    labels_R: Tensor
    """int64; 0 for a pixel without a class."""
    factor: Tensor
    """What turns a mean over these rows into one over the pixels of all ranks that have a class."""


def label_pixels(batch: Batch, student_BKHW: Tensor, teacher_BKHW: Tensor) -> LabelledPixels:
    """Return the pixels of two maps of logits with the classes of the masks, at the size of the maps.

    This is a collective: every rank must call it.
    """
    labels_R = masks_at(batch.targets[MASK], *student_BKHW.shape[2:]).flatten().long()
    has_class_R = labels_R != IGNORED_VALUE
    student_RK, teacher_RK = (
        Outputs(logits, {}).logits_BK.masked_fill(~has_class_R[:, None], 0.0) for logits in (student_BKHW, teacher_BKHW)
    )
    factor = (len(labels_R) / mean_count(has_class_R)).to(student_RK.dtype)
    return LabelledPixels(student_RK, teacher_RK, labels_R.masked_fill(~has_class_R, 0), factor)


def mean_count(mask: Tensor) -> Tensor:
    """Return how many elements of ``mask`` are True, as the ranks' mean in float64; at least one over all ranks.

    A sum over this rank's pixels, divided by it, is a loss whose mean over the ranks is the mean over all pixels. This
    is a collective: every rank must call it.
    """
    return all_reduce_mean(mask.sum(dtype=torch.float64)).clamp(min=1 / world_size())
