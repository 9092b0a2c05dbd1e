"""The report of ``--check``: networks, losses and cost of a recipe."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch

from pipeline.batch import Batch, Progress
from pipeline.builders.meta import FakeModel, NetworkSummary, count_parameters, probe, probe_models
from pipeline.config.recipe import LoadedRecipe, Recipe
from pipeline.config.source import RecipeSource
from pipeline.distiller import Distiller
from pipeline.errors import error_context
from pipeline.features.taps import FeatureTaps
from pipeline.losses._base import Facts
from pipeline.training.flops import FlopCounter

_SAMPLE_ROWS = 32
"""Rows of the batch if losses run on the CPU, where the feature maps of a full batch would need memory."""


class Report(NamedTuple):
    """The report on the networks, losses and cost of a recipe."""

    source: RecipeSource
    student: NetworkSummary
    teachers: list[NetworkSummary]
    """The teacher's networks: none, one, or each member. The losses read taps of the first."""
    cache: str | None
    """Folder of cached outputs that training uses instead of running the teacher; None if there is none."""
    parts: list[str]
    """Names of the parts of the losses, as in the journal."""
    auxiliary: dict[str, int]
    """Number of parameters that are trained with the student but not exported, by loss."""
    auxiliary_macs: float
    """Multiply-accumulates per image of the losses' forward, for a full batch, or ``_SAMPLE_ROWS`` rows on the CPU."""
    note: str = ""
    """One line on assumed facts, empty if there are none."""

    @property
    def training_macs(self) -> float:
        """Return about how many multiply-accumulates training takes per image.

        A backward costs about two forwards; teachers have none. The estimate is too high for losses that compare with
        stored vectors, such as CRD with its banks: they have less of a backward.
        """
        teacher_macs = 0.0 if self.cache else sum(teacher.macs for teacher in self.teachers)
        return 3 * (self.student.macs + self.auxiliary_macs) + teacher_macs

    def __str__(self) -> str:
        """Return the report as text for the user."""
        lines = [str(self.source), *_describe_network("student", self.student)]
        lines += [line for teacher in self.teachers for line in _describe_network("teacher", teacher)]
        lines += [f"          answers from {self.cache}"] if self.cache else []
        auxiliary = ", ".join(f"{name} {count:,}" for name, count in self.auxiliary.items() if count) or "no"
        lines += [f"losses    {', '.join(self.parts)}"]
        lines += [f"          {auxiliary} parameters of their own, {self.auxiliary_macs / 1e9:.3f} GMAC"]
        lines += [f"training  about {self.training_macs / 1e9:.3f} GMAC an image"]
        lines += [self.note] if self.note else []
        return "\n".join(lines)


def _describe_network(role: str, network: NetworkSummary) -> list[str]:
    """Return the lines of the report on one network."""
    taps = [f"          {name:<16} {' × '.join(map(str, shape))}" for name, shape in network.shapes.items()]
    return [f"{role}   {network.name}, {network.parameters:,} parameters, {network.macs / 1e9:.3f} GMAC", *taps]


def summarize(loaded: LoadedRecipe) -> Report:
    """Build the networks and losses of a recipe, run one forward, and return the report.

    Raises RecipeError for networks, taps and losses that training would refuse.
    """
    recipe = loaded.recipe
    built = probe_models(recipe, [source.recipe for source in loaded.teachers], probe)
    losses = _try_losses(recipe, built.facts)
    cache = recipe.teacher.cache if recipe.teacher and not recipe.teacher.uses_live_model else None
    return Report(
        loaded.source, built.student[0], [network for network, _ in built.teachers], cache, *losses, built.note
    )


def _try_losses(recipe: Recipe, facts: Facts) -> tuple[list[str], dict[str, int], float]:
    """Return the names of the parts, each loss's parameters, and the losses' multiply-accumulates for one row."""
    try:
        with torch.device("meta"):
            return _run_losses(recipe, facts, recipe.batch)
    except (RuntimeError, TypeError):  # a loss needs the values of tensors, which the meta device does not have
        return _run_losses(recipe, facts, min(recipe.batch, _SAMPLE_ROWS))


@torch.no_grad()
def _run_losses(recipe: Recipe, facts: Facts, rows: int) -> tuple[list[str], dict[str, int], float]:
    """Run the losses on that many rows, on torch's default device, and return the same as ``_try_losses``."""
    # Images of one pixel: the FakeModels only look at the number of rows.
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
