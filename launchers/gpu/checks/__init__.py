"""The checks of the half hour, one per module, and their shared functions.

A module's ``check(options, folder)`` returns ``passed``, ``title``, ``columns``, ``rows`` and ``notes``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

CheckAnswer = dict[str, Any]


def answer(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], problems: Sequence[str] = ()
) -> CheckAnswer:
    """Return the answer of a check, which has passed if there are no ``problems``."""
    return {"passed": not problems, "title": title, "columns": columns, "rows": rows, "notes": "; ".join(problems)}


def cuda_device() -> torch.device:
    """Return the device of this process: the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train_short(folder: Path, *args: str) -> list[dict[str, Any]]:
    """Run ``train.py`` with some arguments and a run folder in this process, and return the journal's lines."""
    from pipeline import train

    reset_accelerator()
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([*args, f"folder={folder}", "journal={every_steps: 1, trackers: []}", "compare=null"])
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def reset_accelerator() -> None:
    """Reset Accelerate's global state, so that the next command in this process begins as in a new process."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def journal_losses(lines: Sequence[dict[str, Any]]) -> list[float]:
    """Return the total loss of each step in a journal."""
    return [line["total"] for line in lines if "total" in line]


def saved_weights(run: Path, step: int) -> bytes:
    """Return the bytes of the file with all weights in the checkpoint after ``step``."""
    return (run / "checkpoints" / f"step-{step}" / "distiller.safetensors").read_bytes()


def median_milliseconds(lines: Sequence[dict[str, Any]], skip: int) -> float:
    """Return the median time of a journal's steps in milliseconds, without the first ``skip`` steps."""
    steps = [sum(line["timing"]["milliseconds"].values()) for line in lines if "timing" in line]
    return median(steps[skip:])


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Use deterministic algorithms inside the context; cuBLAS needs CUBLAS_WORKSPACE_CONFIG for them.

    PyTorch only warns about operations without a deterministic algorithm. Otherwise it would refuse the gradient of
    ``adaptive_avg_pool2d``. That gradient is deterministic if the output size divides the input size, as it does here.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
