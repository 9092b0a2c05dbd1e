"""The formats of ``export.py`` by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from pipeline.exporting.hub import run_hub_folder, write_hub_folder
from pipeline.exporting.onnx import run_onnx, write_onnx
from pipeline.exporting.pt2 import run_pt2, write_pt2
from pipeline.exporting.timm_folder import run_timm_folder, write_timm_folder
from pipeline.exporting.torchscript import run_torchscript, write_torchscript
from pipeline.exporting.trained import TrainedStudent


class Format(NamedTuple):
    """A format: how a student is written, and how the written file is run."""

    ending: str
    """Ending of the file; empty for a folder."""
    write: Callable[[TrainedStudent, Path], None]
    run: Callable[[Path], Callable[[Tensor], Tensor]]
    """Reads such a file, and returns the network in it."""
    libraries: tuple[str, ...] = ()
    """Libraries that the format needs besides torch."""
    extra: str = "export"
    """Extra of this package that has them."""


FORMATS = {
    "pt2": Format(".pt2", write_pt2, run_pt2),
    "onnx": Format(".onnx", write_onnx, run_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "torchscript": Format(".torchscript", write_torchscript, run_torchscript),
    "timm": Format("", write_timm_folder, run_timm_folder, ("timm",), "timm"),
    "hub": Format("", write_hub_folder, run_hub_folder, ("huggingface_hub",)),
}
