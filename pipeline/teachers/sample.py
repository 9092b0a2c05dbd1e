"""Whether a cache is still what was written, by a sample of its blocks: what training can afford when it opens one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.distributed import collectives
from pipeline.teachers.cache import MEND_HINT, Cache

SAMPLED = 2**29
"""Bytes that all ranks together read and hash, about a second; but each at least a block."""


def check_sample(cache: Cache, kinds: Sequence[str], views: int, sampled: int = SAMPLED) -> None:
    """Raise ValueError, one line, if a block of those views and kinds is not what was written.

    Of a cache of no more than ``sampled`` bytes every block is read, by one rank or another. Of a larger one each rank
    reads blocks at random, other ones at each opening, of all files in turn: a file of zeros, or of another cache, is
    found, a single bit only with luck. ``cache_teacher.py --verify`` reads everything.
    """
    header = cache.header
    rank, world = collectives.rank(), collectives.world_size()
    files = [(view, kind) for view in range(views) for kind in kinds]
    if sum(header.id_count * header.row_bytes([kind]) for _, kind in files) <= sampled:
        blocks = [(view, kind, block) for view, kind in files for block in range(header.blocks)]
        _check(cache, iter(blocks[rank::world]))
        return
    left = sampled / world
    for view, kind, block in _at_random(files, header.blocks):
        _check(cache, iter([(view, kind, block)]))
        left -= len(header.ids(block)) * header.row_bytes([kind])
        if left <= 0:
            return


def _check(cache: Cache, blocks: Iterator[tuple[int, str, int]]) -> None:
    for view, kind, block in blocks:
        if list(cache.damaged(view, kind, [block])):
            ids = cache.header.ids(block)
            told = f"rows {ids.start} to {ids.stop - 1} are not what was written"
            raise ValueError(f"{cache.path(view, kind)}: {told}; {MEND_HINT}")


def _at_random(files: Sequence[tuple[int, str]], blocks: int) -> Iterator[tuple[int, str, int]]:
    """Yield every block once: in each turn one of every file, both in random order."""
    rng = np.random.default_rng()
    orders = [rng.permutation(blocks) for _ in files]
    for turn in range(blocks):
        for file in rng.permutation(len(files)):
            yield (*files[file], int(orders[file][turn]))
