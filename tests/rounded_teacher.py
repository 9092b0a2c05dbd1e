"""The main job with a live teacher whose answers pass through float16, as a cache's do."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
import training_on_ranks

from pipeline.batch import Batch, Outputs
from pipeline.teacher import Teacher

_answer = Teacher.forward


def _rounded(self: Teacher, batch: Batch) -> Outputs:
    outputs = _answer(self, batch)
    features = {name: x.to(torch.float16) for name, x in outputs.features.items()}
    return Outputs(outputs.logits_BK.to(torch.float16), features)


def train(rank: int, world: int, folder: Path, words: list[str]) -> None:
    """Run ``pipeline/train.py`` as ``training_on_ranks.train`` does."""
    with mock.patch.object(Teacher, "forward", _rounded):
        training_on_ranks.train(rank, world, folder, words)
