"""A teacher's logits for all training images of one view, computed once and kept on the device.

Runs with different seeds see the same images of a view in different orders. N ids, B rows of a batch, K classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from pipeline.batch import Batch, Outputs
from pipeline.data.loader import Loader

_IMAGES_AT_ONCE = 1024
"""Images of a request, about: the teacher computes them in its own chunks."""


class ViewLogits(nn.Module):
    """The logits of a frozen ``teacher`` for the training images of ``loader``, one view at a time.

    They are those that the teacher computes for any batch. It always runs in chunks of one size, ``chunk``. The other
    images of a chunk change nothing.
    """

    def __init__(self, teacher: nn.Module, loader: Loader, chunk: int) -> None:
        super().__init__()
        self.teacher = teacher
        self.loader = loader
        self.rows = max(_IMAGES_AT_ONCE // chunk, 1) * chunk
        self.view: int | None = None
        self.logits_NK = torch.empty(0)

    def forward(self, batch: Batch, view: int) -> Outputs:
        """Return the logits of a batch of that view; the first call for a view computes those of all its images."""
        if view != self.view:
            self._compute(view)
        return Outputs(self.logits_NK.index_select(0, batch.ids_B), {})

    def _compute(self, view: int) -> None:
        count = len(self.loader.plan.readers["train"].samples)
        parts = ((np.arange(start, min(start + self.rows, count)), view) for start in range(0, count, self.rows))
        for batch in self.loader.views(parts):
            logits = self.teacher(batch).logits
            if not len(self.logits_NK):
                self.logits_NK = logits.new_zeros((self.loader.id_count, *logits.shape[1:]))
            self.logits_NK[batch.ids_B] = logits
        self.view = view
