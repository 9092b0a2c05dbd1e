"""Whole runs within a standing rank: starting a process costs seconds, a tiny run less."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from accelerate import Accelerator
from torch import Tensor
from training_on_ranks import launched

from pipeline import train
from pipeline.batch import Batch, Outputs
from pipeline.builders import session
from pipeline.distiller import Distiller
from pipeline.losses import Loss
from pipeline.training import zero


class Training(NamedTuple):
    """What a rank has after a run."""

    weights: dict[str, Tensor]
    """The whole Distiller's, with this rank's own buffers."""
    error: str | None
    """What a user would have been told."""


def trained(rank: int, world: int, folder: Path, words: Sequence[str], settings: str | None = None) -> Training:
    """Run ``pipeline/train.py`` with ``words`` in ``folder``; ``settings`` is the file that asks for DeepSpeed."""
    with _command(rank, world, folder, settings), _kept() as distillers:
        try:
            train.main(words)
            error = None
        except ValueError as raised:
            error = str(raised)
        return Training(_weights(distillers[0]) if distillers else {}, error)


@contextlib.contextmanager
def _command(rank: int, world: int, folder: Path, settings: str | None) -> Any:
    chosen = {"ACCELERATE_USE_DEEPSPEED": "true", zero._SETTINGS_VARIABLE: settings} if settings else {}
    # The end of a training would end the process group, and with it the weights that ZeRO-3 has in parts.
    standing = mock.patch.object(Accelerator, "end_training")
    with launched(rank, world, **chosen), contextlib.chdir(folder), standing:
        yield


@contextlib.contextmanager
def _kept() -> Any:
    """Keep the Distillers that are built."""
    distillers: list[Distiller] = []
    build = session.build_distiller

    def kept(*args: Any) -> Distiller:
        distillers.append(build(*args))
        return distillers[-1]

    with mock.patch.object(session, "build_distiller", kept):
        yield distillers


def _weights(distiller: Distiller) -> dict[str, Tensor]:
    with zero.gather_parameters(distiller):
        return {name: x.clone(memory_format=torch.contiguous_format) for name, x in distiller.state_dict().items()}


class Bursting(Loss):
    """A user's loss whose gradient is not finite from the third micro-batch on, where it is seen by the last rank."""

    needs_teacher = False
    forwards = 0

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        self.forwards += 1
        bad = self.forwards > 2 and os.environ["RANK"] != "0"
        # The square root is zero, and its slope is not a number there.
        return {"bursting": (student.logits_BK * 0.0).square().sum().sqrt() if bad else 0.0 * student.logits_BK.sum()}
