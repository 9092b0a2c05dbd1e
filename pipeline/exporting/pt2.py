"""Students as ``.pt2`` files of torch.export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pipeline.exporting.trained import CARD_FILE, TrainedStudent, inference, trace_student
from pipeline.tasks._registry import find_task


def write_pt2(student: TrainedStudent, path: Path) -> None:
    """Write the program, with the student's card as an extra file."""
    program = trace_student(student, any_size=find_task(student.card.task).of_pixels)
    torch.export.save(program, path, extra_files={CARD_FILE: student.card_text})


def run_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    """Return the program of a file, from images [B, C, H, W] to logits [B, K]."""
    return inference(torch.export.load(path).module())
