"""The demo as README names it, whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from commands import TRAIN, run_on_two_ranks


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_demo_ends_with_three_networks_that_have_learned(tmp_path: Path):
    done = run_on_two_ranks(sys.executable, TRAIN, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    names = ("demo_teacher", "demo/ce", "demo")
    results = [json.loads((tmp_path / "runs" / name / "seed-0" / "result.json").read_text()) for name in names]
    for row, result in zip(done.stdout.splitlines()[-3:], results, strict=True):
        assert f"{result['top1']:.2f}" in row
        assert result["top1"] > 50  # of twenty classes
