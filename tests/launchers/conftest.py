from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from private_slurm import PrivateSlurm, missing

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items:
        if reason and item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateSlurm]:
    """A Slurm of two nodes of this session's own."""
    cluster = PrivateSlurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project in a folder of its own, so that logs and runs do not lie in the real one."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "slurm" / "logs").mkdir(parents=True)
    for name in ("configs", "launchers", "pipeline", "shards", *(f"slurm/{s.name}" for s in ROOT.glob("slurm/*.sh"))):
        (folder / name).symlink_to(ROOT / name)
    return folder
