"""Students as ONNX files. Only this module imports onnxruntime."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.exporting.trained import TrainedStudent, naming_operations, trace_student
from pipeline.runs.card import CARD

INPUT, OUTPUT, BATCH = "images", "logits", "batch"


def write_onnx(student: TrainedStudent, path: Path) -> None:
    """Write the network as one file: input ``images`` [batch, C, H, W], output ``logits`` [batch, K]."""
    program = trace_student(student)
    with warnings.catch_warnings(), naming_operations(), torch.no_grad():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(program, input_names=[INPUT], output_names=[OUTPUT], verbose=False)
    assert exported is not None
    model: Any = exported.model
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph.all_nodes():
            node.metadata_props.clear()  # it names this machine's folders
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = type(value.shape)([BATCH, *value.shape[1:]])
    model.metadata_props[CARD] = student.card_text  # under the same key as in student.safetensors
    exported.save(path)


def run_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """Return the network of a file in onnxruntime on the CPU, from images [B, C, H, W] to logits [B, K]."""
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images_BCHW: torch.from_numpy(session.run([OUTPUT], {INPUT: images_BCHW.numpy()})[0])
