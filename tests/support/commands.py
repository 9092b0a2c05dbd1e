"""The project's commands as processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from one_core import one_core

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "pipeline" / "train.py")
BIN = Path(sys.executable).parent


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def run_on_two_ranks(*command: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment(**more), check=False)


def run(*command: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    with one_core():
        return run_on_two_ranks(*command, folder=folder, **more)


def start(*command: str, folder: Path) -> subprocess.Popen[str]:
    with one_core():
        return subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True)
