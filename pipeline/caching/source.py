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
from pipeline.builders.loader import build_loader, training_splits
from pipeline.builders.teacher import build_live_teacher
from pipeline.config.recipe import Recipe
from pipeline.data.loader import Loader, create_loader, rows_of_ids
from pipeline.errors import RecipeError
from pipeline.features.pca import Encoder
from pipeline.runs.identity import Run
from pipeline.tasks._registry import find_task
from pipeline.teachers.cache import LOGITS
from pipeline.teachers.config import Config
from pipeline.teachers.ensemble import TeacherEnsemble
from pipeline.teachers.frozen import Teacher
from pipeline.training.evaluation import check_teacher, check_validation_size
from shards.manifest import Manifest

Part = tuple[NDArray[np.int64], int]
"""Some ids, and the view of their images."""


class AnswerSource(NamedTuple):
    """A teacher whose taps are kinds of output, with the training images."""

    teacher: Teacher | TeacherEnsemble
    loader: Loader
    row_by_id: NDArray[np.int64]
    """Row of the sample table [N]; −1 for an id without a sample."""
    plain: bool = False
    """Whether images have the transform of validation, in which all views are one."""

    def present(self, ids: range) -> NDArray[np.int64]:
        """Return the ids of a range that have a sample."""
        numbers = np.arange(ids.start, ids.stop)
        return numbers[self.row_by_id[numbers] >= 0]

    def answers(self, parts: Iterable[Part]) -> Iterator[Outputs]:
        """Yield the teacher's outputs for each part. A part has at most the teacher's batch size of ids."""
        rows = ((self.row_by_id[ids], view) for ids, view in parts)
        batches = self.loader.plain(of_part for of_part, _ in rows) if self.plain else self.loader.views(rows)
        for batch in batches:
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
    return AnswerSource(teacher, loader, rows_of_ids(loader.plan.readers["train"]))


def open_plain_source(run: Run, config: Config, manifest: Manifest, path: str, device: torch.device) -> AnswerSource:
    """Return the teacher's network, with the training images of other shards in the transform of validation."""
    teacher = build_live_teacher(run, config, (), device)
    changed = {"path": path, "holdout": None, "validation_batch": None, "views": None}
    loader = create_loader(
        run.recipe.data.model_copy(update=changed),
        batch=min(config.batch or 1, manifest.splits["train"].samples),
        accumulation=1,
        seed=0,
        rank=0,
        world=1,
        device=device,
        manifest=manifest,
        sources={"train": "train", "val": "train"},
    )
    check_validation_size(teacher, loader)
    return AnswerSource(teacher, loader, rows_of_ids(loader.plan.readers["val"]), plain=True)


def live_teacher(recipe: Recipe) -> Config:
    """Return the recipe's teacher. Raises RecipeError unless it is a frozen network, which can be run."""
    config = recipe.teacher
    if config is None or config.moves or not config.has_model:
        raise RecipeError("teacher: there is no frozen network to run; give teacher.model and teacher.weights")
    return config


def check_expected(run: Run, config: Config, source: AnswerSource) -> None:
    """Raise RecipeError if the teacher reaches less than ``expect`` on the recipe's validation images."""
    if config.expect is not None:
        splits = training_splits(run.recipe.data, run.manifest)[1:]
        loader = build_loader(run.recipe, run.manifest, source.loader.device, splits)
        check_teacher(find_task(run.recipe.task), config, source.teacher, loader)


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
