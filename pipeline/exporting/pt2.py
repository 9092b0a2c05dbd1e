"""Students as ``.pt2`` files of torch.export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pipeline.exporting.trained import CARD_FILE, TrainedStudent, inference, trace_student


def write_pt2(student: TrainedStudent, path: Path) -> None:
    """Write the program, with the student's card as an extra file."""
    torch.export.save(trace_student(student), path, extra_files={CARD_FILE: student.card_text})


def run_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    """Return the program of a file, from images [B, C, H, W] to logits [B, K]."""
    return inference(torch.export.load(path).module())
