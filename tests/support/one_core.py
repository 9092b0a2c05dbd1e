"""One core for commands on tiny networks: two OpenMP threads would spend most of their time waiting for one another."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_core() -> Iterator[None]:
    """Give this thread, and the processes it starts, one of its cores: as many threads a command will use."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {_own_core(sorted(cores))})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _own_core(cores: list[int]) -> int:
    """Return any core; for one of several workers that run tests side by side, its own."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    return random.choice(cores) if worker is None else cores[int(worker.removeprefix("gw")) % len(cores)]
