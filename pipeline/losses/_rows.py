"""The base class of losses that compare rows with each other, and the choice of those rows.

The rows are those of all ranks, of one rank, or of groups of consecutive rows within a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor

from pipeline.batch import Batch, Outputs, Progress
from pipeline.distributed.collectives import gather_rows, world_size
from pipeline.losses._base import Facts, Loss
from pipeline.precision import autocast


def checked_scope(scope: str) -> str:
    """Return ``scope`` if it is ``global``, ``rank`` or ``ghost:N``; raise ValueError otherwise."""
    kind, _, rows = scope.partition(":")
    if scope in ("global", "rank") or (kind == "ghost" and rows.isdecimal() and int(rows) > 1):
        return scope
    raise ValueError(f"expected global, rank or ghost:N with N > 1 consecutive rows of a rank, got {scope!r}")


StatScope = Annotated[str, AfterValidator(checked_scope)]
"""Rows that a statistic covers: all ranks', this rank's, or with ``ghost:N`` each N consecutive rows of this rank."""


def check_groups(name: str, scope: str, facts: Facts) -> None:
    """Raise ValueError for a loss whose rows are pixels of a map of logits: groups of them are no groups of images."""
    if scope.startswith("ghost") and len(facts.student_shapes.get("logits", ())) == 3:
        raise ValueError(
            f"{name}: stat_scope: {scope} would group pixels of maps of logits, not images; set it to global or rank"
        )


def group_size(scope: str, rows: int) -> int | None:
    """Return the number of consecutive rows of a rank that a statistic covers, or None for all rows of all ranks.

    ``rows`` is the number of rows of this rank.
    """
    kind, _, number = scope.partition(":")
    if kind == "global":
        return None
    return int(number) if number else max(rows, 1)


def mean_by_rows(values: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Return the mean of the groups' values, weighted by the groups' numbers of rows; the last group may be shorter."""
    # The weights stay Python numbers. Making a GPU tensor of them would make the host wait for the device.
    return torch.stack([value * (size / sum(sizes)) for value, size in zip(values, sizes, strict=True)]).sum()


def in_global_order(gathered: Tensor) -> Tensor:
    """Return the rows of all ranks, which are gathered rank by rank, in the order of the global batch.

    A rank has every ``world_size()``-th row. With ``data.repeat``, an id is several times in a batch. The embedding
    that counts must then be the same one for any number of ranks.
    """
    return gathered.unflatten(0, (world_size(), -1)).transpose(0, 1).flatten(0, 1)


class BatchLoss(Loss):
    """A loss that compares rows with each other. Its ``forward`` gets the rows of all ranks at once.

    Logits, the config's taps, labels, ids and targets are gathered; the images are this rank's. Under gradient
    accumulation the rows are those of one micro-batch.
    """

    scope = "batch"

    class Config(Loss.Config):
        """The config of a loss that compares rows.

        With ``stat_scope: rank`` or ``ghost:N`` it compares a rank's rows, or groups of them, as published code did.
        """

        stat_scope: StatScope = "global"
        """Rows that are compared: ``global`` (all ranks'), ``rank`` (this rank's) or ``ghost:N`` (each N of a rank)."""

    def parts(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Return the parts of ``forward`` × weight × ramp, on the gathered rows or as the mean over the groups."""
        if not self.needs_teacher:
            teacher = Outputs(student.logits[:, :0], {})
        with autocast(student.logits, None):
            student, teacher = map(self.reduce, self.select_features(student, teacher))
            groups = self.row_groups(student, teacher, batch)
            found = [self(*group) for group in groups]
            sizes = [len(of_group.labels_B) for _, _, of_group in groups]
            return self.scaled({name: mean_by_rows([p[name] for p in found], sizes) for name in found[0]}, progress)

    def reduce(self, outputs: Outputs) -> Outputs:
        """Return the outputs to gather. A loss that needs less than its full taps overrides this to send less."""
        return outputs

    def row_groups(self, student: Outputs, teacher: Outputs, batch: Batch) -> list[tuple[Outputs, Outputs, Batch]]:
        """Return the student's outputs, the teacher's outputs and the batch of each group of rows."""
        size = group_size(self.config.stat_scope, len(batch.labels_B))
        if size is None:
            # Labels and ids are gathered as one tensor, which saves a collective.
            labels_B, ids_B = gather_rows(torch.stack([batch.labels_B, batch.ids_B], 1), equal=True).unbind(1)
            targets = {name: gather_rows(batch.targets[name], equal=True) for name in sorted(batch.targets)}
            together = batch._replace(labels_B=labels_B, ids_B=ids_B, targets=targets)
            return [(gather_outputs(student), gather_outputs(teacher), together)]
        return list(zip(split_rows(student, size), split_rows(teacher, size), _split_batch(batch, size), strict=True))


def gather_outputs(outputs: Outputs) -> Outputs:
    """Return the outputs of all ranks' rows, with gradient, by one collective for any number of features."""
    tensors = [outputs.logits, *outputs.features.values()]
    if world_size() == 1 or not any(x.shape[1:].numel() for x in tensors):  # without a teacher there is nothing to send
        return outputs
    # All tensors are joined to one wide matrix [B, …], gathered, and taken apart again.
    flat = gather_rows(torch.cat([x.flatten(1) for x in tensors], 1), equal=True)
    parts = flat.split([x.shape[1:].numel() for x in tensors], 1)
    logits, *features = (part.unflatten(1, x.shape[1:]) for part, x in zip(parts, tensors, strict=True))
    return Outputs(logits, dict(zip(outputs.features, features, strict=True)))


def split_rows(outputs: Outputs, size: int) -> list[Outputs]:
    """Return the outputs of each group of ``size`` consecutive rows."""
    features = {name: x.split(size) for name, x in outputs.features.items()}
    logits = outputs.logits.split(size)
    return [Outputs(part, {name: x[group] for name, x in features.items()}) for group, part in enumerate(logits)]


def _split_batch(batch: Batch, size: int) -> list[Batch]:
    """Return a batch of each group of ``size`` consecutive rows, each with all images of the rank."""
    targets = {name: x.split(size) for name, x in batch.targets.items()}
    columns = enumerate(zip(batch.labels_B.split(size), batch.ids_B.split(size), strict=True))
    return [
        batch._replace(labels_B=labels_B, ids_B=ids_B, targets={name: x[group] for name, x in targets.items()})
        for group, (labels_B, ids_B) in columns
    ]
