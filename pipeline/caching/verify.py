"""Comparing a cache with new outputs of its teacher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pipeline.caching.source import AnswerSource, Part, stored
from pipeline.teachers.cache import Cache


class Difference(NamedTuple):
    """The difference between the stored outputs of a kind and the teacher's new ones."""

    kind: str
    images: int
    """Number of images compared."""
    largest: float
    """Largest absolute difference."""
    scale: float
    """Largest absolute value of the stored outputs."""

    @property
    def relative(self) -> float:
        """Return the largest difference divided by the largest stored value."""
        return self.largest / self.scale if self.scale else float(self.largest > 0)

    def __str__(self) -> str:
        """Return the difference as one line of text."""
        text = f"largest difference {self.largest:.3g}, answers up to {self.scale:.3g}"
        return f"{self.kind}: {text}, {self.images:,} images"


def compare_answers(cache: Cache, source: AnswerSource, sample: int, rng: np.random.Generator) -> list[Difference]:
    """Run the teacher again on at least ``sample`` images in random views, and compare its outputs with the cache.

    Returns the difference of each kind of output. The images are in the same chunks as when the cache was written,
    because the last bits depend on them.
    """
    found = {kind: Difference(kind, 0, 0.0, 0.0) for kind in cache.header.kinds}
    encoders = cache.encoders(source.loader.device)
    parts = list(_sample_chunks(cache, source, sample, rng))
    for (ids, view), outputs in zip(parts, source.answers(parts), strict=True):
        for kind, now in stored(outputs, cache.header.kinds, encoders).items():
            then = cache.rows(view, kind)[ids].astype(np.float64)
            _, images, largest, scale = found[kind]
            # np.maximum returns NaN if either is NaN; Python's max may drop it.
            largest = float(np.maximum(largest, np.abs(then - now).max()))
            scale = float(np.maximum(scale, np.abs(then).max()))
            found[kind] = Difference(kind, images + len(ids), largest, scale)
    return list(found.values())


def _sample_chunks(cache: Cache, source: AnswerSource, sample: int, rng: np.random.Generator) -> Iterator[Part]:
    """Yield random chunks of ids, each at a random view, until they contain ``sample`` images or there are no more."""
    blocks = range(cache.header.blocks)
    chunks = [source.present(ids) for block in blocks for ids in cache.header.chunks(block)]
    chosen = 0
    for number in rng.permutation(len(chunks)):
        if chosen >= sample:
            return
        if len(chunks[number]):
            yield chunks[number], int(rng.integers(cache.header.views))
            chosen += len(chunks[number])
