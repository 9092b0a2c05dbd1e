"""The report of ``--check``: networks, losses and cost of a recipe."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple, cast

import torch

from pipeline.batch import Batch, Progress
from pipeline.builders.loader import check_task
from pipeline.builders.meta import (
    NetworkSummary,
    ProbedModels,
    count_parameters,
    fake_networks,
    probe,
    probe_models,
    trial_targets,
    with_unlabelled,
)
from pipeline.builders.student import check_optimizer_section, check_parts, student_spec
from pipeline.config.measured import count_seeds, mean_and_deviation, measured
from pipeline.config.recipe import LoadedRecipe, Recipe
from pipeline.config.source import RecipeSource
from pipeline.config.tables import load_tables
from pipeline.distiller import Distiller
from pipeline.errors import error_context
from pipeline.features.taps import FeatureTaps
from pipeline.losses._base import Facts
from pipeline.tasks._registry import find_task
from pipeline.teachers.cache import CacheEntry, format_bytes, kinds_by_tap
from pipeline.training.flops import FlopCounter
from shards.manifest import MANIFEST, read_manifest

_SAMPLE_ROWS = 32
"""Rows of the batch if losses run on the CPU, where the feature maps of a full batch would need memory."""


class Report(NamedTuple):
    """The report on the networks, losses and cost of a recipe."""

    source: RecipeSource
    student: NetworkSummary
    peers: list[NetworkSummary]
    """The networks that train together, of which the student is one; empty for one alone."""
    teachers: list[NetworkSummary]
    """The teacher's networks: none, one, or each member. The losses read taps of the first."""
    cache: str | None
    """Folder of cached outputs or pseudo-labels that training uses instead of running the teacher; None if it runs."""
    parts: list[str]
    """Names of the parts of the losses, as in the journal."""
    auxiliary: dict[str, int]
    """Number of parameters that are trained with the student but not exported, by loss."""
    auxiliary_macs: float
    """Multiply-accumulates per image of the losses' forward, for a full batch, or ``_SAMPLE_ROWS`` rows on the CPU."""
    note: str = ""
    """One line on assumed facts, empty if there are none."""
    paper: str | None = None
    """Numbers that the papers print, None for a pair that is in none of the tables."""
    measured: str = ""
    """Our result by the recipe without overrides, empty for a pair in none of the tables that was not measured."""
    images: int | None = None
    """Images of all epochs together, None if neither the recipe nor shards say how many an epoch has."""
    cache_size: str = ""
    """Size of a cache with the answers of this recipe, empty if there is no cache or its size is not known."""
    whole: NetworkSummary | None = None
    """The network that trains, of which the student is a part; None for a student that trains alone."""

    @property
    def training_macs(self) -> float:
        """Return about how many multiply-accumulates training takes per image.

        A backward costs about two forwards; teachers have none. The estimate is too high for losses that compare with
        stored vectors, such as CRD with its banks: they have less of a backward.
        """
        teacher_macs = 0.0 if self.cache else sum(teacher.macs for teacher in self.teachers)
        trained_macs = sum(peer.macs for peer in self.peers) or (self.whole or self.student).macs
        return 3 * (trained_macs + self.auxiliary_macs) + teacher_macs

    def __str__(self) -> str:
        """Return the report as text for the user."""
        lines = [str(self.source)]
        lines += [f"paper     {self.paper}"] if self.paper else []
        lines += [f"measured  {self.measured}"] if self.measured else []
        lines += _describe_network("student", self.student)
        if self.peers:
            names = " and ".join(f"{count} {name}" for name, count in Counter(peer.name for peer in self.peers).items())
            lines += [f"          one of {len(self.peers)} peers that train together: {names}"]
        if self.whole:
            size = f"{self.whole.parameters:,} parameters; both take {self.whole.macs / 1e9:.3f} GMAC"
            lines += [f"          the first channels of a network of {size}"]
        lines += [line for teacher in self.teachers for line in _describe_network("teacher", teacher)]
        lines += [f"          answers from {self.cache}"] if self.cache else []
        auxiliary = ", ".join(f"{name} {count:,}" for name, count in self.auxiliary.items() if count) or "no"
        lines += [f"losses    {', '.join(self.parts)}"]
        lines += [f"          {auxiliary} parameters of their own, {self.auxiliary_macs / 1e9:.3f} GMAC"]
        total = f", {_format_count(self.images)} images" if self.images else ""
        lines += [f"training  about {self.training_macs / 1e9:.3f} GMAC an image{total}"]
        lines += [f"cache     {self.cache_size}"] if self.cache_size else []
        lines += [self.note] if self.note else []
        return "\n".join(lines)


def _format_count(count: int) -> str:
    """Return a number of images as text, such as ``120,000`` and ``128 million``."""
    return f"{count / 1e6:.3g} million" if count >= 10**6 else f"{count:,}"


