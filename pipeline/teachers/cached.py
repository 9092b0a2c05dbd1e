"""A teacher whose outputs come from a cache."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.batch import Batch, Outputs
from pipeline.features.taps import NormParameters
from pipeline.image_size import Resolution
from pipeline.teachers._base import TeacherModule
from pipeline.teachers.cache import LOGITS, Cache
from pipeline.teachers.ensemble import TeacherEnsemble
from pipeline.teachers.frozen import Teacher
from pipeline.teachers.peers import AveragedPeers
from pipeline.teachers.route import RouteTeacher
from pipeline.teachers.sample import check_sample
from shards.read import allow_open_files


class CachedTeacher(TeacherModule):
    """A teacher that returns cached outputs. ``live``, if given, computes the outputs that are not cached.

    ``head_KD`` are the weights of the network's last layer, if they are known.

    ``taps`` maps each tap to its kind of output. The loader reads the rows ahead of use (``columns``), so ``forward``
    only takes them from ``batch.extra``. Raises ValueError or FileNotFoundError, one line, unless the first ``views``
    views are complete.
    """

    def __init__(
        self,
        cache: Cache,
        taps: Mapping[str, str],
        *,
        views: int,
        device: torch.device,
        live: Teacher | TeacherEnsemble | None = None,
        head_KD: Tensor | None = None,
    ) -> None:
        super().__init__()
        cached = cache.header.kinds
        self.cache = cache
        self.live = live
        self.head_KD = head_KD
        self.cached_taps = {tap: kind for tap, kind in taps.items() if kind in cached}
        self.live_taps = [tap for tap in taps if tap not in self.cached_taps]
        self.kinds = sorted({*self.cached_taps.values()} | {LOGITS} & cached.keys())
        self.encoders = cache.encoders(device)
        allow_open_files(views * len(self.kinds))
        # Files are opened here and not on first use: with Python 3.11, threads that parse .npy headers in parallel
        # sometimes fail.
        self._maps = cache.complete_views(self.kinds, views)
        check_sample(cache, self.kinds, views)

    @cached_property
    def norms(self) -> dict[str, NormParameters]:
        """Return the parameters of the BatchNorm at the end of each tapped ``.preact`` stage, by tap."""
        stored = {tap: self.cache.header.kinds[kind].norm for tap, kind in self.cached_taps.items()}
        norms = {tap: NormParameters(torch.tensor(n.weight), torch.tensor(n.bias)) for tap, n in stored.items() if n}
        return norms | (self.live.norms if self.live else {})

    def shapes(self, image_size: Resolution) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tap and of the logits, without the batch."""
        live = self.live.shapes(image_size) if self.live else {}
        kinds = self.cache.header.kinds
        taps = {LOGITS: LOGITS, **self.cached_taps}
        return {LOGITS: (0,)} | live | {tap: kinds[kind].shape for tap, kind in taps.items() if kind in kinds}

    def columns(self, view: int) -> dict[str, NDArray]:
        """Return the stored outputs of a view by kind, with one row per id. Thread-safe."""
        return {kind: self._maps[view, kind] for kind in self.kinds}

    def forward(self, batch: Batch) -> Outputs:
        """Return the outputs for a training batch: float16 as stored, or float32 if decoded.

        Raises ValueError for a batch without cached rows, such as one of validation.
        """
        if self.kinds and not batch.extra:
            raise ValueError("a cached teacher has outputs for training images only")
        found = {kind: self._decode(kind, batch.extra[kind]) for kind in self.kinds}
        features = {tap: found[kind] for tap, kind in self.cached_taps.items()}
        if self.live is None:
            # Without a head, the teacher has no logits to cache.
            return Outputs(found.get(LOGITS, batch.images_BCHW.new_empty((len(batch.images_BCHW), 0))), features)
        live: Outputs = self.live(batch)
        features |= {tap: live.features[tap] for tap in self.live_taps}
        return Outputs(found.get(LOGITS, live.logits), features)

    def _decode(self, kind: str, rows: Tensor) -> Tensor:
        if kind in self.encoders:
            return self.encoders[kind].decode(rows)
        # A live teacher's maps are channels last, and the last bits of a loss depend on the memory format.
        return rows.contiguous(memory_format=torch.channels_last) if rows.ndim == 4 else rows


AnyTeacher = Teacher | TeacherEnsemble | CachedTeacher | AveragedPeers | RouteTeacher
"""The types of teachers. All have ``teacher(batch)``, ``at``, ``shapes``, ``norms`` and ``head_KD``."""


def half_answers(teacher: AnyTeacher, answers: Outputs) -> dict[tuple[str, str], Tensor]:
    """Return the last float16 outputs of the teacher's networks, by (recipe key, name of the output).

    ``answers`` are the teacher's outputs for the same batch. Cached outputs are left out: they were finite when they
    were written.
    """
    network, taps, has_logits = teacher, [*answers.features], True
    if isinstance(teacher, CachedTeacher):
        network, taps, has_logits = teacher.live, teacher.live_taps, LOGITS not in teacher.kinds
    # The mixture of an ensemble is float32, so the logits of its members are returned instead.
    members = network.member_logits if isinstance(network, TeacherEnsemble) else None
    keys = ["teacher"] if members is None else [f"teacher.members.{number}" for number in range(len(members))]
    logits = [answers.logits] if members is None else members
    found = {(key, "logits"): value for key, value in zip(keys, logits, strict=True) if has_logits}
    found |= {(keys[0], f"features ({tap})"): answers.features[tap] for tap in taps}
    return {key: value for key, value in found.items() if value.dtype == torch.float16 and network is not None}
