"""The main job on standing ranks: ``ranks(train, folder, words)``, without a launcher and its seconds."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from one_core import one_core


def train(rank: int, world: int, folder: Path, words: list[str]) -> None:
    """Run ``pipeline/train.py`` with those words in ``folder``, as the process of that rank; 0 of 1 in this process."""
    from pipeline import train

    run(train.main, rank, world, folder, words)


def run(main: Callable[[list[str]], None], rank: int, world: int, folder: Path, words: list[str]) -> None:
    """Run an entry point so."""
    with launched(rank, world), contextlib.chdir(folder):
        main(words)


@contextlib.contextmanager
def launched(rank: int, world: int, **more: str) -> Iterator[None]:
    """Be inside what a launcher would have started, and afterwards what this process was before.

    A lone rank has one core.
    """
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "OMP_NUM_THREADS": 1}
    told |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 29500}  # of use to nobody: the ranks have met
    variables = {key: str(value) for key, value in told.items()} | more if world > 1 else {}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    threads = torch.get_num_threads()
    _forget_the_accelerator()
    try:
        with mock.patch.dict(os.environ, variables), one_core() if world == 1 else contextlib.nullcontext():
            yield
    finally:
        _forget_the_accelerator()
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _forget_the_accelerator() -> None:
    """It is a singleton of its process; a command begins with none."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
