"""Students as TorchScript files, for programs of C++ that use libtorch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pipeline.exporting.trained import CARD_FILE, TrainedStudent, inference, naming_operations, trace_student


def write_torchscript(student: TrainedStudent, path: Path) -> None:
    """Write the traced network, with the student's card as an extra file."""
    trace_student(student)  # refuses a network that branches on values, which this trace would take for constants
    with warnings.catch_warnings(), naming_operations(), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecated, and values that are constants at one size of image
        module = torch.jit.trace(student.model, student.two_images)
        torch.jit.save(module, str(path), _extra_files={CARD_FILE: student.card_text})  # pyright: ignore[reportArgumentType]


def run_torchscript(path: Path) -> Callable[[Tensor], Tensor]:
    """Return the network of a file, from images [B, C, H, W] to logits [B, K]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return inference(torch.jit.load(str(path)))
