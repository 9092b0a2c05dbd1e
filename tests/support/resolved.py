"""A recipe's run, as one process without a launcher resolves it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.config.recipe import load_recipe
from pipeline.distributed.launcher import Launch
from pipeline.runs.identity import Run, resolve


def run_of(path: str | Path, words: Sequence[str] = ()) -> Run:
    """Return the run of a recipe whose shards are there."""
    return resolve(load_recipe(path, words), Launch())
