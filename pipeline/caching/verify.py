"""Whether a cache holds what was written, and whether that is what the teacher answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pipeline.caching.source import AnswerSource, Part, stored
from pipeline.teachers.cache import Cache


class Difference(NamedTuple):
    """How far a kind's stored answers are from those that the teacher gives now."""

    kind: str
    images: int
    largest: float
    scale: float
    """The largest answer, in absolute value."""

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest answer."""
        return self.largest / self.scale if self.scale else float(self.largest > 0)

    def __str__(self) -> str:
        """Return the difference as a user reads it."""
        told = f"largest difference {self.largest:.3g}, answers up to {self.scale:.3g}"
        return f"{self.kind}: {told}, {self.images:,} images"


def compare_answers(cache: Cache, source: AnswerSource, sample: int, rng: np.random.Generator) -> list[Difference]:
    """Ask the teacher again about at least ``sample`` images of random views, and compare every kind.

    It is asked in the same company as when the answers were written: the last bits depend on it.
    """
    found = {kind: Difference(kind, 0, 0.0, 0.0) for kind in cache.header.kinds}
    encoders = cache.encoders(source.loader.device)
    parts = list(_parts(cache, source, sample, rng))
    for (ids, view), outputs in zip(parts, source.answers(parts), strict=True):
        for kind, now in stored(outputs, cache.header.kinds, encoders).items():
            then = cache.rows(view, kind)[ids].astype(np.float64)
            _, images, largest, scale = found[kind]
            # Not max, which lets a NaN through.
            largest = float(np.maximum(largest, np.abs(then - now).max()))
            scale = float(np.maximum(scale, np.abs(then).max()))
            found[kind] = Difference(kind, images + len(ids), largest, scale)
    return list(found.values())


def _parts(cache: Cache, source: AnswerSource, sample: int, rng: np.random.Generator) -> Iterator[Part]:
    """Yield random chunks of ids, each at a random view, until they hold ``sample`` images or are all of a view's."""
    blocks = range(cache.header.blocks)
    chunks = [source.present(ids) for block in blocks for ids in cache.header.chunks(block)]
    chosen = 0
    for number in rng.permutation(len(chunks)):
        if chosen >= sample:
            return
        if len(chunks[number]):
            yield chunks[number], int(rng.integers(cache.header.views))
            chosen += len(chunks[number])
