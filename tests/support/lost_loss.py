"""A loss of a user's own, whose file is gone after the training."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

OWN_LOSS = """
from torch.nn import functional as F
from pipeline.losses import Loss

class Own(Loss):
    needs_teacher = False
    def forward(self, student, teacher, batch):
        return {"own": F.cross_entropy(student.logits_BK, batch.labels_B)}
"""


def write_own_loss(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the loss ``<name>:Own`` into the folder, from which Python then imports; return its file."""
    monkeypatch.syspath_prepend(folder)
    file = folder / f"{name}.py"
    file.write_text(OWN_LOSS)
    return file


def lose(file: Path) -> None:
    """Remove the file of a loss, and what Python remembers of it."""
    file.unlink()
    shutil.rmtree(file.parent / "__pycache__", ignore_errors=True)
    del sys.modules[file.stem]
