"""Trainings within a standing rank: starting a process costs seconds, a tiny run less."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor

from pipeline import train, zero
from pipeline.distiller import Distiller

Weights = dict[str, Tensor]


def trained(rank: int, world: int, folder: Path, *words: str, settings: str | None = None) -> Weights:
    """Run ``pipeline/train.py`` with ``words`` in ``folder``; return all weights, and this rank's own buffers."""
    return attempted(rank, world, folder, words, settings)[0]


def attempted(
    rank: int, world: int, folder: Path, words: Sequence[str], settings: str | None = None
) -> tuple[Weights, str | None]:
    """Do the same, and return also what a user would have been told of an error. ``settings`` are DeepSpeed's."""
    for state in (AcceleratorState, PartialState):
        state._shared_state.clear()
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost"}
    chosen = {"ACCELERATE_USE_DEEPSPEED": "true", zero.FILE: settings} if settings else {}
    built: list[Distiller] = []

    def build(*args: object) -> Distiller:
        built.append(build_distiller(*args))
        return built[0]

    build_distiller = train.build_distiller
    told = None
    with (
        contextlib.chdir(folder),
        mock.patch.dict(os.environ, {**variables, **chosen}),
        mock.patch.object(train, "build_distiller", build),
        # It would end the process group, which stands.
        mock.patch.object(Accelerator, "end_training"),
    ):
        try:
            train.main(words)
        except ValueError as error:
            told = str(error)
        return weights(built[0]) if built else {}, told


def weights(distiller: Distiller) -> Weights:
    with zero.gathered(distiller):
        return {
            name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in distiller.state_dict().items()
        }
