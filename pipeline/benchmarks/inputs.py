"""Random inputs and outputs of networks, for benchmarks without data or weights."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.batch import Batch, Outputs, rows_per_rank
from pipeline.builders.meta import trial_targets, with_unlabelled
from pipeline.config.recipe import Recipe
from pipeline.distributed import collectives
from pipeline.image_size import height_width


def micro_batch(recipe: Recipe) -> int:
    """Return the number of rows in a rank's micro-batch."""
    return rows_per_rank(recipe.batch, collectives.world_size(), recipe.accumulation)


def draw_batch(recipe: Recipe, labels_by_id: np.ndarray, num_classes: int, device: torch.device) -> Batch:
    """Return a rank's micro-batch of noise, with ids and labels of the training set, and targets without content."""
    rows, size = micro_batch(recipe), height_width(recipe.data.size)
    present = np.flatnonzero(labels_by_id >= 0)  # an id without an image has the label −1
    ids_B = np.random.default_rng(recipe.seed).choice(present, rows, replace=rows > len(present))
    layout = torch.channels_last if recipe.data.channels_last else torch.contiguous_format
    images_BCHW = torch.randn(rows, 3, *size, device=device).contiguous(memory_format=layout)
    labels_B, ids_B = (torch.as_tensor(x, device=device) for x in (labels_by_id[ids_B], ids_B))
    targets = trial_targets(recipe, labels_B, num_classes)
    batch = Batch(images_BCHW, labels_B, ids_B, {}, {name: x.to(device) for name, x in targets.items()})
    return with_unlabelled(recipe, batch, num_classes)


def draw_outputs(
    shapes: dict[str, tuple[int, ...]],
    rows: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    layout: torch.memory_format,
) -> Outputs:
    """Return random outputs for ``rows`` images: logits and taps of those shapes, with maps in that memory layout."""
    drawn = {name: torch.rand(rows, *shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    drawn = {name: x.contiguous(memory_format=layout) if x.ndim == 4 else x for name, x in drawn.items()}
    return Outputs(drawn["logits"], drawn)  # a map of logits may be a tap, too
