"""The teacher's outputs for training images, selected by id and view.

B rows of an output, N ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.batch import Outputs
from pipeline.builders.teacher import build_live_teacher
from pipeline.data.loader import Loader, create_loader
from pipeline.features.pca import Encoder
from pipeline.runs.identity import Run
from pipeline.teachers.cache import LOGITS
from pipeline.teachers.config import Config
from pipeline.teachers.ensemble import TeacherEnsemble
from pipeline.teachers.frozen import Teacher

Part = tuple[NDArray[np.int64], int]
"""Some ids, and the view of their images."""


class AnswerSource(NamedTuple):
    """A teacher whose taps are kinds of output, with the training images."""

    teacher: Teacher | TeacherEnsemble
    loader: Loader
    row_by_id: NDArray[np.int64]
    """Row of the sample table [N]; −1 for an id without a sample."""

    def present(self, ids: range) -> NDArray[np.int64]:
        """Return the ids of a range that have a sample."""
        numbers = np.arange(ids.start, ids.stop)
        return numbers[self.row_by_id[numbers] >= 0]

    def answers(self, parts: Iterable[Part]) -> Iterator[Outputs]:
        """Yield the teacher's outputs for each part. A part has at most the teacher's batch size of ids."""
        for batch in self.loader.views((self.row_by_id[ids], view) for ids, view in parts):
            yield self.teacher(batch)


def open_source(run: Run, config: Config, kinds: Iterable[str], device: torch.device) -> AnswerSource:
    """Return the teacher's network, with those kinds of output as its taps, and the run's training images."""
    teacher = build_live_teacher(run, config, set(kinds) - {LOGITS}, device)
    loader = create_loader(
        run.recipe.data,
        batch=min(config.batch or 1, run.manifest.splits["train"].samples),
        accumulation=1,
        seed=0,
        # Every rank can read every image: the caller shares out blocks of ids, not rows of a batch.
        rank=0,
        world=1,
        device=device,
        splits=("train",),
        manifest=run.manifest,
    )
    ids = loader.plan.readers["train"].samples["id"]
    row_by_id = np.full(loader.id_count, -1)
    row_by_id[ids] = np.arange(len(ids))
    return AnswerSource(teacher, loader, row_by_id)


def stored(outputs: Outputs, kinds: Iterable[str], encoders: dict[str, Encoder]) -> dict[str, NDArray[np.float16]]:
    """Return a teacher's outputs by kind as they are stored, [B, …].

    Raises ValueError for values outside the range of float16.
    """
    rows = {}
    for kind in kinds:
        output = outputs.logits if kind == LOGITS else outputs.features[kind]
        output = encoders[kind].encode(output) if kind in encoders else output
        rows[kind] = output.to(torch.float16).cpu().contiguous().numpy()
        if not np.isfinite(rows[kind]).all():
            largest = output.abs().max().item()
            raise ValueError(
                f"the teacher's {kind} have values up to {largest:.3g}, but float16 ends at 65504; leave {kind} out"
            )
    return rows
