"""A picture of some validation images in rows, with what networks make of them in columns."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.batch import Batch
from pipeline.data.config import Config
from pipeline.distributed import collectives

LONGEST = 240
"""Longest side of a cell in pixels."""
_IMAGES = 4
_GAP = 4
"""White pixels between cells."""


class DrawnSheet(NamedTuple):
    """The picture, and what is on it."""

    kind: str
    """What it shows: its key in ``evaluation.json``, and the end of its file's name."""
    png: bytes
    columns: tuple[str, ...]
    classes: tuple[int, ...]
    """The classes that it shows."""


def network_columns(*, with_teacher: bool) -> tuple[str, ...]:
    """Return the names of the networks, in the order of their columns."""
    return ("teacher", "student") if with_teacher else ("student",)


def choose_images(batch: Batch, kept: Tensor | None) -> Tensor:
    """Return the rows of a batch's images whose ids are among the smallest, also with those of ``kept``."""
    chosen = (batch.labels_B >= 0).nonzero().flatten()
    chosen = chosen[batch.ids_B[chosen].argsort()][:_IMAGES]
    if kept is None or len(kept) < _IMAGES:
        return chosen
    return chosen[batch.ids_B[chosen] < kept[-1, 0]]


def keep_smallest(rows: Tensor) -> Tensor:
    """Return the rows of the smallest ids, which stand in the first column."""
    return rows[rows[:, 0].argsort()][:_IMAGES]


def gather_smallest(rows: Tensor) -> Tensor:
    """Return the rows of the smallest ids on all ranks, without the ids. Every rank calls it."""
    return keep_smallest(collectives.gather_rows(rows))[:, 1:]


def in_colour(images_BCHW: Tensor, config: Config) -> Tensor:
    """Return normalised images as values of 0 … 255, not rounded."""
    mean_C11, std_C11 = (
        torch.tensor(values, device=images_BCHW.device)[:, None, None] for values in (config.mean, config.std)
    )
    return 255 * (images_BCHW.float() * std_C11 + mean_C11)


def cells_as_png(cells: Sequence[Sequence[NDArray[np.uint8]]]) -> bytes:
    """Return the cells, uint8 [h, w, 3] each, in rows and columns."""
    # A column is as wide as any other, with half of the gap on either side of its cells.
    padding = ((_GAP // 2, _GAP // 2), (_GAP // 2, _GAP // 2), (0, 0))
    padded = [[np.pad(cell, padding, constant_values=255) for cell in row] for row in cells]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in padded])).save(buffer, "PNG")
    return buffer.getvalue()
