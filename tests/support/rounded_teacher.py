"""The main job with a live teacher whose answers pass through float16, as a cache's do."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import training_on_ranks

from pipeline.batch import Batch, Outputs
from pipeline.builders.teacher import build_teacher


def _rounded(*args: Any) -> Any:
    teacher = build_teacher(*args)
    assert teacher is not None
    answer = teacher.forward

    def forward(batch: Batch) -> Outputs:
        outputs = answer(batch)
        features = {name: x.to(torch.float16) for name, x in outputs.features.items()}
        return Outputs(outputs.logits_BK.to(torch.float16), features)

    teacher.forward = forward
    return teacher


def train(rank: int, world: int, folder: Path, words: list[str]) -> None:
    """Run ``pipeline/train.py`` as ``training_on_ranks.train`` does."""
    with mock.patch("pipeline.builders.shared.build_teacher", _rounded):
        training_on_ranks.train(rank, world, folder, words)
