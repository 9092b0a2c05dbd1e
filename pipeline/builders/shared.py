"""Teachers and loaders of the runs that one process trains, each built once for all runs that can use the same."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence

import torch
from torch import nn

from pipeline.builders.loader import build_loader, training_splits
from pipeline.builders.teacher import build_teacher, teacher_networks
from pipeline.builders.unlabelled import build_unlabelled
from pipeline.config.recipe import Recipe
from pipeline.data.loader import Loader
from pipeline.runs.identity import Run
from pipeline.tasks._registry import find_task
from pipeline.teachers.cached import AnyTeacher, CachedTeacher
from pipeline.teachers.ensemble import TeacherEnsemble
from pipeline.teachers.frozen import Teacher
from pipeline.training.evaluation import check_teacher


class SharedParts:
    """Builds the teacher and the loader of each of ``runs``. No number of a run depends on the others.

    Two runs get the same teacher if it computes the same outputs for both. They get the same loader if they train on
    the same batches in the same order.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = len(runs)
        self.taps: dict[str, frozenset[str]] = {}
        """The teacher's taps that any of the runs reads, by ``_teacher_key``."""
        for run in runs:
            key = _teacher_key(run)
            self.taps[key] = self.taps.get(key, frozenset()) | run.recipe.taps.teacher
        self.teachers: dict[tuple[str, frozenset[str]], AnyTeacher | None] = {}
        self.loaders: dict[tuple[Hashable, ...], Loader] = {}
        self.checked: set[tuple[int, float | None]] = set()

    def teacher(self, run: Run, device: torch.device) -> AnyTeacher | None:
        """Return the teacher of a run, as ``build_teacher`` does; it may have taps that only other runs read."""
        config, own = run.recipe.teacher, run.recipe.taps.teacher
        if config is None or config.moves:  # with one run only
            return build_teacher(run, device)
        # The compiler may fuse a network with other taps differently, and a cache is read for its taps only.
        fixed = config.cache is not None or any(network.compile for network in teacher_networks(config).values())
        key = _teacher_key(run)
        teacher = self._teacher(run, device, key, own if fixed else self.taps[key])
        return teacher if fixed or _taps_change_nothing(teacher) else self._teacher(run, device, key, own)

    def _teacher(self, run: Run, device: torch.device, key: str, taps: frozenset[str]) -> AnyTeacher | None:
        if (key, taps) not in self.teachers:
            self.teachers[key, taps] = build_teacher(run, device, taps)
        return self.teachers[key, taps]

    def loader(self, run: Run, device: torch.device, teacher: AnyTeacher | None) -> Loader:
        """Return the loader of a run, as ``build_loader`` does."""
        recipe = run.recipe
        cached = id(teacher) if isinstance(teacher, CachedTeacher) else None
        images = (json.dumps(run.identity["data"], sort_keys=True), recipe.batch, recipe.accumulation, cached)
        key = (*images, recipe.order_seed)
        if key not in self.loaders:
            same = [loader for (*other, _), loader in self.loaders.items() if tuple(other) == images]
            # DALI's graph has one stream at a time; the other decoders keep their images for any number of streams.
            if same and recipe.data.loader != "dali":
                self.loaders[key] = same[0].in_order_of(recipe.order_seed)
            else:
                loader = build_loader(recipe, run.manifest, device, training_splits(recipe.data, run.manifest), teacher)
                unlabelled = build_unlabelled(run, device)
                self.loaders[key] = loader.with_unlabelled(unlabelled) if unlabelled else loader
        return self.loaders[key]

    def check_teacher(self, recipe: Recipe, teacher: AnyTeacher | None, loader: Loader) -> None:
        """Check the teacher once, as the function of that name does."""
        check = (id(teacher), recipe.teacher and recipe.teacher.expect)
        if check not in self.checked:
            check_teacher(find_task(recipe.task), recipe.teacher, teacher, loader)
            self.checked.add(check)


def _teacher_key(run: Run) -> str:
    """Return what a teacher's outputs depend on, besides its taps: networks, images, and views of a cache."""
    # Where a teacher leaves them out.
    student = [run.identity["student"].get(key) for key in ("model", "stages", "arguments")]
    return json.dumps([run.identity["teacher"], run.identity["data"], student, run.recipe.epochs], sort_keys=True)


def _taps_change_nothing(teacher: AnyTeacher | None) -> bool:
    """Return whether the network computes the same without taps: a tapped BatchNorm or convolution is not folded."""
    network = teacher.members[0] if isinstance(teacher, TeacherEnsemble) else teacher
    tapped = network.taps.tapped_modules() if isinstance(network, Teacher) else set()
    return not any(isinstance(module, nn.Conv2d | nn.BatchNorm2d) for module in tapped)
