"""The writing of a cache as a function that ranks can run, and what is written."""

from __future__ import annotations

from pathlib import Path

import training_on_ranks

IMAGES, BATCH, BLOCK = 60, 12, 24


def cache(rank: int, world: int, folder: Path, words: list[str]) -> None:
    """Run ``pipeline/cache_teacher.py`` with those words in ``folder``, as the process of that rank."""
    from pipeline import cache_teacher

    training_on_ranks.run(cache_teacher.main, rank, world, folder, words)
