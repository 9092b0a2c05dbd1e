"""A teacher that answers from a cache."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.batch import Batch, Outputs
from pipeline.features.taps import NormParameters
from pipeline.teachers.cache import LOGITS, Cache
from pipeline.teachers.ensemble import TeacherEnsemble
from pipeline.teachers.frozen import Teacher
from pipeline.teachers.sample import check_sample
from shards.read import allow_open_files


class CachedTeacher(nn.Module):
    """Answers from a cache; what is not there is asked of ``live``, where there is one.

    ``taps`` names the kind of answer that each tap is; those that the cache does not hold are the live teacher's. The
    loader reads the rows ahead (``columns``), so ``forward`` only takes them from ``batch.extra``. Raises ValueError or
    FileNotFoundError, one line, unless the first ``views`` views are there, whole.
    """

    def __init__(
        self,
        cache: Cache,
        taps: Mapping[str, str],
        *,
        views: int,
        device: torch.device,
        live: Teacher | TeacherEnsemble | None = None,
    ) -> None:
        super().__init__()
        cached = cache.header.kinds
        self.cache = cache
        self.live = live
        self.held = {tap: kind for tap, kind in taps.items() if kind in cached}
        self.asked = [tap for tap in taps if tap not in self.held]
        self.kinds = sorted({*self.held.values()} | {LOGITS} & cached.keys())
        self.encoders = cache.encoders(device)
        allow_open_files(views * len(self.kinds))
        # Here and not where they are first read: Python 3.11 fails at times where threads parse headers side by side.
        self._maps = cache.whole(self.kinds, views)
        check_sample(cache, self.kinds, views)

    @cached_property
    def norms(self) -> dict[str, NormParameters]:
        """The parameters of the BatchNorm that ends each tapped ``.preact``, by tap."""
        of_cache = {tap: self.cache.header.kinds[kind].norm for tap, kind in self.held.items()}
        norms = {tap: NormParameters(torch.tensor(n.weight), torch.tensor(n.bias)) for tap, n in of_cache.items() if n}
        return norms | (self.live.norms if self.live else {})

    def shapes(self, image_size: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tap and of the logits, without the batch."""
        live = self.live.shapes(image_size) if self.live else {}
        kinds = self.cache.header.kinds
        return live | {tap: kinds[kind].shape for tap, kind in {LOGITS: LOGITS, **self.held}.items() if kind in kinds}

    def columns(self, view: int) -> dict[str, NDArray]:
        """Return the stored answers at a view, by kind, with a row for every id. May be called from any thread."""
        return {kind: self._maps[view, kind] for kind in self.kinds}

    def forward(self, batch: Batch) -> Outputs:
        """Return the answers for a training batch, as they were stored: in float16, or decoded in float32.

        Raises ValueError for a batch that brings none, as those of validation do.
        """
        if self.kinds and not batch.extra:
            raise ValueError("a cached teacher has answers for training images only")
        found = {kind: self._answer(kind, batch.extra[kind]) for kind in self.kinds}
        features = {tap: found[kind] for tap, kind in self.held.items()}
        if self.live is None:
            return Outputs(found[LOGITS], features)
        live: Outputs = self.live(batch)
        return Outputs(found.get(LOGITS, live.logits_BK), features | {tap: live.features[tap] for tap in self.asked})

    def _answer(self, kind: str, rows: Tensor) -> Tensor:
        if kind in self.encoders:
            return self.encoders[kind].decode(rows)
        # The layout of a live teacher's maps: the last bits of what is computed with them depend on it.
        return rows.contiguous(memory_format=torch.channels_last) if rows.ndim == 4 else rows


AnyTeacher = Teacher | TeacherEnsemble | CachedTeacher
"""What answers as a teacher: ``teacher(batch)``, its ``shapes`` and its ``norms``."""


def half_answers(teacher: AnyTeacher, answers: Outputs) -> dict[tuple[str, str], Tensor]:
    """Return what a teacher's networks answered last in float16, by the recipe's key of each and what it is.

    ``answers`` are what the teacher made of it. What a cache holds was finite when it was written, and is left out.
    """
    network, taps, asks_logits = teacher, [*answers.features], True
    if isinstance(teacher, CachedTeacher):
        network, taps, asks_logits = teacher.live, teacher.asked, LOGITS not in teacher.kinds
    members = network.member_logits if isinstance(network, TeacherEnsemble) else None
    keys = ["teacher"] if members is None else [f"teacher.members.{number}" for number in range(len(members))]
    logits = [answers.logits_BK] if members is None else members
    found = {(key, "logits"): value for key, value in zip(keys, logits, strict=True) if asks_logits}
    found |= {(keys[0], f"features ({tap})"): answers.features[tap] for tap in taps}
    return {place: value for place, value in found.items() if value.dtype == torch.float16 and network is not None}
