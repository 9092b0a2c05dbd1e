"""A quick check of a cache, by a sample of its blocks, when training opens it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.distributed import collectives
from pipeline.teachers.cache import MEND_HINT, Cache

SAMPLE_BYTES = 2**29
"""Bytes that all ranks together read and hash, in about a second. Each rank reads at least one block."""


def check_sample(cache: Cache, kinds: Sequence[str], views: int, sampled: int = SAMPLE_BYTES) -> None:
    """Raise ValueError, one line, if a sampled block of those views and kinds does not match its digest.

    If the cache has at most ``sampled`` bytes, the ranks share all its blocks. If it is larger, each rank reads random
    blocks, one of every file in turn, and other blocks at each start. This finds a file of zeros or of another cache,
    but a single wrong bit only by chance. ``cache_teacher.py --verify`` reads everything.
    """
    header = cache.header
    rank, world = collectives.rank(), collectives.world_size()
    files = [(view, kind) for view in range(views) for kind in kinds]
    if sum(header.id_count * header.row_bytes([kind]) for _, kind in files) <= sampled:
        blocks = [(view, kind, block) for view, kind in files for block in range(header.blocks)]
        _check(cache, iter(blocks[rank::world]))
        return
    left = sampled / world
    for view, kind, block in _random_blocks(files, header.blocks):
        _check(cache, iter([(view, kind, block)]))
        left -= len(header.ids(block)) * header.row_bytes([kind])
        if left <= 0:
            return


def _check(cache: Cache, blocks: Iterator[tuple[int, str, int]]) -> None:
    """Raise ValueError for the first block that does not match its digest."""
    for view, kind, block in blocks:
        if list(cache.damaged(view, kind, [block])):
            ids = cache.header.ids(block)
            rows = f"rows {ids.start} to {ids.stop - 1}"
            raise ValueError(f"{cache.path(view, kind)}: {rows} do not match their digest; {MEND_HINT}")


def _random_blocks(files: Sequence[tuple[int, str]], blocks: int) -> Iterator[tuple[int, str, int]]:
    """Yield every block once: in each turn one of every file, with files and blocks in random order."""
    rng = np.random.default_rng()  # without a seed: each rank and each start samples other blocks
    orders = [rng.permutation(blocks) for _ in files]
    for turn in range(blocks):
        for file in rng.permutation(len(files)):
            yield (*files[file], int(orders[file][turn]))