def _describe_network(role: str, network: NetworkSummary) -> list[str]:
    """Return the lines of the report on one network."""
    sizes = {name: "none" if 0 in shape else " × ".join(map(str, shape)) for name, shape in network.shapes.items()}
    taps = [f"          {name:<16} {size}" for name, size in sizes.items()]
    return [f"{role}   {network.name}, {network.parameters:,} parameters, {network.macs / 1e9:.3f} GMAC", *taps]


def summarize(loaded: LoadedRecipe) -> Report:
    """Build the networks and losses of a recipe, run one forward, and return the report.

    Raises RecipeError for networks, taps and losses that training would refuse.
    """
    recipe = loaded.recipe
    folder = Path(recipe.data.path)
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    if manifest:
        check_task(recipe, manifest)
    built = probe_models(recipe, [source.recipe for source in loaded.teachers], probe, manifest)
    trained = [taps.model for _, taps in built.peers]
    check_optimizer_section(recipe, torch.nn.ModuleList(trained) if trained else built.student[1].model)
    if loaded.start:
        check_parts(built.student[1].model, recipe.student, loaded.start.recipe.student, built.facts.num_classes)
    losses = _try_losses(recipe, built.facts)
    # Without shards, the number of samples is assumed if the recipe does not say it, and there is a note.
    labels = None if built.note else built.facts.labels_by_id
    samples = recipe.data.samples or (None if labels is None else int((labels >= 0).sum()))
    cached = recipe.data.samples or (None if labels is None else len(labels))  # a cache has held-out images, too
    runs = measured(loaded.source)
    paper = load_tables().published_text(loaded.source) if load_tables().table_of(loaded.source) else None
    student, whole = _exported_part(recipe, built)
    ours = f"{mean_and_deviation([run.last for run in runs])} ({count_seeds(runs)})" if runs else ""
    return Report(
        loaded.source,
        student,
        [network for network, _ in built.peers],
        [network for network, _ in built.teachers],
        _answers_folder(recipe),
        *losses,
        built.note,
        paper,
        ours or ("not measured yet" if paper else ""),
        samples and recipe.epochs * recipe.data.rows_per_image * samples * (1 + recipe.data.unlabelled_ratio),
        _cache_size(recipe, built, cached),
        whole,
    )


def _exported_part(recipe: Recipe, built: ProbedModels) -> tuple[NetworkSummary, NetworkSummary | None]:
    """Return the summary of the student, and that of the network that trains if the student is a part of it."""
    trained = built.student[0]
    if not recipe.student.within:
        return trained, None
    alone, _ = probe(student_spec(recipe.student, frozenset()), built.facts.num_classes, recipe.data.size)
    return alone._replace(shapes=trained.shapes), trained


def _answers_folder(recipe: Recipe) -> str | None:
    """Return the folder of outputs that training uses instead of running the teacher; None if it runs."""
    if recipe.data.unlabelled and not recipe.runs_teacher:
        return recipe.data.unlabelled.pseudo
    return recipe.teacher.cache if recipe.teacher and not recipe.teacher.uses_live_model else None


def _cache_size(recipe: Recipe, built: ProbedModels, samples: int | None) -> str:
    """Return the number of views in the teacher's cache and the size of one, by the taps that the losses read."""
    if not (recipe.teacher and recipe.teacher.cache and built.teachers and samples):
        return ""
    network, taps = built.teachers[0]
    outputs = [name for name, shape in network.shapes.items() if 0 not in shape]  # no logits without a head
    shapes = {kind: network.shapes[tap] for tap, kind in kinds_by_tap(taps.stages, outputs).items()}
    encoded = recipe.teacher.encode.items()
    ranks = {kind: rank for tap, rank in encoded for kind in kinds_by_tap(taps.stages, [tap]).values()}
    stored = [(ranks.get(kind, shape[0]), *shape[1:]) for kind, shape in shapes.items()]
    view = format_bytes(samples * sum(CacheEntry(shape=shape).row_bytes for shape in stored))
    return f"{recipe.data.views} views of {view}" if recipe.data.views else f"{view} a view"


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
    task = find_task(recipe.task)
    batch = Batch(images_BCHW, zeros_B, zeros_B, {}, trial_targets(recipe, zeros_B, facts.num_classes))
    batch = with_unlabelled(recipe, batch, facts.num_classes)
    student, teacher = fake_networks(recipe, facts)
    answers = teacher and teacher(batch.images_BCHW)
    with error_context("losses"), FlopCounter() as counted:
        distiller = Distiller(cast(FeatureTaps, student), recipe.losses, facts, task).to(images_BCHW.device)
        losses = distiller(batch, answers, Progress(steps_per_epoch=1))
    parts = [name for name in losses if name not in ("total", task.training_metric)]
    parameters = {name: count_parameters(loss) for name, loss in distiller.losses.items()}
    return parts, parameters, counted.flops / 2 / len(batch.labels_B)
