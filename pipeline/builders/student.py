"""From a recipe to its student."""

from __future__ import annotations

import torch

from pipeline.builders.named import Named
from pipeline.config.recipe import Recipe, Start, Student
from pipeline.distributed.launcher import Launch
from pipeline.errors import error_context
from pipeline.features.taps import FeatureTaps
from pipeline.models.weights import load_weights
from pipeline.runs.dependencies import finished
from pipeline.runs.files import STUDENT
from pipeline.runs.identity import Run


def student_named(config: Student, taps: frozenset[str]) -> Named:
    """Return the student as the recipe names it, with those taps."""
    return Named("student", config.model, frozenset((config.stages or {}).items()), taps)


def build_student(
    named: Named, num_classes: int, seed: int, layout: torch.memory_format = torch.contiguous_format
) -> FeatureTaps:
    """Return the student as the seed initialises it, its weights in that memory format."""
    torch.manual_seed(seed)
    return named.build(num_classes).to(memory_format=layout)  # type: ignore[call-overload]


def weights_layout(recipe: Recipe, launch: Launch) -> torch.memory_format:
    """Return the memory format of the weights: the images', except under ZeRO, which lays them out in rows.

    In another than the images' every gradient would be copied into DDP's buckets.
    """
    channels_last = recipe.data.channels_last and not launch.use_deepspeed
    return torch.channels_last if channels_last else torch.contiguous_format


def load_start(start: Start, run: Run | None, student: FeatureTaps, model: str) -> None:
    """Load the weights that the student starts from: a file, or the last ones of a finished ``run``."""
    weights = start.weights or str(finished(run).folder / STUDENT)
    with error_context("student.start"):
        load_weights(student.model, weights, model)
