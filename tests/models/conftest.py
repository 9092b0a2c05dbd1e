from __future__ import annotations

from pathlib import Path

import pytest

WEIGHTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "weights"


@pytest.fixture
def published_cifar_weights() -> Path:
    """The folder of the published CIFAR-100 weights, which not every machine has."""
    if not WEIGHTS.is_dir():
        pytest.skip("no shared/data/weights beside the checkout")
    return WEIGHTS
