"""The nvJPEG of a command's process on a GPU, seen with one that computes nothing: DALI's, and not torchvision's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import null_gpu
import pytest

from pipeline import nvjpeg

ROOT = Path(__file__).resolve().parents[2]
LOADED = str(ROOT / "tests" / "support" / "loaded_nvjpeg.py")
REASON = null_gpu.missing() or ("needs nvidia-nvjpeg" if nvjpeg._file() is None else None)
pytestmark = [
    pytest.mark.endurance,
    pytest.mark.skipif(bool(REASON), reason=str(REASON)),
    pytest.mark.timeout(300),
]


def loaded(environment: dict[str, str], folder: Path, *words: str) -> dict[str, Any]:
    done = null_gpu.python(environment, LOADED, *words, folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_command_decodes_with_dalis_and_records_it(environment: dict[str, str], tmp_path: Path):
    found = loaded(environment, tmp_path, str(ROOT / "pipeline" / "train.py"), "--list")
    assert found["version"] >= [13, 2]
    assert found["boxes"]
    assert found["recorded"] == found["of a cache"] == ".".join(map(str, found["version"]))
    # Torchvision's has another name, and so it is loaded, too; whoever asks for the common name gets the first.
    assert "libnvjpeg.so.13" in found["files"]
    assert len(found["files"]) == 2


def test_without_a_command_dali_decodes_with_torchvisions(environment: dict[str, str], tmp_path: Path):
    found = loaded(environment, tmp_path)
    assert found["version"] < [13, 2]
    assert not found["boxes"]
    assert found["recorded"] == found["of a cache"] == ".".join(map(str, found["version"]))
    # DALI has built a decoder by now, and has loaded no other.
    assert len(found["files"]) == 1
    assert "libnvjpeg.so.13" not in found["files"]
