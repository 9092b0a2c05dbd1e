"""A generator whose items a thread computes ahead of use."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

_T = TypeVar("_T")
CPU = torch.device("cpu")


def read_ahead(items: Generator[_T, None, None], depth: int, device: torch.device = CPU) -> Generator[_T, None, None]:
    """Yield ``items``, which a thread computes up to ``depth`` items ahead. Its exceptions are raised here.

    Closing the generator ends the thread, after its current item, and closes ``items``. ``device`` is the GPU for which
    the thread allocates pinned memory.
    """
    # A sentinel marks the end, because a StopIteration raised inside a generator becomes a RuntimeError.
    end = object()
    index = cuda_index(device)
    # A new thread starts on GPU 0, whatever GPU the process uses, and would allocate memory there.
    start = None if index is None else partial(torch.cuda.set_device, index)
    # One thread: a generator cannot be advanced by two at once, and one keeps the items in order.
    worker = ThreadPoolExecutor(1, thread_name_prefix="read-ahead", initializer=start)
    try:
        ahead = deque(worker.submit(next, items, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(worker.submit(next, items, end))
            yield item  # type: ignore[misc]  # only the sentinel is not a T
    finally:
        worker.shutdown(cancel_futures=True)
        items.close()


def cuda_index(device: torch.device) -> int | None:
    """Return the index of the GPU ``device``, by default this thread's current one; None for another device."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index
