from __future__ import annotations

import null_gpu
import pytest


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which Python has that GPU."""
    return null_gpu.build(tmp_path_factory.mktemp("null"))
