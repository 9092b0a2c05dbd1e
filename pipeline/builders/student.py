"""From a recipe to its student."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.builders.model_spec import ModelSpec
from pipeline.config.recipe import Recipe, StartConfig, StudentConfig
from pipeline.data.config import Config as Data
from pipeline.distributed import collectives
from pipeline.distributed.launcher import Launch
from pipeline.errors import error_context
from pipeline.features.taps import FeatureTaps
from pipeline.models.published import published_normalization
from pipeline.models.weights import load_weights
from pipeline.models.weights_file import is_file
from pipeline.runs.dependencies import finished
from pipeline.runs.files import STUDENT, check_student
from pipeline.runs.identity import Run


def student_spec(config: StudentConfig, taps: frozenset[str]) -> ModelSpec:
    """Return the student as the recipe names it, with those taps."""
    return ModelSpec("student", config.model, frozenset((config.stages or {}).items()), taps)


def build_student(
    named: ModelSpec, num_classes: int, seed: int, layout: torch.memory_format = torch.contiguous_format
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


def load_start(start: StartConfig, run: Run | None, student: FeatureTaps, model: str, data: Data) -> None:
    """Load the weights that the student starts from: a file, published ones, or the last ones of a finished ``run``."""
    weights = start.weights or str(finished(run).folder / STUDENT)
    expected = None if is_file(weights) else published_normalization(model, weights)
    if expected is not None and expected != (data.mean, data.std):
        told = " ".join(f"data.{key}=[{','.join(map(str, getattr(expected, key)))}]" for key in ("mean", "std"))
        print_note(
            "student.start", f"{weights} of {model} was trained on images of another mean and std: {told} gives them"
        )
    with error_context("student.start"):
        check_student(Path(weights))
        print_note("student.start", load_weights(student.model, weights, model, start.weights_key))


def print_note(key: str, note: str) -> None:
    """Print, once for all ranks, what was chosen where the recipe left it open; nothing for an empty ``note``."""
    if note and collectives.is_main():
        print(f"note: {key}: {note}", flush=True)
