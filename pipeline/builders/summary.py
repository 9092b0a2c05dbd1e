"""What a recipe is made of: the report of ``--check``."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, cast

import torch

from pipeline.batch import Batch, Progress
from pipeline.builders.meta import FakeModel, NetworkSummary, count_parameters, probe, probe_models
from pipeline.config.recipe import LoadedRecipe, Recipe
from pipeline.distiller import Distiller
from pipeline.errors import display_path, error_context
from pipeline.features.taps import FeatureTaps
from pipeline.losses._base import Facts
from pipeline.training.flops import FlopCounter

_SAMPLE_ROWS = 32
"""Rows with which losses run on the CPU, where a batch's maps take memory."""


class Report(NamedTuple):
    """What a recipe is made of."""

    path: Path
    student: NetworkSummary
    teachers: list[NetworkSummary]
    """None, one, or each member; taps are read of the first."""
    cache: str | None
    """Where the answers are that training takes instead of running them."""
    parts: list[str]
    """Of the losses, by the names they have in the journal."""
    auxiliary: dict[str, int]
    """Parameters that are trained with the student and left out at export, by loss."""
    auxiliary_macs: float
    """Of the losses forward, for one image of a whole batch; ``FEW`` images where they run on the CPU."""
    note: str = ""
    """What was not there to be counted."""

    @property
    def training_macs(self) -> float:
        """Of one image, about: a backward costs what two forwards do, and the teachers have none.

        Losses that compare with what is kept, as CRD with its banks, have less of a backward.
        """
        asked = 0.0 if self.cache else sum(teacher.macs for teacher in self.teachers)
        return 3 * (self.student.macs + self.auxiliary_macs) + asked

    def __str__(self) -> str:
        """Return the report as a user reads it."""
        lines = [display_path(self.path), *_described("student", self.student)]
        lines += [line for teacher in self.teachers for line in _described("teacher", teacher)]
        lines += [f"          answers from {self.cache}"] if self.cache else []
        own = ", ".join(f"{name} {count:,}" for name, count in self.auxiliary.items() if count) or "no"
        lines += [f"losses    {', '.join(self.parts)}"]
        lines += [f"          {own} parameters of their own, {self.auxiliary_macs / 1e9:.3f} GMAC"]
        lines += [f"training  about {self.training_macs / 1e9:.3f} GMAC an image"]
        lines += [self.note] if self.note else []
        return "\n".join(lines)


def _described(role: str, network: NetworkSummary) -> list[str]:
    taps = [f"          {name:<16} {' × '.join(map(str, shape))}" for name, shape in network.shapes.items()]
    return [f"{role}   {network.name}, {network.parameters:,} parameters, {network.macs / 1e9:.3f} GMAC", *taps]


def summarize(loaded: LoadedRecipe) -> Report:
    """Build the recipe, run it once forward, and return what it is made of.

    Raises RecipeError for what training would refuse of networks, taps and losses.
    """
    recipe = loaded.recipe
    built = probe_models(recipe, [named.recipe for named in loaded.teachers], probe)
    losses = _try_losses(recipe, built.facts)
    cache = recipe.teacher.cache if recipe.teacher and not recipe.teacher.uses_live_model else None
    return Report(loaded.path, built.student[0], [network for network, _ in built.teachers], cache, *losses, built.note)


def _try_losses(recipe: Recipe, facts: Facts) -> tuple[list[str], dict[str, int], float]:
    """Return the names of the parts, each loss's parameters, and the losses' multiply-accumulates for one row."""
    try:
        with torch.device("meta"):
            return _run(recipe, facts, recipe.batch)
    except (RuntimeError, TypeError):  # a loss that computes with numbers
        return _run(recipe, facts, min(recipe.batch, _SAMPLE_ROWS))


@torch.no_grad()
def _run(recipe: Recipe, facts: Facts, rows: int) -> tuple[list[str], dict[str, int], float]:
    """Run the losses forward on that many rows, on torch's default device."""
    images_BCHW, zeros_B = torch.empty(rows, 3, 1, 1), torch.zeros(rows, dtype=torch.int64)
    batch = Batch(images_BCHW, zeros_B, zeros_B, {})
    student = cast(FeatureTaps, FakeModel(facts.student_shapes))
    answers = FakeModel(facts.teacher_shapes)(images_BCHW) if facts.teacher_shapes else None
    with error_context("losses"), FlopCounter() as counted:
        distiller = Distiller(student, recipe.losses, facts).to(images_BCHW.device)
        losses = distiller(batch, answers, Progress(steps_per_epoch=1))
    parts = [name for name in losses if name not in ("total", "top1")]
    parameters = {name: count_parameters(loss) for name, loss in distiller.losses.items()}
    return parts, parameters, counted.flops / 2 / rows
