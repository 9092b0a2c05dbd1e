"""Benchmark of a recipe's teacher alone."""

from __future__ import annotations

import torch

from pipeline.benchmarks.inputs import draw_batch
from pipeline.benchmarks.measure import Measurement, measure
from pipeline.builders.meta import training_labels
from pipeline.builders.teacher import build_teacher
from pipeline.errors import RecipeError, display_path, error_context
from pipeline.runs.identity import Run


def measure_teacher(run: Run, device: torch.device, *, repeats: int, warmup: int, steps: int) -> list[Measurement]:
    """Return how long the teacher takes for a rank's micro-batch of random images, in its own precision and chunks."""
    recipe = run.recipe
    with error_context(display_path(run.path)):
        if recipe.teacher and recipe.teacher.cache is not None:
            raise RecipeError(
                "teacher.cache: the answers are read from files; give teacher.cache=null to measure the network"
            )
        if recipe.teacher and recipe.teacher.snapshots is not None:
            raise RecipeError(
                "teacher.snapshots: no network answers in the first cycle; give teacher.snapshots=null "
                "teacher.average.decay=0.9, whose forward is the same"
            )
        teacher = build_teacher(run, device)
        if teacher is None:
            raise RecipeError("teacher: the recipe has none to measure; name a recipe with a teacher")
        num_classes, labels_by_id, _ = training_labels(recipe.data, run.manifest)
        batch = draw_batch(recipe, labels_by_id, num_classes, device)
    images = len(batch.labels_B)
    return [
        measure(
            "teacher", lambda: teacher(batch), device=device, repeats=repeats, warmup=warmup, steps=steps, images=images
        )
    ]
