"""What training computes for an image: counted once, where a run begins, on torch's meta device."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline import parallel
from pipeline.batch import Batch, Progress
from pipeline.check import Answers, Built, build_parts, run_once
from pipeline.distiller import Distiller
from pipeline.flops import FlopCounter
from pipeline.recipe import Recipe
from pipeline.teacher_cache import Cache


def image_flops(recipe: Recipe) -> float | None:
    """Return the operations (``flops.py``) that one image of a batch takes, or None where they cannot be counted.

    Student and losses forward and backward, as autograd goes: where nothing asks for a gradient, as at the images, none
    is counted. The teachers forward, if they are asked. No optimizer, and nothing that ranks do twice or that backward
    computes again to save memory. One rank may ask, once all is built for training: what
    a module keeps for all networks is then not kept on the meta device. What computes with numbers, such as a network
    that calls ``.item()``, finds none there, and is None.
    """
    try:
        with torch.device("meta"), parallel.alone():
            parts = build_parts(recipe, run_once)
            return _of_student(recipe, parts) + _of_teachers(recipe, parts)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        print(f"note: the journal will not say TFLOP/s: what this recipe computes cannot be counted ({reason})")
        return None


def _of_student(recipe: Recipe, parts: Built) -> float:
    """Return the operations of a micro-batch's forward and backward, by image."""
    rows, size = recipe.batch // recipe.accumulation, recipe.data.size
    zeros_B = torch.zeros(rows, dtype=torch.int64)
    batch = Batch(torch.empty(rows, 3, size, size), zeros_B, zeros_B, {})
    teacher = Answers(parts.facts.teacher_shapes)(batch.images_BCHW) if parts.facts.teacher_shapes else None
    distiller = Distiller(parts.student[1], recipe.losses, parts.facts).to("meta")
    with FlopCounter() as counted:
        distiller(batch, teacher, Progress(steps_per_epoch=1))["total"].backward()
    return counted.flops / rows


def _of_teachers(recipe: Recipe, parts: Built) -> float:
    """Return the operations of the networks that are asked, by image."""
    config = recipe.teacher
    if config is None or not config.is_asked:
        return 0.0
    if config.cache is not None and not Cache(Path(config.cache)).lacking(recipe.taps.teacher):
        return 0.0
    return sum(2 * network.macs for network, _ in parts.teachers)
