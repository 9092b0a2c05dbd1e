"""The formats of ``export.py`` by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from pipeline.exporting.hub import hub_runner, write_hub_folder
from pipeline.exporting.onnx import run_onnx, write_onnx
from pipeline.exporting.pt2 import run_pt2, write_pt2
from pipeline.exporting.timm_folder import run_timm_folder, write_timm_folder
from pipeline.exporting.torchscript import run_torchscript, write_torchscript
from pipeline.exporting.trained import TrainedStudent


class Format(NamedTuple):
    """How a student is written in a format, and how the written file is run again."""

    ending: str
    """Ending of the file; empty for a folder."""
    write: Callable[[TrainedStudent, Path], None]
    runner: Callable[[TrainedStudent], Callable[[Path], Callable[[Tensor], Tensor]]]
    """Returns the function that reads such a file, and returns the network in it."""
    libraries: tuple[str, ...] = ()
    """Libraries that the format needs besides torch."""
    extra: str = "export"
    """Extra of this package that has them."""


FORMATS = {
    "pt2": Format(".pt2", write_pt2, lambda _: run_pt2),
    "onnx": Format(".onnx", write_onnx, lambda _: run_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "torchscript": Format(".torchscript", write_torchscript, lambda _: run_torchscript),
    "timm": Format("", write_timm_folder, lambda _: run_timm_folder, ("timm",), "timm"),
    "hub": Format("", write_hub_folder, hub_runner, ("huggingface_hub",)),
}
