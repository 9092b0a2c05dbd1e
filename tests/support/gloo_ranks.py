"""Standing gloo processes for tests of what ranks do together: starting them costs seconds, a call milliseconds."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """``ranks(function, *args)`` runs ``function(rank, world, *args)`` on every rank; rank 0's answer comes first.

    The processes start with the first call. One whose function ends the process group, as a whole run does, joins a new
    one before its next.

    ``function`` stands at the top level of a module, since the processes import it by name. What it raises is raised
    again in the test, with the rank's traceback as a note. After that, and after ``timeout`` seconds, the processes are
    killed, because the other ranks may be waiting in a collective; the next call starts new ones.
    """

    def __init__(self, folder: Path, world: int = 2) -> None:
        self.folder = folder
        self.world = world
        self.starts = 0
        self.processes: list[Any] = []
        self.pipes: list[connection.Connection] = []

    def __call__(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        if not self.processes:
            self._start()
            assert self(world_size) == [self.world] * self.world
        try:
            for pipe in self.pipes:
                pipe.send_bytes(pickle.dumps((function, args)))
            return self._answers(timeout)
        except BaseException:
            self.kill()
            raise

    def _start(self) -> None:
        self.starts += 1
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            place = _Place(rank, self.world, self.folder / f"store-{self.starts}")
            process = context.Process(target=_serve, args=(theirs, place, sys.path), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def _answers(self, timeout: float) -> list[Any]:
        answers: dict[int, Any] = {}
        while len(answers) < self.world:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            ready = connection.wait(waiting, timeout)
            if not ready:
                raise TimeoutError(f"no answer within {timeout} s of {len(waiting)} of {self.world} ranks")
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                answers[rank] = self._answer(rank)
        return [answers[rank] for rank in range(self.world)]

    def _answer(self, rank: int) -> Any:
        try:
            good, answer = pickle.loads(self.pipes[rank].recv_bytes())
        except EOFError:
            self.processes[rank].join(5)
            raise RuntimeError(f"rank {rank} died with exit code {self.processes[rank].exitcode}") from None
        if not good:
            raise answer
        return answer

    def close(self) -> None:
        """Let the processes end by themselves, and kill those that do not."""
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(b"")
        for process in self.processes:
            process.join(10)
        self.kill()

    def kill(self) -> None:
        """End the processes at once."""
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()
        self.processes, self.pipes = [], []


def world_size(rank: int, world: int) -> int:
    return dist.get_world_size()


@dataclass
class _Place:
    """Who a process is among the ranks, and where they meet."""

    rank: int
    world: int
    store: Path
    groups: int = 0

    def join(self) -> None:
        """Join a process group with the others, each under a file of its own."""
        self.groups += 1
        dist.init_process_group(
            "gloo",
            init_method=f"file://{self.store}-{self.groups}",
            rank=self.rank,
            world_size=self.world,
            timeout=timedelta(seconds=60),
        )


def _serve(pipe: connection.Connection, place: _Place, path: list[str]) -> None:
    sys.path[:] = path
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    while request := pipe.recv_bytes():
        pipe.send_bytes(_answer_to(request, place))
    if dist.is_initialized():
        dist.destroy_process_group()


def _answer_to(request: bytes, place: _Place) -> bytes:
    try:
        if not dist.is_initialized():
            place.join()
        function, args = pickle.loads(request)
        return pickle.dumps((True, function(place.rank, place.world, *args)))
    except Exception as error:
        text = f"on rank {place.rank}:\n{traceback.format_exc()}"
        error.add_note(text)
        try:
            return pickle.dumps((False, error))
        except Exception:
            return pickle.dumps((False, RuntimeError(text)))
