"""Losses of how rows relate, and the rows they compare: of all ranks, of one, or of groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor

from pipeline.batch import Batch, Outputs, Progress
from pipeline.distributed.collectives import gather_rows, world_size
from pipeline.losses._base import Loss
from pipeline.precision import autocast


def checked_scope(scope: str) -> str:
    """Return ``scope`` if it is ``global``, ``rank`` or ``ghost:N``; raise ValueError otherwise."""
    kind, _, rows = scope.partition(":")
    if scope in ("global", "rank") or (kind == "ghost" and rows.isdecimal() and int(rows) > 1):
        return scope
    raise ValueError(f"expected global, rank or ghost:N with N > 1 consecutive rows of a rank, got {scope!r}")


StatScope = Annotated[str, AfterValidator(checked_scope)]
"""Rows that a statistic covers: all ranks', this rank's, or with ``ghost:N`` each N consecutive ones of it."""


def group_size(scope: str, rows: int) -> int | None:
    """Return how many consecutive ones of a rank's ``rows`` a statistic covers; None where it is those of all ranks."""
    kind, _, number = scope.partition(":")
    if kind == "global":
        return None
    return int(number) if number else max(rows, 1)


def mean_by_rows(values: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Return the mean of the groups' values, each as often as its group has rows: the last may be a short one."""
    # By numbers of the host: a tensor made of them would have it wait for a GPU.
    return torch.stack([value * (size / sum(sizes)) for value, size in zip(values, sizes, strict=True)]).sum()


class BatchLoss(Loss):
    """A loss of how rows relate to one another. ``forward`` is given the rows of all ranks at once.

    Of them it sees logits, the taps that its config names, labels and ids; the images are this rank's. Under gradient
    accumulation the rows are those of a micro-batch.
    """

    scope = "batch"

    class Config(Loss.Config):
        """With ``stat_scope: rank`` or ``ghost:N`` it takes a rank's rows, or groups of them, as published code did."""

        stat_scope: StatScope = "global"

    def parts(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Return ``forward``'s parts of the gathered rows, or the mean of those of the groups, × weight × ramp."""
        with autocast(student.logits_BK, None):
            student, teacher = map(self.reduce, self.select_features(student, teacher))
            groups = self.row_groups(student, teacher, batch)
            found = [self(*group) for group in groups]
            sizes = [len(of_group.labels_B) for _, _, of_group in groups]
            return self.scaled({name: mean_by_rows([p[name] for p in found], sizes) for name in found[0]}, progress)

    def reduce(self, outputs: Outputs) -> Outputs:
        """Return what is gathered of a network's outputs; a loss that needs less than its taps says so here."""
        return outputs

    def row_groups(self, student: Outputs, teacher: Outputs, batch: Batch) -> list[tuple[Outputs, Outputs, Batch]]:
        """Return what each group of related rows consists of."""
        size = group_size(self.config.stat_scope, len(batch.labels_B))
        if size is None:
            labels_B, ids_B = gather_rows(torch.stack([batch.labels_B, batch.ids_B], 1), equal=True).unbind(1)
            return [(gather_outputs(student), gather_outputs(teacher), batch._replace(labels_B=labels_B, ids_B=ids_B))]
        places = zip(batch.labels_B.split(size), batch.ids_B.split(size), strict=True)
        batches = [batch._replace(labels_B=labels_B, ids_B=ids_B) for labels_B, ids_B in places]
        return list(zip(split_rows(student, size), split_rows(teacher, size), batches, strict=True))


def gather_outputs(outputs: Outputs) -> Outputs:
    """Return the outputs of all ranks' rows, with gradient: one collective, whatever the number of features."""
    if world_size() == 1:
        return outputs
    tensors = [outputs.logits_BK, *outputs.features.values()]
    flat = gather_rows(torch.cat([x.flatten(1) for x in tensors], 1), equal=True)
    parts = flat.split([x.shape[1:].numel() for x in tensors], 1)
    logits_BK, *features = (part.unflatten(1, x.shape[1:]) for part, x in zip(parts, tensors, strict=True))
    return Outputs(logits_BK, dict(zip(outputs.features, features, strict=True)))


def split_rows(outputs: Outputs, size: int) -> list[Outputs]:
    """Return the outputs of each ``size`` consecutive rows."""
    features = {name: x.split(size) for name, x in outputs.features.items()}
    logits = outputs.logits_BK.split(size)
    return [Outputs(part, {name: x[group] for name, x in features.items()}) for group, part in enumerate(logits)]
