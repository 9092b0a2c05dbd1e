"""One check a file: ``check(options, folder)`` returns ``passed``, ``title``, ``columns``, ``rows`` and ``notes``."""

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


def answer(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], wrong: Sequence[str] = ()) -> CheckAnswer:
    """Return what a check found; ``wrong`` says what it did not pass for."""
    return {"passed": not wrong, "title": title, "columns": columns, "rows": rows, "notes": "; ".join(wrong)}


def cuda_device() -> torch.device:
    """Return where this process computes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train_short(folder: Path, *words: str) -> list[dict[str, Any]]:
    """Train in this process as ``train.py`` does with those words and that run folder; return the journal's lines."""
    from pipeline import train

    forget_accelerator()
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([*words, f"folder={folder}", "journal={every_steps: 1, trackers: []}", "compare=null"])
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def forget_accelerator() -> None:
    """Let the next command in this process begin as one in a process of its own: with no Accelerator."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def losses_of(lines: Sequence[dict[str, Any]]) -> list[float]:
    """Return the total loss of each step that was written down."""
    return [line["total"] for line in lines if "total" in line]


def saved_weights(run: Path, step: int) -> bytes:
    """Return the file of all weights in the checkpoint after that step."""
    return (run / "checkpoints" / f"step-{step}" / "distiller.safetensors").read_bytes()


def milliseconds(lines: Sequence[dict[str, Any]], after: int) -> float:
    """Return those of the middle step after so many lines, each a step's."""
    steps = [sum(line["timing"]["milliseconds"].values()) for line in lines if "timing" in line]
    return median(steps[after:])


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Let torch take algorithms that repeat their bits; a GPU's libraries want CUBLAS_WORKSPACE_CONFIG for it.

    Torch only warns of what it has no such algorithm for. By default it would refuse the gradient of
    ``adaptive_avg_pool2d``, which repeats its bits where the sizes divide, as they do here.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
