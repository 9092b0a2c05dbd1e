from __future__ import annotations

from pathlib import Path

import pytest
from shard_factory import draw_samples, write_shards


@pytest.fixture(scope="session")
def photo_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of many sizes: 37 for training, 11 for validation."""
    splits = {"train": draw_samples(37, range(40, 120), "jpg", 0), "val": draw_samples(11, range(40, 120), "jpg", 1)}
    return write_shards(tmp_path_factory.mktemp("photos"), splits)


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PNGs of 16 × 16: 41 for training, 11 for validation."""
    splits = {"train": draw_samples(41, [16], "png", 2), "val": draw_samples(11, [16], "png", 3)}
    return write_shards(tmp_path_factory.mktemp("small"), splits, "png")
